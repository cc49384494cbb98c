"""Do the formulas of mmkernels.distributed.volume count what an exchange of labels would send?"""

from collections import Counter

import pytest

from mmkernels.distributed.volume import (
    Sizes,
    all_to_all_backward,
    all_to_all_forward,
    head_split,
    ring_backward,
    ring_forward,
)

FORMULAS = [ring_forward, ring_backward, all_to_all_forward, all_to_all_backward]
SHAPES = [
    (32, 8, 8),
    (9, 3, 2),
    (9, 3, 4),
    (12, 4, 6),
    (12, 4, 12),
    (7, 1, 3),
    (5, 5, 4),
    (4, 2, 1),
]


def sizes(shards=(3, 5), heads=3, kv_heads=1, **other) -> Sizes:
    return Sizes(**{
        "batch": 2, "shards": shards, "heads": heads, "kv_heads": kv_heads, "head_dim": 4,
        "value_dim": 6, "itemsize": 2, "lse": True, **other,
    })  # fmt: skip


def test_two_ranks_by_hand():
    """B 2, S 3 + 5, D 4, Dv 6, 2 bytes, 3 heads over 1: rank 0 has two heads, rank 1 one."""
    case = sizes()
    # A position has 10 elements of k and v. Rank 0 sends its own three, rank 1 its own five.
    assert ring_forward(case) == [2 * 3 * 10 * 2, 2 * 5 * 10 * 2]
    # dk and dv of all eight in float32, besides.
    assert ring_backward(case) == [120 + 2 * 8 * 10 * 4, 200 + 2 * 8 * 10 * 4]
    # Blocks of gcd(3, 0, 2) = 1 and gcd(3, 2, 1) = 1 query heads: kv heads [0, 0] and [0].
    # A position to rank 1 is 4 + 10 elements, to rank 0 8 + 20; out and lse are 6·2 + 4 a head.
    assert all_to_all_forward(case) == [2 * (3 * 28 + 5 * 2 * 16), 2 * (5 * 56 + 3 * 1 * 16)]
    assert all_to_all_backward(case) == [2 * (3 * 16 + 5 * 56), 2 * (5 * 2 * 16 + 3 * 28)]


def test_float64_sums_have_eight_bytes():
    case = sizes(itemsize=8)
    assert ring_backward(case)[0] == 2 * 3 * 10 * 8 + 2 * 8 * 10 * 8
    assert all_to_all_forward(case)[0] == 2 * (3 * 14 * 8 + 5 * 2 * (6 * 8 + 8))


@pytest.mark.parametrize("formula", FORMULAS)
def test_one_rank_sends_nothing(formula):
    assert formula(sizes(shards=(8,))) == [0]


@pytest.mark.parametrize("shards", [(4, 4), (1, 2, 3), (5, 0, 2, 1), (2,) * 7])
def test_ring_sends_what_a_ring_of_labels_does(shards):
    """Every rank passes on what it holds; in the end all had all, and sums are at home."""
    case, ranks = sizes(shards), len(shards)
    element = 2 * 10  # batch, k and v
    forward, backward, received = Counter(), Counter(), Counter()
    seen = [{rank} for rank in range(ranks)]
    holds = list(range(ranks))
    for step in range(ranks):
        for rank in range(ranks):
            after, owner = (rank + 1) % ranks, holds[rank]
            if step < ranks - 1:
                forward[rank] += shards[owner] * element * 2
                received[after] += shards[owner] * element * 2
                seen[after].add(owner)
            backward[rank] += shards[owner] * element * 4
        holds = [holds[rank - 1] for rank in range(ranks)]
    assert holds == list(range(ranks)) and all(len(owners) == ranks for owners in seen)
    assert ring_forward(case) == [forward[rank] for rank in range(ranks)]
    assert ring_backward(case) == [forward[rank] + backward[rank] for rank in range(ranks)]
    assert sum(ring_forward(case)) == sum(received.values())


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SHAPES)
def test_all_to_all_sends_what_an_exchange_of_labels_does(heads, kv_heads, ranks):
    """Of each element that a rank needs and another holds: who sends it, and who receives it."""
    shards = tuple(range(1, ranks + 1))
    case = sizes(shards, heads, kv_heads, batch=1)
    needs = [
        4 * share.heads + 10 * len(share.kv_heads) for share in head_split(heads, kv_heads, ranks)
    ]
    makes = [share.heads * (6 * 2 + 4) for share in head_split(heads, kv_heads, ranks)]
    forward, backward, received = Counter(), Counter(), Counter()
    for source in range(ranks):
        for target in set(range(ranks)) - {source}:
            q_k_v = shards[source] * needs[target] * 2
            out_lse = shards[target] * makes[source]
            forward[source] += q_k_v + out_lse
            received[target] += q_k_v + out_lse
            # Gradients of the same tensors take the same ways back.
            backward[target] += q_k_v + out_lse
    assert all_to_all_forward(case) == [forward[rank] for rank in range(ranks)]
    assert all_to_all_backward(case) == [backward[rank] for rank in range(ranks)]
    assert sum(all_to_all_forward(case)) == sum(received.values())
    assert sum(all_to_all_forward(case)) == sum(all_to_all_backward(case))


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SHAPES)
def test_every_query_head_has_one_rank_and_its_own_kv_head(heads, kv_heads, ranks):
    shares = head_split(heads, kv_heads, ranks)
    covered = [head for share in shares for head in range(share.first, share.first + share.heads)]
    assert covered == list(range(heads))
    counts = [share.heads for share in shares]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    for first, count, kv in shares:
        assert count % len(kv) == 0
        for local in range(count):
            block = count // len(kv)
            assert kv[local // block] == (first + local) // (heads // kv_heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "kv"),
    [
        (32, 8, 8, [[rank] for rank in range(8)]),
        (32, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (32, 8, 16, [[rank // 2] for rank in range(16)]),
        (9, 3, 2, [[0, 0, 0, 1, 1], [1, 2, 2, 2]]),
        (9, 3, 4, [[0], [1, 1], [1, 2], [2, 2]]),
        (12, 4, 6, [[0, 0], [0, 1], [1, 1], [2, 2], [2, 3], [3, 3]]),
        (8, 1, 4, [[0]] * 4),
    ],
)
def test_kv_heads_by_hand(heads, kv_heads, ranks, kv):
    assert [share.kv_heads for share in head_split(heads, kv_heads, ranks)] == kv


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    "more", [{"batch": 3}, {"shards": (4, 5)}, {"value_dim": 7}, {"itemsize": 4}]
)
def test_more_of_anything_sends_more(formula, more):
    for less, now in zip(formula(sizes()), formula(sizes(**more)), strict=True):
        assert now >= less
    assert sum(formula(sizes(**more))) > sum(formula(sizes()))


def test_a_longer_sequence_sends_more_in_proportion():
    for formula in FORMULAS:
        assert formula(sizes(shards=(30, 50))) == [10 * sent for sent in formula(sizes())]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: sizes(batch=0), "batch is 0; it must be at least 1"),
        (lambda: sizes(shards=()), "one number a rank"),
        (lambda: sizes(shards=(3, -1)), r"shards is \(3, -1\)"),
        (lambda: sizes(heads=3, kv_heads=2), "heads is 3 and kv_heads is 2"),
        (lambda: head_split(4, 0, 1), "kv_heads is 0"),
        (lambda: head_split(4, 2, 5), "ranks is 5.*use 1 to 4 ranks, or ring"),
        (lambda: all_to_all_forward(sizes(shards=(1,) * 4)), "ranks is 4"),
    ],
)
def test_what_is_no_call_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
