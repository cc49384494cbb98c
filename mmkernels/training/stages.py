"""How training goes: stages, each with data, steps and a learning rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import cos, pi

from mmkernels.models.batch import Batch
from mmkernels.models.chat_format import Document

# (step, micro-batch) -> its documents, always the same.
Documents = Callable[[int, int], list[Document]]


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a warm-up and a cosine.

    Attributes:
        name: "pretrain", "finetune", ...
        steps: optimizer steps.
        documents: what to learn from.
        learning_rate: its peak.
        warmup: steps until then.
        final: part of the peak to which a cosine leads; 1: the rate stays.
        seqlen: tokens of a row, into which documents are packed.
        accumulate: micro-batches of a step.
        weight_decay: of matrices.
        clip: most norm of the gradient.
    """

    name: str
    steps: int
    documents: Documents
    learning_rate: float
    warmup: int
    final: float = 0.05
    seqlen: int = 256
    accumulate: int = 1
    weight_decay: float = 0.05
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on: linear up, then a cosine down."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (self.final + (1 - self.final) * (1 + cos(pi * part)) / 2)


def fit(documents: Iterable[Document], seqlen: int) -> list[list[Document]]:
    """Documents in as few rows as first fit finds, the longest first.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        size = len(document)
        if size > seqlen:
            raise ValueError(
                f"a document has {size} tokens, and a row {seqlen}; give the stage a longer seqlen"
            )
        row = next((i for i, left in enumerate(room) if left >= size), None)
        if row is None:
            rows.append([])
            room.append(seqlen)
            row = len(rows) - 1
        rows[row].append(document)
        room[row] -= size
    return rows


def pack(documents: Iterable[Document], seqlen: int) -> Batch:
    """`fit`, laid out.

    Raises:
        ValueError: a document is longer than a row.
    """
    return Batch.of(fit(documents, seqlen), seqlen)
