"""`IntervalMask`: row i attends the keys start[i] <= j < end[i].

Almost every mask of a multimodal model is one: full, causal, sliding window, padding, packed
documents or images, prefix-LM, bidirectional image spans inside causal text, vision windows. Two
int32 vectors replace a dense mask: O(N) memory, nothing to compile, and bounds that are data, so a
CUDA graph replays with new ones. An empty row is stored as (0, 0).
"""

import torch
from torch import Tensor

from mmkernels._core.values import captured, readable


class IntervalMask:
    """A mask in which every query row sees one contiguous run of keys, maybe none.

    Combine masks with `&` (always an interval) and `|` (a ValueError names the row where the two
    neither overlap nor touch; masks that both hold the diagonal always do).

    Args:
        start: (Sq,), (1, Sq) or (B, Sq) integers. First key of each row.
        end: like `start`. One past the last key of each row.
        seqlen_k: number of keys; checked against the keys the mask is used with. None: not checked
            beyond `end`.

    Attributes:
        start: (1 or B, Sq) int32.
        end: (1 or B, Sq) int32.
        seqlen_k: as given.

    Raises:
        TypeError: start or end is no integer tensor.
        ValueError: shapes or devices differ; start > end; a bound is outside [0, seqlen_k] (values
            are checked on the CPU, elsewhere with MMKERNELS_CHECK=1).
    """

    def __init__(self, start: Tensor, end: Tensor, seqlen_k: int | None = None) -> None:
        for name, bound in (("start", start), ("end", end)):
            if not isinstance(bound, Tensor) or bound.is_floating_point() or bound.is_complex():
                got = bound.dtype if isinstance(bound, Tensor) else type(bound).__name__
                raise TypeError(f"IntervalMask: {name} is {got}; it must be an integer tensor")
            if bound.dtype == torch.bool:
                raise TypeError(
                    f"IntervalMask: {name} is bool; it must hold key indices. "
                    "For a dense bool mask use IntervalMask.from_dense(mask)"
                )
            if bound.ndim not in (1, 2):
                raise ValueError(
                    f"IntervalMask: {name} has shape {tuple(bound.shape)}; it must be (Sq,), (1, "
                    "Sq) or (B, Sq)"
                )
        if start.device != end.device:
            raise ValueError(
                f"IntervalMask: start is on {start.device} and end on {end.device}; move one"
            )
        start, end = (torch.atleast_2d(bound) for bound in (start, end))
        if start.shape[1] != end.shape[1] or (
            start.shape[0] != end.shape[0] and 1 not in (start.shape[0], end.shape[0])
        ):
            raise ValueError(
                f"IntervalMask: start has shape {tuple(start.shape)} and end {tuple(end.shape)}; "
                "they must agree"
            )
        start, end = torch.broadcast_tensors(start, end)
        if readable(start, end) and start.numel():
            _check_bounds(start, end, seqlen_k)
        start, end = start.to(torch.int32), end.to(torch.int32)
        self.start, self.end, self.seqlen_k = *_normal(start, end), seqlen_k

    # What key_rows returned, and from what it was made.
    _key_rows: tuple[tuple, tuple[Tensor, Tensor]] | None = None
    # Likewise what `distributed.ring.pieces` made of it.
    _pieces: tuple[tuple, list["IntervalMask"]] | None = None

    @classmethod
    def _of(cls, start: Tensor, end: Tensor, seqlen_k: int | None) -> "IntervalMask":
        """A mask from bounds known to be valid."""
        mask = cls.__new__(cls)
        mask.start, mask.end, mask.seqlen_k = start, end, seqlen_k
        return mask

    @property
    def shape(self) -> torch.Size:
        """(1 or B, Sq)."""
        return self.start.shape

    @property
    def device(self) -> torch.device:
        """Where the bounds lie."""
        return self.start.device

    def identity(self) -> tuple[int, int, tuple[int, int]] | None:
        """What stays the same as long as the bounds do; None for inference tensors, which change.

        A finding that is kept with it must also keep the bounds, lest others get their ids.
        """
        if self.start.is_inference():
            return None
        return id(self.start), id(self.end), self.versions()

    def versions(self) -> tuple[int, int]:
        """Counts of in-place changes of start and end; (0, 0) for inference tensors."""
        start, end = self.start, self.end
        return (0, 0) if start.is_inference() else (start._version, end._version)

    def to(self, device: torch.device | str) -> "IntervalMask":
        """The mask with its bounds on `device`."""
        return self._of(self.start.to(device), self.end.to(device), self.seqlen_k)

    def __repr__(self) -> str:
        return f"IntervalMask(shape={tuple(self.shape)}, seqlen_k={self.seqlen_k}, {self.device})"

    def __and__(self, other: "IntervalMask") -> "IntervalMask":
        """Keys that both masks show."""
        if not isinstance(other, IntervalMask):
            return NotImplemented
        seqlen_k = self._common_seqlen_k(other)
        start = torch.maximum(self.start, other.start)
        end = torch.minimum(self.end, other.end)
        return self._of(*_normal(start, end), seqlen_k)

    def __or__(self, other: "IntervalMask") -> "IntervalMask":
        """Keys that either mask shows.

        Raises:
            ValueError: in some row the two intervals neither overlap nor touch.
        """
        if not isinstance(other, IntervalMask):
            return NotImplemented
        seqlen_k = self._common_seqlen_k(other)
        a, b, c, d = torch.broadcast_tensors(self.start, self.end, other.start, other.end)
        left_empty, right_empty = a == b, c == d
        if readable(a, c):
            apart = (torch.maximum(a, c) > torch.minimum(b, d)) & ~left_empty & ~right_empty
            if apart.any():
                batch, row = apart.nonzero()[0].tolist()
                left, right = (
                    [bound[batch, row].item() for bound in pair] for pair in ((a, b), (c, d))
                )
                raise ValueError(
                    f"IntervalMask |: row {row} of batch {batch} sees keys {left} and {right}, "
                    "which neither overlap nor touch, so their union is no interval; pass a dense "
                    "bool mask"
                )
        start = torch.where(left_empty, c, torch.where(right_empty, a, torch.minimum(a, c)))
        end = torch.where(left_empty, d, torch.where(right_empty, b, torch.maximum(b, d)))
        return self._of(start, end, seqlen_k)

    def _common_seqlen_k(self, other: "IntervalMask") -> int | None:
        if self.shape[1] != other.shape[1] or (
            self.shape[0] != other.shape[0] and 1 not in (self.shape[0], other.shape[0])
        ):
            raise ValueError(
                f"IntervalMask: cannot combine masks of shapes {tuple(self.shape)} and "
                f"{tuple(other.shape)}; (batch, rows) must agree, or batch be 1"
            )
        known = {mask.seqlen_k for mask in (self, other)} - {None}
        if len(known) > 1:
            raise ValueError(
                f"IntervalMask: cannot combine masks over {self.seqlen_k} and {other.seqlen_k} keys"
            )
        if self.device != other.device:
            raise ValueError(
                f"IntervalMask: cannot combine masks on {self.device} and {other.device}; use .to()"
            )
        return known.pop() if known else None

    @classmethod
    def from_dense(cls, mask: Tensor) -> "IntervalMask":
        """The interval form of a dense bool mask; reads the tensor once, so it synchronises a GPU.

        Args:
            mask: (Sq, Sk), (B, Sq, Sk) or (B, 1, Sq, Sk) bool, True = attend.

        Raises:
            TypeError: mask is not a bool tensor.
            ValueError: wrong rank; the keys of some row are not contiguous (the message names it).
            RuntimeError: a CUDA graph is being captured.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"from_dense: mask is {got}; it must be a bool tensor, True = attend")
        if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
            raise ValueError(
                f"from_dense: mask has shape {tuple(mask.shape)}; it must be (Sq, Sk), (B, Sq, Sk) "
                "or (B, 1, Sq, Sk). A mask that differs between heads is no interval mask"
            )
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "from_dense: reads its tensor, which a CUDA graph capture forbids; "
                "build the mask before the capture"
            )
        dense = mask[None] if mask.ndim == 2 else mask.squeeze(1) if mask.ndim == 4 else mask
        start, end, contiguous = dense_bounds(dense)
        if not contiguous.all():
            batch, row = (~contiguous).nonzero()[0].tolist()
            raise ValueError(
                f"from_dense: the keys of row {row} of batch {batch} are not contiguous, so the "
                "mask is no interval mask; pass it to mmkernels.attention(mask=...) as it is"
            )
        return cls._of(start, end, mask.shape[-1])

    def to_dense(self, seqlen_k: int | None = None) -> Tensor:
        """The mask as (1 or B, Sq, Sk) bool, True = attend.

        Args:
            seqlen_k: number of keys, where the mask does not know it.

        Raises:
            ValueError: the number of keys is unknown, or not the mask's own.
        """
        if seqlen_k is None:
            seqlen_k = self.seqlen_k
        elif self.seqlen_k not in (None, seqlen_k):
            raise ValueError(f"to_dense: seqlen_k is {seqlen_k}; the mask has {self.seqlen_k} keys")
        if seqlen_k is None:
            raise ValueError("to_dense: this mask does not know its number of keys; pass seqlen_k")
        keys = torch.arange(seqlen_k, device=self.device, dtype=torch.int32)
        return (keys >= self.start[..., None]) & (keys < self.end[..., None])

    def key_rows(self, seqlen_k: int | None = None) -> tuple[Tensor, Tensor]:
        """The transposed ranges, which dK and dV need: each key's first row, one past its last.

        Rows between the two may still not see the key; outside of them none does.

        Args:
            seqlen_k: number of keys, where the mask does not know it.

        Returns:
            row_start, row_end: (1 or B, Sk) int32; (0, 0) for a key that no row sees.
        """
        seqlen_k = self.seqlen_k if seqlen_k is None else seqlen_k
        if seqlen_k is None:
            raise ValueError("key_rows: this mask does not know its number of keys; pass seqlen_k")
        # A graph makes its own at every replay, from the bounds of that time.
        if torch.compiler.is_compiling() or captured(self.device):
            return self._transposed(seqlen_k)
        made_from = (seqlen_k, self.identity(), self.start, self.end)
        kept = self._key_rows
        if kept is not None and kept[0][:2] == made_from[:2] and made_from[1] is not None:
            return kept[1]
        self._key_rows = (made_from, self._transposed(seqlen_k))
        return self._key_rows[1]

    def _transposed(self, seqlen_k: int) -> tuple[Tensor, Tensor]:
        row = torch.arange(self.shape[1], device=self.device, dtype=torch.int32).expand(self.shape)
        none = self.shape[1]
        first = _scatter_min(self.start, self.end, row, seqlen_k, none)
        last = none - 1 - _scatter_min(self.start, self.end, none - 1 - row, seqlen_k, none)
        seen = first < none
        return first.where(seen, 0), (last + 1).where(seen, 0)


def _check_bounds(start: Tensor, end: Tensor, seqlen_k: int | None) -> None:
    limit = torch.iinfo(torch.int32).max if seqlen_k is None else seqlen_k
    for wrong, problem in (
        (start > end, "start > end; an empty row is start = end"),
        (start < 0, "start < 0"),
        (end > limit, f"end > {limit}, the number of keys"),
    ):
        if wrong.any():
            batch, row = wrong.nonzero()[0].tolist()
            a, b = (bound[batch, row].item() for bound in (start, end))
            raise ValueError(
                f"IntervalMask: row {row} of batch {batch} is [{a}, {b}): {problem}. "
                "Clamp the bounds to [0, number of keys]"
            )


def _normal(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Empty rows as (0, 0)."""
    empty = start >= end
    return start.masked_fill(empty, 0), end.masked_fill(empty, 0)


