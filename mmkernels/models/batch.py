"""Documents laid out in rows, several to a row, with everything that one forward needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels.attention.interval import IntervalMask
from mmkernels.models.chat_format import Document

# The loss leaves such targets out.
IGNORED = -100


@dataclass
class Batch:
    """Rows of documents; all tensors but the inputs are (B, S).

    Attributes:
        ids: tokens and placeholders; 0 beyond the last document.
        positions: each token's place in its document.
        documents: which document of its row a token belongs to; -1 beyond the last.
        spans: which image or sound a placeholder stands for, numbered in each row; -1 for others.
        adapted: whether a token's document has an image or a sound, bool.
        targets: the next token where it is learned, else `IGNORED`.
        images: those of all rows, in the order of their placeholders.
        audios: likewise.
        lengths: (B,) int32, tokens of each row.
        part: (S_r,) the positions that this process holds of rows that are spread over several,
            ascending; None: all. The tensors above are of whole rows.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    spans: Tensor
    adapted: Tensor
    targets: Tensor
    images: list[Tensor]
    audios: list[Tensor]
    lengths: Tensor
    part: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Document]], seqlen: int | None = None) -> "Batch":
        """Lays out rows.

        Args:
            rows: the documents of each row.
            seqlen: tokens of a row; None: as many as the longest needs.

        Raises:
            ValueError: a row has more tokens than seqlen.
        """
        lengths = [sum(map(len, row)) for row in rows]
        seqlen = max(lengths, default=0) if seqlen is None else seqlen
        if max(lengths, default=0) > seqlen:
            raise ValueError(
                f"a row has {max(lengths)} tokens; seqlen is {seqlen}. Give it fewer documents"
            )
        shape = (len(rows), seqlen)
        ids = torch.zeros(shape, dtype=torch.long)
        positions = torch.zeros(shape, dtype=torch.long)
        documents = torch.full(shape, -1, dtype=torch.int32)
        spans = torch.full(shape, -1, dtype=torch.int32)
        adapted = torch.zeros(shape, dtype=torch.bool)
        learned = torch.zeros(shape, dtype=torch.bool)
        images: list[Tensor] = []
        audios: list[Tensor] = []
        for index, row in enumerate(rows):
            begin = inputs = 0
            for number, document in enumerate(row):
                where = slice(begin, begin + len(document))
                begin = where.stop
                ids[index, where] = torch.tensor(document.ids, dtype=torch.long)
                positions[index, where] = torch.arange(len(document))
                documents[index, where] = number
                span = torch.tensor(document.spans, dtype=torch.int32)
                spans[index, where] = torch.where(span < 0, span, span + inputs)
                adapted[index, where] = bool(document.images or document.audios)
                inputs += len(document.images) + len(document.audios)
                learned[index, where] = torch.tensor(document.learned, dtype=torch.bool)
                images.extend(document.images)
                audios.extend(document.audios)
        targets = torch.full(shape, IGNORED)
        follows = learned[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        targets[:, :-1] = ids[:, 1:].where(follows, IGNORED)
        return cls(
            ids=ids,
            positions=positions,
            documents=documents,
            spans=spans,
            adapted=adapted,
            targets=targets,
            images=images,
            audios=audios,
            lengths=torch.tensor(lengths, dtype=torch.int32),
        )

    def mask(self) -> IntervalMask:
        """Causal in each document, but an image or a sound is seen whole by its own tokens.

        What is beyond the last document sees itself alone.
        """
        causal = mm.masks.causal(self.ids.shape[1], device=self.ids.device)
        return (causal & mm.masks.spans(self.documents)) | mm.masks.spans(self.spans)

    def held(self, x: Tensor) -> Tensor:
        """What this process holds of x (B, S)."""
        return x if self.part is None else x.index_select(1, self.part)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`."""
        moved: dict[str, Any] = {
            name: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
            for name, value in vars(self).items()
            if value is not None
        }
        return Batch(**moved)
