"""Cuts an interval mask into rectangles that torch's CPU flash kernel can run.

A block of rows is served by pieces, each a run of keys: seen by all its rows ("full"), along a
diagonal ("causal", top-left), or through a small mask. Long runs of rows with equal bounds, or with
a constant start and an end that grows by one, become a block of one or two pieces; the rest goes in
tiles of at most `TILE_ROWS` rows. In every piece every row sees at least one key, since that kernel
returns garbage for a row that sees none. Short batch elements share blocks, which name such rows.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE_ROWS = 128
TILE_KEYS = 1024  # a mask is never larger than TILE_ROWS x TILE_KEYS
LONG_RUN = 64  # rows; below this a run is not worth a kernel call of its own
SHARED_ROWS = 64  # what torch's kernel takes at a time: its causal mask skips no more than this
CALL = 2048  # hidden (row, key) pairs that cost about what a kernel call costs


class Piece(NamedTuple):
    """Keys [k0, k1) of a block; `bounds`, (1 or b, rows) less k0, where a mask is needed."""

    k0: int
    k1: int
    causal: bool = False
    bounds: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def keys(self) -> slice:
        """Its keys."""
        return slice(self.k0, self.k1)

    def shape(self, block: "Block") -> tuple[int, int]:
        """(rows, keys)."""
        return block.r1 - block.r0, self.k1 - self.k0

    def hidden(self) -> Tensor:
        """(1 or b, rows, keys) bool, True where a row must not see a key."""
        assert self.bounds is not None
        start, end = (torch.from_numpy(bound)[..., None] for bound in self.bounds)
        keys = torch.arange(self.k1 - self.k0)
        return (keys < start) | (keys >= end)


class Block(NamedTuple):
    """Rows [r0, r1) and the pieces that serve them.

    `empty`, (b, rows) bool, tells which rows see no key, where some do: what the kernel returns
    for them is to be thrown away.
    """

    r0: int
    r1: int
    pieces: tuple[Piece, ...]
    empty: np.ndarray | None = None

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.r0, self.r1)


def plan(start: Tensor, end: Tensor, tiled: bool) -> tuple[Block, ...]:
    """The blocks for bounds (Sq,) int32; rows without a key are in none.

    Args:
        start: first key of each row, on the CPU.
        end: one past the last key of each row.
        tiled: no causal pieces and no block above TILE_ROWS rows, for work that is materialised.
    """
    if start.shape[0] == 1 and not tiled:
        k0, k1 = int(start), int(end)
        return (Block(0, 1, (Piece(k0, k1),)),) if k1 > k0 else ()
    return _plan(start.numpy().tobytes(), end.numpy().tobytes(), tiled)


def shared_plan(start: Tensor, end: Tensor) -> tuple[tuple[slice, Block], ...] | None:
    """Blocks of many batch elements each, for bounds (B, Sq) int32 of short sequences.

    A block has one piece, whose mask holds the bounds of all its batch elements, and is no larger
    than any other.

    Returns:
        (batch elements, block) pairs; None where a plan for each batch element is cheaper.
    """
    return _shared_plan(start.numpy().tobytes(), end.numpy().tobytes(), start.shape[0])


@functools.lru_cache(maxsize=64)
def _shared_plan(
    start_bytes: bytes, end_bytes: bytes, batch_size: int
) -> tuple[tuple[slice, Block], ...] | None:
    starts, ends = (
        np.frombuffer(x, np.int32).reshape(batch_size, -1) for x in (start_bytes, end_bytes)
    )
    blocks = []
    wanted = spent = 0
    for r0 in range(0, starts.shape[1], SHARED_ROWS):
        start, end = starts[:, r0 : r0 + SHARED_ROWS], ends[:, r0 : r0 + SHARED_ROWS]
        rows, empty = start.shape[1], start >= end
        first = np.where(empty, np.iinfo(np.int32).max, start).min(1)
        last = end.max(1)
        k0, k1 = int(first.min()), int(last.max())
        if k0 >= k1:
            continue
        together = TILE_ROWS * TILE_KEYS // (rows * (k1 - k0))
        if together < 2:
            return None
        wanted += rows * int(np.maximum(last - first, 0).sum())
        spent += rows * (k1 - k0) * batch_size
        for b in range(0, batch_size, together):
            batch = slice(b, min(b + together, batch_size))
            piece = Piece(k0, k1, bounds=(start[batch] - k0, end[batch] - k0))
            lost = empty[batch] if empty[batch].any() else None
            blocks.append((batch, Block(r0, r0 + rows, (piece,), lost)))
    return tuple(blocks) if spent <= 2 * wanted + CALL * batch_size else None


@functools.lru_cache(maxsize=64)
def full_plan(seqlen_q: int, seqlen_k: int, tiled: bool) -> tuple[Block, ...]:
    """The blocks where every row sees every key."""
    rows = TILE_ROWS if tiled else max(seqlen_q, 1)
    pieces = _cut_keys((Piece(0, seqlen_k),)) if tiled else (Piece(0, seqlen_k),)
    return tuple(Block(r0, min(r0 + rows, seqlen_q), pieces) for r0 in range(0, seqlen_q, rows))


@functools.lru_cache(maxsize=256)
def _plan(start_bytes: bytes, end_bytes: bytes, tiled: bool) -> tuple[Block, ...]:
    start, end = np.frombuffer(start_bytes, np.int32), np.frombuffer(end_bytes, np.int32)
    blocks: list[Block] = []
    row = 0
    for r0, r1 in [] if tiled else _long_runs(start, end):
        blocks += _tiles(start, end, row, r0)
        blocks += _run(start, end, r0, r1)
        row = r1
    blocks += _tiles(start, end, row, len(start))
    if tiled:
        blocks = [block._replace(pieces=_cut_keys(block.pieces)) for block in blocks]
    return tuple(blocks)


def _cut_keys(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces, those that all rows see cut into TILE_KEYS keys."""
    return tuple(
        piece if piece.bounds else Piece(k0, min(k0 + TILE_KEYS, piece.k1))
        for piece in pieces
        for k0 in (range(piece.k0, piece.k1, TILE_KEYS) if piece.bounds is None else (piece.k0,))
    )