def dense_bounds(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """start, end (B, Sq) int32 of a (B, Sq, Sk) bool mask, and (B, Sq) bool: is it an interval."""
    seqlen_k = dense.shape[-1]
    if seqlen_k == 0:
        zero = torch.zeros(dense.shape[:-1], dtype=torch.int32, device=dense.device)
        return zero, zero, torch.ones_like(zero, dtype=torch.bool)
    count = dense.sum(-1, dtype=torch.int32)
    start = dense.view(torch.uint8).argmax(-1).to(torch.int32)
    runs = (dense[..., 1:] > dense[..., :-1]).sum(-1, dtype=torch.int32) + dense[..., 0]
    start = start.where(count > 0, 0)
    return start, start + count, runs <= 1


def _scatter_min(start: Tensor, end: Tensor, value: Tensor, length: int, initial: int) -> Tensor:
    """For each position, the least `value` of all intervals [start, end) that cover it.

    A sparse table backwards: an interval is two overlapping runs of 2**level positions; each
    level's minima are then handed down to its two halves. O((N + length) log length), no loop over
    rows.
    """
    levels = max(length, 1).bit_length()
    size = end - start
    level = torch.frexp(size.clamp(min=1).double()).exponent.long() - 1
    table = start.new_full((start.shape[0], levels, max(length, 1)), initial)
    flat = table.view(start.shape[0], -1)
    hidden = size == 0
    value = value.masked_fill(hidden, initial)
    for position in (start, end - (1 << level)):
        index = (level * table.shape[-1] + position).masked_fill(hidden, 0)
        flat.scatter_reduce_(1, index.long(), value, "amin")
    for upper in range(levels - 1, 0, -1):
        half = 1 << (upper - 1)
        parent, child = table[:, upper], table[:, upper - 1]
        torch.minimum(child, parent, out=child)
        torch.minimum(child[:, half:], parent[:, :-half], out=child[:, half:])
    return table[:, 0, :length].contiguous()
