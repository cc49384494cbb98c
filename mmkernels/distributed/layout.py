"""Which positions of a sequence each process holds.

Whatever the layout, each process holds its positions in ascending order. That is all that interval
attention needs: the keys of one run that a process holds are a run of its own, so the mask between
any two processes is an interval mask, and the kernels know nothing of the layout.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mmkernels.attention.interval import IntervalMask
from mmkernels.attention.masks import is_int


class Layout:
    """The positions that each process of a sequence-parallel group holds.

    Args:
        positions: for each rank its positions, ascending; together all of 0 .. seqlen - 1, each
            once. Ranks may hold unequal numbers, or none.

    Attributes:
        seqlen: length of the whole sequence.
        lengths: positions of each rank.

    Raises:
        TypeError: positions are no integers.
        ValueError: a position is missing, there twice, or out of order.
    """

    def __init__(self, positions: Sequence[Tensor]) -> None:
        self._positions = [torch.as_tensor(x) for x in positions]
        if not self._positions:
            raise ValueError("Layout: positions is empty; give a tensor for each rank")
        for rank, held in enumerate(self._positions):
            if held.dtype not in (torch.int32, torch.int64) or held.ndim != 1:
                raise TypeError(
                    f"Layout: positions[{rank}] is {held.dtype} of shape {tuple(held.shape)}; it "
                    "must be (S_r,) int64"
                )
            if (held.diff() <= 0).any():
                raise ValueError(
                    f"Layout: positions[{rank}] is not ascending; sort it, for only then the keys "
                    "of an interval stay one interval"
                )
        self._positions = [x.to("cpu", torch.int64).contiguous() for x in self._positions]
        everything = torch.cat(self._positions)
        self.seqlen = len(everything)
        self.lengths = [len(x) for x in self._positions]
        # Where in the concatenation of all shards each position lies.
        self._places = everything.argsort()
        if not torch.equal(everything[self._places], torch.arange(self.seqlen)):
            raise ValueError(
                f"Layout: positions must hold each of 0 .. {self.seqlen - 1} once; some are "
                "missing or there twice"
            )
        self._in_order = torch.equal(self._places, torch.arange(self.seqlen))
        self._on_device: dict[tuple, Tensor] = {}

    @classmethod
    def contiguous(cls, lengths: Sequence[int]) -> "Layout":
        """Rank r holds the lengths[r] positions after those of the ranks before it."""
        _check_lengths(lengths)
        ends = list(accumulate(lengths))
        return cls(
            [torch.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)],
        )

    @classmethod
    def zigzag(cls, seqlen: int, ranks: int) -> "Layout":
        """Of 2 ranks chunks rank r holds the r-th from the front and the r-th from the back.

        Under a causal mask all ranks have about the same work in every step of a ring.

        Args:
            seqlen: length of the whole sequence.
            ranks: number of processes.

        Source: Zhu, "ring-flash-attention", 2024; Llama Team, "The Llama 3 Herd of Models", 2024.
        """
        _check_count("ranks", ranks)
        chunks = _chunks(seqlen, 2 * ranks)
        return cls([torch.cat((chunks[r], chunks[2 * ranks - 1 - r])) for r in range(ranks)])

    @classmethod
    def balanced(cls, mask: IntervalMask, ranks: int, chunks_per_rank: int = 8) -> "Layout":
        """As many chunks for each rank, and about as many visible keys, whatever the mask.

        The chunk with most keys goes first, each to the rank with the fewest keys so far that has
        room for a chunk. Reads the mask, so it synchronises a GPU.

        Args:
            mask: (1 or B, S) rows over the same S keys.
            ranks: number of processes.
            chunks_per_rank: more of them balance better, and make shorter runs of rows.

        Source: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, for the greedy rule.
        """
        _check_count("ranks", ranks)
        if not isinstance(mask, IntervalMask):
            raise TypeError(f"Layout.balanced: mask is {type(mask).__name__}, not an IntervalMask")
        if mask.seqlen_k not in (None, mask.shape[1]):
            raise ValueError(
                f"Layout.balanced: mask has {mask.shape[1]} rows over {mask.seqlen_k} keys; it "
                "must be over the rows' own sequence"
            )
        _check_count("chunks_per_rank", chunks_per_rank)
        keys = (mask.end - mask.start).double().sum(0).cpu()
        chunks = _chunks(mask.shape[1], ranks * chunks_per_rank)
        costs = [float(keys[chunk].sum()) for chunk in chunks]
        held: list[list[int]] = [[] for _ in range(ranks)]
        work = [0.0] * ranks
        for chunk in sorted(range(len(chunks)), key=lambda i: -costs[i]):
            free = [r for r in range(ranks) if len(held[r]) < chunks_per_rank]
            rank = min(free, key=lambda r: work[r])
            held[rank].append(chunk)
            work[rank] += costs[chunk]
        return cls([torch.cat([chunks[i] for i in sorted(mine)]) for mine in held])

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Layout(lengths={self.lengths})"

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The positions of a rank: (S_r,) int64, ascending, on a device.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise ValueError(
                f"Layout: rank is {rank}; it must lie in [0, {self.ranks}), e.g. "
                "mesh.get_local_rank() of the mesh over which the sequence is spread"
            )
        return self._moved(("positions", rank), self._positions[rank], device)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's part of a tensor over the whole sequence.

        Args:
            x: seqlen long in `dim`.
            rank: whose part, e.g. mesh.get_local_rank().
            dim: the sequence's dimension.

        Raises:
            ValueError: x is of another length, or there is no such rank.
        """
        if x.shape[dim] != self.seqlen:
            raise ValueError(
                f"shard: x has shape {tuple(x.shape)}; dimension {dim} must be the sequence's "
                f"{self.seqlen} positions"
            )
        return x.index_select(dim, self.positions(rank, x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The tensor over the whole sequence, from the parts of all ranks.

        Args:
            parts: of each rank in its order.
            dim: the sequence's dimension.

        Raises:
            ValueError: the parts are of other lengths.
        """
        lengths = [x.shape[dim] for x in parts]
        if lengths != self.lengths:
            raise ValueError(f"unshard: the parts have lengths {lengths}, not {self.lengths}")
        x = torch.cat(list(parts), dim)
        if self._in_order:
            return x
        return x.index_select(dim, self._moved(("places",), self._places, x.device))

    def mask_between(self, mask: IntervalMask, rank: int, other: int) -> IntervalMask:
        """What a rank's rows see of the keys that another one holds.

        Args:
            mask: (1 or B, seqlen) rows over seqlen keys.
            rank: whose rows.
            other: whose keys.

        Returns:
            A mask of lengths[rank] rows over lengths[other] keys.
        """
        rows, keys = self.positions(rank, mask.device), self.positions(other, mask.device)
        start, end = (
            torch.searchsorted(keys, bound.index_select(1, rows).long(), out_int32=True)
            for bound in (mask.start, mask.end)
        )
        empty = start >= end
        return IntervalMask._of(
            start.masked_fill(empty, 0), end.masked_fill(empty, 0), self.lengths[other]
        )

    def visible_pairs(self, mask: IntervalMask) -> Tensor:
        """(ranks, ranks) int64: (row, key) pairs of `mask` between the ranks, rows first."""
        return torch.tensor(
            [
                [
                    int((piece.end - piece.start).sum())
                    for piece in (self.mask_between(mask, r, other) for other in range(self.ranks))
                ]
                for r in range(self.ranks)
            ]
        )

    def _moved(self, key: tuple, x: Tensor, device: torch.device | str) -> Tensor:
        device = torch.device(device)
        if device.type == "cpu":
            return x
        place = (*key, device)
        if place not in self._on_device:
            self._on_device[place] = x.to(device)
        return self._on_device[place]


def _chunks(seqlen: int, count: int) -> list[Tensor]:
    """`count` runs of positions, as even as can be."""
    if not is_int(seqlen) or seqlen < 0:
        raise ValueError(f"Layout: seqlen is {seqlen!r}; it must be an int >= 0")
    edges = [seqlen * i // count for i in range(count + 1)]
    return [torch.arange(a, b) for a, b in pairwise(edges)]


def _check_count(name: str, count: int) -> None:
    if not is_int(count) or count < 1:
        raise ValueError(f"Layout: {name} is {count!r}; it must be an int >= 1")


def _check_lengths(lengths: Sequence[int]) -> None:
    if any(not is_int(n) or n < 0 for n in lengths):
        raise ValueError(f"Layout: lengths is {lengths!r}; it must hold an int >= 0 for each rank")
