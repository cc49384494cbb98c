"""How evenly masks spread over ranks. Counted, not measured.

A mask is an interval of keys for each row. Positions are cut into twice as many chunks as there are
ranks, of which each rank holds two.
"""

from collections.abc import Callable

Interval = tuple[int, int]

LAYOUTS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "contiguous": lambda rank, ranks: (2 * rank, 2 * rank + 1),
    "zigzag": lambda rank, ranks: (rank, 2 * ranks - 1 - rank),
}


def causal(length: int) -> list[Interval]:
    """Each row sees itself and what is before it."""
    return [(0, row + 1) for row in range(length)]


def images_in_text(length: int) -> list[Interval]:
    """Causal, but an image whole: 3 of 4 positions, in 16 images of one size."""
    period = length // 16
    ends = (row - row % period + period for row in range(length))
    return [
        (0, end if row % period >= period // 4 else row + 1)
        for row, end in zip(range(length), ends, strict=True)
    ]


def image_first(length: int) -> list[Interval]:
    """A prefix of a quarter, whole, and causal text after it."""
    return [(0, max(length // 4, row + 1)) for row in range(length)]


def documents(length: int) -> list[Interval]:
    """Packed causal documents, each half as long as the one before it, down to a sixteenth."""
    starts = [0, length // 2, 3 * length // 4, 7 * length // 8, 15 * length // 16]
    return [(max(start for start in starts if start <= row), row + 1) for row in range(length)]


MASKS: dict[str, Callable[[int], list[Interval]]] = {
    "causal": causal,
    "causal, 16 images of 3/4 of all positions whole": images_in_text,
    "prefix-LM, prefix S/4": image_first,
    "packed documents of S/2, S/4, S/8, S/16, S/16": documents,
}


def pairs(mask: list[Interval], layout: str, ranks: int) -> list[list[int]]:
    """Visible pairs of each rank's rows (first index) with each rank's keys (second).

    Raises:
        ValueError: the rows do not divide into two chunks a rank.
    """
    size, rest = divmod(len(mask), 2 * ranks)
    if rest:
        raise ValueError(
            f"pairs: mask has {len(mask)} rows; {ranks} ranks need a multiple of {2 * ranks}"
        )
    holder = {chunk: rank for rank in range(ranks) for chunk in LAYOUTS[layout](rank, ranks)}
    found = [[0] * ranks for _ in range(ranks)]
    for row, (start, end) in enumerate(mask):
        for chunk in range(start // size, -(-end // size)):
            seen = min(end, (chunk + 1) * size) - max(start, chunk * size)
            found[holder[row // size]][holder[chunk]] += seen
    return found


def slowest(work: list[list[int]]) -> float:
    """Pairs of the rank that has most, over the mean."""
    return max(map(sum, work)) * len(work) / sum(map(sum, work))


def in_step(work: list[list[int]]) -> float:
    """Pairs of the busiest rank in each step of the ring, summed, over a rank's mean.

    As if every step waited for the slowest rank: the other bound of a ring's time.
    """
    ranks = len(work)
    steps = (max(work[rank][rank - step] for rank in range(ranks)) for step in range(ranks))
    return sum(steps) * ranks / sum(map(sum, work))
