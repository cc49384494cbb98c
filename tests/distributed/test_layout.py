"""Does a layout hold every position once, cut masks, balance work, and refuse what is none?"""

import pytest
import torch

from mmkernels import masks, testing
from mmkernels.distributed import Layout
from mmkernels.distributed.ring import pieces

LAYOUTS = {
    "contiguous": lambda s, r: Layout.contiguous([s // r + (i < s % r) for i in range(r)]),
    "zigzag": Layout.zigzag,
    "balanced": lambda s, r: Layout.balanced(masks.causal(s), r),
    "scattered": lambda s, r: Layout([torch.arange(s)[i::r] for i in range(r)]),
    "one has none": lambda s, r: Layout([torch.arange(s), *[torch.arange(0)] * (r - 1)]),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("seqlen, ranks", [(0, 2), (1, 3), (37, 4), (64, 1)])
def test_shards_are_the_whole(make, seqlen, ranks):
    layout = make(seqlen, ranks)
    assert sum(layout.lengths) == layout.seqlen == seqlen and layout.ranks == ranks
    x = torch.randn(2, seqlen, 3)
    assert torch.equal(layout.unshard([layout.shard(x, r) for r in range(ranks)]), x)
    last = x.transpose(1, 2)
    parts = [layout.shard(last, r, dim=-1) for r in range(ranks)]
    assert torch.equal(layout.unshard(parts, dim=-1), last)


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [kind for kind in testing.MASKS if kind != "none"])
def test_masks_between_ranks_are_parts_of_the_dense_mask(make, kind):
    seqlen, ranks = 41, 3
    layout, mask = make(seqlen, ranks), testing.MASKS[kind](2, seqlen, seqlen)
    dense = mask.to_dense(seqlen)
    pairs = layout.visible_pairs(mask)
    for rank in range(ranks):
        for other in range(ranks):
            rows = dense[:, layout.positions(rank)]
            expected = rows[:, :, layout.positions(other)]
            assert torch.equal(layout.mask_between(mask, rank, other).to_dense(), expected)
            assert pairs[rank, other] == expected.sum()


def test_pieces_are_made_once_and_anew_when_bounds_change():
    mask, layout = masks.causal(16) & masks.full(16), Layout.zigzag(16, 2)
    first = pieces(mask, layout, 0)
    assert pieces(mask, layout, 0) is first
    assert pieces(mask, layout, 1) is not first
    again = pieces(mask, layout, 0)
    mask.end[0, 0] = 16
    changed = pieces(mask, layout, 0)
    assert changed is not again and changed[1].end[0, 0] == layout.lengths[1]


def test_zigzag_is_even_in_every_step_under_a_causal_mask():
    pairs = Layout.zigzag(4096, 8).visible_pairs(masks.causal(4096)).double()
    assert pairs.sum(1).max() / pairs.sum(1).mean() < 1.001
    for step in range(8):
        work = torch.stack([pairs[rank, (rank - step) % 8] for rank in range(8)])
        assert work.max() / work.mean() < 1.01


@pytest.mark.parametrize("kind", ["documents", "prefix-LM", "image spans", "causal"])
def test_balanced_is_even_for_every_mask(kind):
    mask = testing.MASKS[kind](1, 4096, 4096)

    def unevenness(layout):
        work = layout.visible_pairs(mask).sum(1).double()
        return float(work.max() / work.mean())

    balanced = Layout.balanced(mask, 8)
    assert balanced.lengths == [512] * 8
    assert unevenness(balanced) < 1.04
    assert unevenness(balanced) <= unevenness(Layout.zigzag(4096, 8)) + 0.02
    assert unevenness(Layout.contiguous([512] * 8)) > 1.2


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Layout([]), ValueError, "a tensor for each rank"),
        (lambda: Layout([torch.tensor([0.0])]), TypeError, r"positions\[0\] is torch.float32"),
        (lambda: Layout([torch.tensor([1, 0])]), ValueError, "not ascending; sort it"),
        (lambda: Layout([torch.tensor([0, 2])]), ValueError, "each of 0 .. 1 once"),
        (lambda: Layout([torch.tensor([0]), torch.tensor([0])]), ValueError, "there twice"),
        (lambda: Layout.contiguous([2, -1]), ValueError, "lengths is"),
        (lambda: Layout.zigzag(8, 0), ValueError, "ranks is 0"),
        (lambda: Layout.zigzag(-1, 2), ValueError, "seqlen is -1"),
        (lambda: Layout.zigzag(8.0, 2), ValueError, "seqlen is 8.0"),
        (lambda: Layout.zigzag(8, True), ValueError, "ranks is True"),
        (lambda: Layout.balanced(masks.full(8), 2, 0), ValueError, "chunks_per_rank is 0"),
        (lambda: Layout.balanced(masks.full(8, 9), 2), ValueError, "8 rows over 9 keys"),
        (lambda: Layout.zigzag(8, 2).shard(torch.ones(1, 8), 2), ValueError, "get_local_rank"),
        (lambda: Layout.zigzag(8, 2).shard(torch.ones(1, 8), -1), ValueError, "rank is -1"),
        (lambda: Layout.balanced(torch.ones(2, 2), 2), TypeError, "not an IntervalMask"),
        (lambda: Layout.zigzag(8, 2).shard(torch.ones(1, 7), 0), ValueError, "8 positions"),
        (lambda: Layout.zigzag(8, 2).unshard([torch.ones(1, 8)]), ValueError, r"not \[4, 4\]"),
    ],
)
def test_what_is_no_layout_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
