"""The transposed ranges that kernels read off a mask, against a look at every cell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask


@st.composite
def random_masks(draw: st.DrawFn) -> IntervalMask:
    """Up to 3 batch elements of up to 12 rows over up to 12 keys, many rows empty."""
    batch, seqlen_q, seqlen_k = draw(st.tuples(*(st.integers(1, 12) for _ in range(3))))
    batch = min(batch, 3)
    bound = st.integers(0, seqlen_k)
    rows = st.lists(st.tuples(bound, bound), min_size=seqlen_q, max_size=seqlen_q)
    pairs = [[sorted(pair) for pair in draw(rows)] for _ in range(batch)]
    bounds = torch.tensor(pairs, dtype=torch.int64).view(batch, seqlen_q, 2)
    return IntervalMask(bounds[..., 0], bounds[..., 1], seqlen_k)


def hull(flags: Tensor) -> tuple[int, int]:
    """First index and one past the last where `flags` is True; (0, 0) where it never is."""
    places = flags.nonzero().flatten().tolist()
    return (places[0], places[-1] + 1) if places else (0, 0)


@given(random_masks())
def test_do_key_rows_hold_the_first_and_last_row_that_see_a_key(mask):
    shown = mask.to_dense()
    row_start, row_end = mask.key_rows()
    assert row_start.dtype == row_end.dtype == torch.int32
    assert row_start.shape == row_end.shape == (shown.shape[0], shown.shape[2])
    for batch, rows in enumerate(shown):
        for key in range(shown.shape[2]):
            got = (int(row_start[batch, key]), int(row_end[batch, key]))
            assert got == hull(rows[:, key])


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(700, 1000),
        masks.causal(1000, 700),
        masks.window(900, 900, window_size=(130, 5)),
        masks.prefix_lm(torch.tensor([0, 300, 777]), 777),
        masks.packed(torch.tensor([0, 1, 1, 256, 600]), torch.tensor([0, 4, 5, 5, 900])),
        masks.causal(500) | masks.spans(torch.arange(500) // 60),
    ],
    ids=["causal", "more_rows", "window", "prefix_lm", "packed", "spans"],
)
def test_key_rows_of_long_masks(mask):
    shown = mask.to_dense()
    seen = shown.any(1)
    row_start, row_end = mask.key_rows()
    first = shown.int().argmax(1)
    last = shown.shape[1] - shown.flip(1).int().argmax(1)
    assert torch.equal(row_start, torch.where(seen, first, 0).int())
    assert torch.equal(row_end, torch.where(seen, last, 0).int())


def test_a_mask_that_does_not_know_its_number_of_keys_is_told():
    known = masks.causal(5, 7)
    unknown = IntervalMask(known.start, known.end)
    assert all(map(torch.equal, unknown.key_rows(7), known.key_rows()))
    with pytest.raises(ValueError, match="pass seqlen_k"):
        unknown.key_rows()


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_rows_or_no_keys(seqlen_q, seqlen_k, batch):
    mask = masks.padding(torch.zeros(batch, dtype=torch.int32), seqlen_q, seqlen_k)
    assert all(not rows.any() and rows.shape == (batch, seqlen_k) for rows in mask.key_rows())