def _long_runs(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Disjoint runs of rows with a constant start, and an end that is constant or grows by one.

    Each has LONG_RUN rows or more, or all; greedy from the first row.
    """
    rows = np.arange(len(start))
    run_end: np.ndarray = np.zeros(len(start), np.int64)
    for slope in (0, 1):
        breaks: np.ndarray = np.flatnonzero((np.diff(start) != 0) | (np.diff(end) != slope)) + 1
        breaks = np.append(breaks, len(start))
        np.maximum(run_end, breaks[np.searchsorted(breaks, rows, side="right")], out=run_end)
    candidates = np.flatnonzero(run_end - rows >= min(LONG_RUN, len(start)))
    runs, row = [], 0
    while (index := np.searchsorted(candidates, row)) < len(candidates):
        r0 = int(candidates[index])
        row = int(run_end[r0])
        runs.append((r0, row))
    return runs


def _run(start: np.ndarray, end: np.ndarray, r0: int, r1: int) -> list[Block]:
    k0, first, last = int(start[r0]), int(end[r0]), int(end[r1 - 1])
    if k0 >= last:
        return []
    if first == last:
        return [Block(r0, r1, (Piece(k0, last),))]
    if first == k0:  # the first row of a diagonal run sees nothing
        return _run(start, end, r0 + 1, r1)
    diagonal = Piece(first - 1, last, causal=True)
    return [Block(r0, r1, (Piece(k0, first - 1), diagonal) if first - 1 > k0 else (diagonal,))]


def _tiles(start: np.ndarray, end: np.ndarray, r0: int, r1: int) -> list[Block]:
    """Tiles of at most TILE_ROWS rows, none with an empty row."""
    empty: np.ndarray = np.flatnonzero(start[r0:r1] >= end[r0:r1]) + r0
    edges = [r0 - 1, *empty.tolist(), r1]
    return [
        block
        for above, below in itertools.pairwise(edges)
        for a, b in _cut_rows(start, end, above + 1, below)
        for block in _tile(start, end, a, b)
    ]


def _cut_rows(start: np.ndarray, end: np.ndarray, r0: int, r1: int) -> Iterator[tuple[int, int]]:
    """Tiles of [r0, r1); between documents where that leaves half a tile: fewer hidden pairs."""
    while r0 < r1:
        cut = min(r0 + TILE_ROWS, r1)
        if cut < r1:
            rows = slice(r0 + TILE_ROWS // 2, cut + 1)
            before = np.maximum.accumulate(end[r0:cut])[TILE_ROWS // 2 - 1 :]
            between = np.flatnonzero(start[rows] >= before)
            cut = rows.start + int(between[-1]) if len(between) else cut
        yield r0, cut
        r0 = cut


def _tile(start: np.ndarray, end: np.ndarray, r0: int, r1: int) -> list[Block]:
    """One tile, or its halves where it would need too large a mask."""
    rows = slice(r0, r1)
    lo, inner_lo = int(start[rows].min()), int(start[rows].max())
    inner_hi, hi = int(end[rows].min()), int(end[rows].max())

    def masked(k0: int, k1: int) -> Piece:
        return Piece(k0, k1, bounds=(start[None, rows] - k0, end[None, rows] - k0))

    if lo == inner_lo and hi == inner_hi:
        return [Block(r0, r1, (Piece(lo, hi),))]
    if inner_hi - inner_lo > TILE_KEYS // 2:
        # The ragged ends each keep one key that all rows see, so no row of theirs is without a key.
        a = inner_lo + 1 if lo < inner_lo else lo
        b = inner_hi - 1 if inner_hi < hi else hi
        pieces = [Piece(a, b)]
        if a > lo:
            pieces.append(masked(lo, a))
        if b < hi:
            pieces.append(masked(b, hi))
        if max(a - lo, hi - b) <= TILE_KEYS:
            return [Block(r0, r1, tuple(pieces))]
    elif hi - lo <= TILE_KEYS:
        return [Block(r0, r1, (masked(lo, hi),))]
    middle = (r0 + r1) // 2
    return [*_tile(start, end, r0, middle), *_tile(start, end, middle, r1)]
