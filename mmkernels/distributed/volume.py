"""Bytes that each rank sends in one attention call whose sequence lies on several ranks.

Rank r of P holds S_r of S positions. A position has Hq·D elements of q, Hkv·(D + Dv) of k and v and
Hq·Dv of out, in B sequences. Sums that cross ranks are kept in float32, in float64 for float64.

`ring`: k and v travel from rank r to rank r + 1 until every rank had them all. In the backward pass
dk and dv travel along, and one step further, to the rank that they belong to.

`all_to_all`: every rank gets all positions of some query heads, and of the kv heads that they read;
out, and lse where it is wanted, return. The backward pass sends the gradients of what came, the
other way.

These are plain formulas, without torch. The tests hold them against what is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import gcd
from typing import NamedTuple

__all__ = [
    "HeadShare",
    "Sizes",
    "all_to_all_backward",
    "all_to_all_forward",
    "head_split",
    "ring_backward",
    "ring_forward",
]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one attention call, over all ranks.

    Attributes:
        batch: sequences, B.
        shards: positions that each rank holds, S_r; a rank may hold none.
        heads: query heads, Hq.
        kv_heads: heads of k and v, Hkv, a divisor of the query heads.
        head_dim: width of a head of q and k, D.
        value_dim: width of a head of v and out, Dv.
        itemsize: bytes of an element of q, k, v and out: 2 for bfloat16.
        lse: whether the call returns lse, which `all_to_all` then sends back, too.

    Raises:
        ValueError: a size is not positive, a shard is negative, there is no shard, or the query
            heads are no multiple of the kv heads.
    """

    batch: int
    shards: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    lse: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes of no call."""
        for field in fields(self):
            if field.name not in ("shards", "lse") and getattr(self, field.name) < 1:
                raise ValueError(
                    f"Sizes: {field.name} is {getattr(self, field.name)}; it must be at least 1"
                )
        if not self.shards or min(self.shards) < 0:
            raise ValueError(
                f"Sizes: shards is {self.shards}; it must hold one number a rank, none negative"
            )
        _check_heads("Sizes", self.heads, self.kv_heads)

    @property
    def ranks(self) -> int:
        """Number of ranks, P."""
        return len(self.shards)

    @property
    def positions(self) -> int:
        """Positions of all ranks, S."""
        return sum(self.shards)

    @property
    def kv_elements(self) -> int:
        """Elements of k and v at one position of one sequence."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def sum_itemsize(self) -> int:
        """Bytes of an element of lse, and of dk and dv on their way."""
        return max(4, self.itemsize)


class HeadShare(NamedTuple):
    """What one rank computes under `all_to_all`.

    Attributes:
        first: its first query head.
        heads: how many query heads it has, from there on.
        kv_heads: the kv head of each of its blocks of ``heads // len(kv_heads)`` query heads. A kv
            head that several blocks read is there as often.
    """

    first: int
    heads: int
    kv_heads: list[int]


def head_split(heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Query heads and kv heads of each rank, as even as possible.

    The first ``heads % ranks`` ranks have one query head more. On every rank the query heads read
    its kv heads in blocks of one length, so that its share is a grouped attention of its own. A
    block is as long as the group, the rank's first head and its number of heads allow: their gcd.

    Args:
        heads: query heads.
        kv_heads: heads of k and v, a divisor of `heads`.
        ranks: at most `heads`.

    Returns:
        The share of each rank, in order.

    Raises:
        ValueError: `heads` is no multiple of `kv_heads`, or `ranks` is not in 1 to `heads`.
    """
    _check_heads("head_split", heads, kv_heads)
    if not 1 <= ranks <= heads:
        raise ValueError(
            f"head_split: ranks is {ranks}; all_to_all gives each rank a query head of its own, "
            f"and there are {heads}: use 1 to {heads} ranks, or ring"
        )
    group = heads // kv_heads
    shares, first = [], 0
    for rank in range(ranks):
        count = heads // ranks + (rank < heads % ranks)
        block = gcd(group, first, count)
        kv = [head // group for head in range(first, first + count, block)]
        shares.append(HeadShare(first, count, kv))
        first += count
    return shares


def ring_forward(sizes: Sizes) -> list[int]:
    """Bytes that each rank sends in the forward pass of `ring`.

    Every rank passes on all k and v but those of the rank after it, where they began.

    Args:
        sizes: of the call.

    Returns:
        Bytes, by rank.
    """
    element = sizes.batch * sizes.kv_elements * sizes.itemsize
    after = [*sizes.shards[1:], sizes.shards[0]]
    return [(sizes.positions - shard) * element for shard in after]


def ring_backward(sizes: Sizes) -> list[int]:
    """Bytes that each rank sends in the backward pass of `ring`.

    k and v once more, and dk and dv of every rank, the last time home.

    Args:
        sizes: of the call.

    Returns:
        Bytes, by rank.
    """
    if sizes.ranks == 1:
        return [0]
    sums = sizes.batch * sizes.positions * sizes.kv_elements * sizes.sum_itemsize
    return [inputs + sums for inputs in ring_forward(sizes)]


def all_to_all_forward(sizes: Sizes) -> list[int]:
    """Bytes that each rank sends in the forward pass of `all_to_all`.

    Args:
        sizes: of the call.

    Returns:
        Bytes, by rank.

    Raises:
        ValueError: there are more ranks than query heads.
    """
    return _there_and_back(sizes, _inputs, _outputs)


def all_to_all_backward(sizes: Sizes) -> list[int]:
    """Bytes that each rank sends in the backward pass of `all_to_all`.

    dout and dlse go where out and lse came from; dq, dk and dv return, in the dtype of q.

    Args:
        sizes: of the call.

    Returns:
        Bytes, by rank.

    Raises:
        ValueError: there are more ranks than query heads.
    """
    return _there_and_back(sizes, _outputs, _inputs)


_Bytes = Callable[[Sizes, HeadShare], int]


def _inputs(sizes: Sizes, share: HeadShare) -> int:
    """Bytes of a rank's q, k and v, or of their gradients, at one position of one sequence."""
    kv = len(share.kv_heads) * (sizes.head_dim + sizes.value_dim)
    return (share.heads * sizes.head_dim + kv) * sizes.itemsize


def _outputs(sizes: Sizes, share: HeadShare) -> int:
    """Bytes of a rank's out and lse, or of their gradients, at one position of one sequence."""
    lse = sizes.sum_itemsize if sizes.lse else 0
    return share.heads * (sizes.value_dim * sizes.itemsize + lse)


def _there_and_back(sizes: Sizes, there: _Bytes, back: _Bytes) -> list[int]:
    """Bytes by rank, `there` before attention to each share's rank, `back` from it afterwards."""
    shares = head_split(sizes.heads, sizes.kv_heads, sizes.ranks)
    everyone = sum(there(sizes, share) for share in shares)
    return [
        sizes.batch
        * (
            shard * (everyone - there(sizes, share))
            + (sizes.positions - shard) * back(sizes, share)
        )
        for shard, share in zip(sizes.shards, shares, strict=True)
    ]


def _check_heads(where: str, heads: int, kv_heads: int) -> None:
    """Raises ValueError unless query heads divide evenly over kv heads."""
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{where}: heads is {heads} and kv_heads is {kv_heads}; heads must be a positive "
            "multiple of kv_heads"
        )
