"""What a call of the cpu backend computes: blocks of rows, and what is added to their scores."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmkernels._core.ops import lse_dtype
from mmkernels.attention import cpu_flash, reference
from mmkernels.attention.plan import (
    TILE_KEYS,
    TILE_ROWS,
    Block,
    Piece,
    full_plan,
    plan,
    shared_plan,
)


class Work:
    """The pieces of a call and how to run one.

    Args:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        start: as in `_core/ops.py`, and so the rest.
        end: see start.
        bias: see start.
        alibi_slopes: see start.
        softmax_scale: see start.
        careful: NaN or Inf may be hidden from some row. torch's kernel would let 0 * NaN through,
            so every piece runs on `reference`.

    Attributes:
        blocks: (batch elements, block) pairs; rows in no block see no key.
        covers: every row of every batch element is in a block.
        whole: one block holds all rows of all batch elements.
        hides: some row may not see some key of its pieces.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        softmax_scale: float,
        careful: bool = False,
    ) -> None:
        self.dtype = lse_dtype(q.dtype)
        self.softmax_scale = softmax_scale
        self.bias, self.slopes = bias, alibi_slopes
        self.tensor_added = bias is not None or alibi_slopes is not None
        self.bias_hides = bias is not None and (
            bias.dtype == torch.bool or bool(torch.isneginf(bias).any())
        )
        self.hides = self.bias_hides or (start is not None and q.shape[1] > 1)
        self.careful = careful
        self.diagonal = k.shape[1] - q.shape[1]
        self.blocks = list(self._cut(q, k, v, start, end))
        everything = (slice(0, q.shape[0]), slice(0, q.shape[1]))
        rows = sum((batch.stop - batch.start) * (b.r1 - b.r0) for batch, b in self.blocks)
        self.covers = rows == q.shape[0] * q.shape[1]
        self.whole = len(self.blocks) == 1 and everything == (
            self.blocks[0][0],
            self.blocks[0][1].rows,
        )
        self._last_mask: tuple[tuple, Tensor] | None = None

    def _cut(
        self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None
    ) -> Iterator[tuple[slice, Block]]:
        if q.numel() == 0 or v.numel() == 0:
            return
        # The kernel's own causal mask is scaled: a scale below 0 turns its -inf into inf.
        tiled = self.careful or self.tensor_added or self.softmax_scale <= 0.0
        batches = [slice(0, q.shape[0])]
        if start is not None and start.shape[0] > 1:
            batches = [slice(b, b + 1) for b in range(q.shape[0])]
        if start is None or end is None:
            blocks = full_plan(q.shape[1], k.shape[1], tiled)
            yield from ((batch, block) for batch in batches for block in blocks)
            return
        # Bounds are data, which may have changed since they were checked.
        start, end = (bound.clamp(0, k.shape[1]) for bound in (start, end))
        # A single row's piece is exactly its keys: past them, a cache may hold NaN.
        short = q.shape[1] > 1 and 2 * q.shape[1] * k.shape[1] <= TILE_ROWS * TILE_KEYS
        if start.shape[0] > 1 and short and not tiled:
            shared = shared_plan(start, end)
            if shared is not None:
                yield from shared
                return
        for batch in batches:
            row = batch.start if start.shape[0] > 1 else 0
            yield from ((batch, block) for block in plan(start[row], end[row], tiled))

    def forward(
        self, batch: slice, block: Block, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """out (b, rows, Hq, D) and lse (b, Hq, rows) of a block, merged over its pieces."""
        q = _cut_out(q, batch, block.rows)
        results = []
        for piece in block.pieces:
            added = self._added(batch, block, piece)
            keys, values = (_cut_out(x, batch, piece.keys) for x in (k, v))
            results.append(self._forward_piece(piece, added, q, keys, values))
        out, lse = results[0] if len(results) == 1 else _merged(results)
        if block.empty is not None:
            empty = torch.from_numpy(block.empty)
            out = out.masked_fill(empty[..., None, None], 0.0)
            lse = lse.masked_fill(empty[:, None], -torch.inf)
        return out, lse

    def backward(
        self,
        batch: slice,
        block: Block,
        piece: Piece,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A piece's share of dq (b, rows, Hq, D), dk and dv (b, keys, Hkv, D)."""
        added = self._added(batch, block, piece)
        dout, q, out = (_cut_out(x, batch, block.rows) for x in (dout, q, out))
        k, v = (_cut_out(x, batch, piece.keys) for x in (k, v))
        if not self.whole:
            lse = lse[batch, :, block.rows]
        if block.empty is not None:  # 0 * NaN
            empty = torch.from_numpy(block.empty)[..., None, None]
            dout, q = dout.masked_fill(empty, 0.0), q.masked_fill(empty, 0.0)
        scale = self.softmax_scale
        if self.careful:
            return reference.backward(
                dout, None, q, k, v, out, lse, None, None, None, None, added, None, None, None,
                scale, 0.0, 0.0, False, True,
            )[:3]  # fmt: skip
        return cpu_flash.backward(dout, q, k, v, out, lse, piece.causal, added, scale)

    def _forward_piece(
        self, piece: Piece, added: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = self.softmax_scale
        if self.careful:
            return reference.forward(q, k, v, None, None, added, None, None, None, scale, 0.0, 0.0)
        if not self.bias_hides or added is None:
            return cpu_flash.forward(q, k, v, piece.causal, added, scale)
        unseeing = added.amax(-1) == -torch.inf  # (1 or b, 1 or Hq, rows): sees no key here
        added = added.masked_fill(unseeing[..., None], 0.0)
        out, lse = cpu_flash.forward(q, k, v, piece.causal, added, scale)
        out = out.masked_fill(unseeing.transpose(1, 2)[..., None], 0.0)
        return out, lse.masked_fill(unseeing, -torch.inf)

    def _added(self, batch: slice, block: Block, piece: Piece) -> Tensor | None:
        """(1 or b, 1 or Hq, rows, keys) to add to a piece's scores, -inf where hidden, or None."""
        added = None
        if self.bias is not None:
            wanted = (batch, slice(None), block.rows, piece.keys)
            sizes = self.bias.shape
            cut = tuple(slice(None) if n == 1 else s for s, n in zip(wanted, sizes, strict=True))
            added = self.bias[cut].expand(-1, -1, *piece.shape(block))
            if added.dtype == torch.bool:
                shown, added = added, added.new_zeros((), dtype=self.dtype)
                added = torch.where(shown, added, -torch.inf)
            added = added.to(self.dtype)
        if self.slopes is not None:
            slopes = torch.atleast_2d(self.slopes)
            slopes = slopes[batch] if slopes.shape[0] > 1 else slopes
            row = torch.arange(block.r0, block.r1)[:, None] + self.diagonal
            distance = (row - torch.arange(piece.k0, piece.k1)).abs().to(self.dtype)
            alibi = -slopes.to(self.dtype)[..., None, None] * distance
            added = alibi if added is None else added + alibi
        if piece.bounds is None:
            return added
        if added is not None:
            return added.masked_fill(piece.hidden()[:, None], -torch.inf)
        # The tiles of a window differ in their place alone, so the last mask often serves again.
        key = (piece.k1 - piece.k0, *(bound.tobytes() for bound in piece.bounds))
        if self._last_mask is None or self._last_mask[0] != key:
            hidden = piece.hidden()[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.dtype)
            self._last_mask = (key, mask.masked_fill_(hidden, -torch.inf))
        return self._last_mask[1]


def _cut_out(x: Tensor, batch: slice, rows: slice) -> Tensor:
    """x[batch, rows]; x itself, which is quicker, where that is all of it."""
    size, length = x.shape[:2]
    if batch.stop - batch.start == size and rows.stop - rows.start == length:
        return x
    return x[batch, rows]


def all_finite(x: Tensor) -> bool:
    """Is x finite? One pass over it; a finite x whose sum overflows only takes the slower way."""
    # A sum in another dtype copies x first; only float16's own would overflow at ordinary values.
    return math.isfinite(float(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None)))


def _merged(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint keys, from the out and lse over each part."""
    lses = torch.stack([lse for _, lse in results])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).transpose(2, 3)[..., None]
    first = results[0][0]
    out = first * weights[0]
    for (part, _), weight in zip(results[1:], weights[1:], strict=True):
        out.addcmul_(part.to(out.dtype), weight)
    return out.to(first.dtype), lse
