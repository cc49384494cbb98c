"""Interval masks: every builder, their algebra and dense form, against masks made key by key."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import mmkernels as mm
from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask

SIZES = st.integers(0, 9)
WINDOWS = st.tuples(st.integers(-1, 10), st.integers(-1, 10))


def dense(seqlen_q: int, seqlen_k: int, sees: Callable[[int, int], bool]) -> Tensor:
    """(Sq, Sk) bool from a rule."""
    rows = [[bool(sees(i, j)) for j in range(seqlen_k)] for i in range(seqlen_q)]
    return torch.tensor(rows, dtype=torch.bool).view(seqlen_q, seqlen_k)


def within(offset: int, window_size: tuple[int, int]) -> bool:
    """Is a key `offset` to the right of the row's own position in the window."""
    left, right = window_size
    return (left < 0 or offset >= -left) and (right < 0 or offset <= right)


def assert_mask(mask: IntervalMask, expected: Tensor) -> None:
    """The mask shows what `expected` ((Sq, Sk) or (B, Sq, Sk)) does, in normal form."""
    expected = expected if expected.ndim == 3 else expected[None]
    seqlen_k = expected.shape[2]
    assert mask.seqlen_k == seqlen_k
    assert mask.shape == expected.shape[:2]
    assert mask.start.dtype == mask.end.dtype == torch.int32
    for bound in (mask.start, mask.end):
        assert ((bound >= 0) & (bound <= seqlen_k)).all()
    empty = mask.start >= mask.end
    assert (mask.start[empty] == 0).all() and (mask.end[empty] == 0).all()
    keys = torch.arange(seqlen_k)
    shown = (keys >= mask.start[..., None]) & (keys < mask.end[..., None])
    assert torch.equal(shown, expected)
    assert torch.equal(mask.to_dense(), expected)


@st.composite
def random_masks(
    draw: st.DrawFn, seqlen_q: int, seqlen_k: int, batches: tuple[int, ...] = (1, 2)
) -> IntervalMask:
    """Random intervals, many of them empty, for (1 or more, Sq) rows."""
    batch = draw(st.sampled_from(batches))
    bound = st.integers(0, seqlen_k)
    rows = st.lists(st.tuples(bound, bound), min_size=seqlen_q, max_size=seqlen_q)
    pairs = [[sorted(pair) for pair in draw(rows)] for _ in range(batch)]
    bounds = torch.tensor(pairs, dtype=torch.int64).view(batch, seqlen_q, 2)
    return IntervalMask(bounds[..., 0], bounds[..., 1], seqlen_k)


@st.composite
def pairs_of_masks(draw: st.DrawFn) -> tuple[IntervalMask, IntervalMask]:
    seqlen_q, seqlen_k = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    return draw(random_masks(seqlen_q, seqlen_k)), draw(random_masks(seqlen_q, seqlen_k))


@st.composite
def span_ids(draw: st.DrawFn) -> list[int]:
    """Runs of ids, each id in one run; negative ids are in no span."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=5))
    ids = draw(st.permutations(range(10)))
    runs = [draw(st.sampled_from([ids[n], -1, -1 - n])) for n in range(len(lengths))]
    return [run for run, length in zip(runs, lengths, strict=True) for _ in range(length)]


def dense_spans(ids: list[int]) -> Tensor:
    return dense(len(ids), len(ids), lambda i, j: i == j or (ids[i] == ids[j] and ids[i] >= 0))


# Builders


@given(SIZES, SIZES)
def test_full_shows_every_key_to_every_row(seqlen_q, seqlen_k):
    assert_mask(masks.full(seqlen_q, seqlen_k), torch.ones(seqlen_q, seqlen_k, dtype=torch.bool))


@given(SIZES, SIZES)
def test_causal_aligns_the_last_row_with_the_last_key(seqlen_q, seqlen_k):
    expected = dense(seqlen_q, seqlen_k, lambda i, j: j <= i + seqlen_k - seqlen_q)
    assert_mask(masks.causal(seqlen_q, seqlen_k), expected)


@given(SIZES, SIZES, WINDOWS)
def test_window_counts_keys_to_the_left_and_right(seqlen_q, seqlen_k, window_size):
    expected = dense(
        seqlen_q, seqlen_k, lambda i, j: within(j - (i + seqlen_k - seqlen_q), window_size)
    )
    assert_mask(masks.window(seqlen_q, seqlen_k, window_size=window_size), expected)


@given(SIZES, SIZES)
def test_top_left_aligns_the_first_row_with_the_first_key(seqlen_q, seqlen_k):
    expected = dense(seqlen_q, seqlen_k, lambda i, j: j <= i)
    assert_mask(masks.top_left(seqlen_q, seqlen_k), expected)


@pytest.mark.parametrize("builder", [masks.full, masks.causal])
def test_as_many_keys_as_rows_unless_told(builder):
    assert_mask(builder(5), builder(5, 5).to_dense())
    assert builder(5).seqlen_k == 5


@given(SIZES, SIZES, st.data(), st.sampled_from(["left", "right"]))
def test_padding_hides_the_padded_side(seqlen_q, seqlen_k, data, side):
    lengths = data.draw(st.lists(st.integers(0, seqlen_k), min_size=1, max_size=3))
    first = [0 if side == "right" else seqlen_k - length for length in lengths]
    expected = torch.stack(
        [
            dense(seqlen_q, seqlen_k, lambda i, j, a=a, n=n: a <= j < a + n)
            for a, n in zip(first, lengths, strict=True)
        ]
    )
    assert_mask(masks.padding(torch.tensor(lengths), seqlen_q, seqlen_k, side=side), expected)


def test_padding_of_an_empty_batch():
    assert masks.padding(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Lengths of the queries and of the keys, some 0, and unused rows and keys at the end."""
    sequences = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4))
    unused = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    return [n for n, _ in sequences], [n for _, n in sequences], *unused


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


@given(packings(), st.booleans(), WINDOWS)
def test_packed_sequences_see_only_themselves(packing, causal, window_size):
    len_q, len_k, unused_q, unused_k = packing
    total_q, total_k = sum(len_q) + unused_q, sum(len_k) + unused_k
    expected = torch.zeros(total_q, total_k, dtype=torch.bool)
    q0 = k0 = 0
    for nq, nk in zip(len_q, len_k, strict=True):
        for i in range(nq):
            for j in range(nk):
                offset = j - (i + nk - nq)
                seen = within(offset, window_size) and not (causal and offset > 0)
                expected[q0 + i, k0 + j] = seen
        q0, k0 = q0 + nq, k0 + nk
    mask = masks.packed(
        cumulative(len_q).int(), cumulative(len_k), causal=causal, window_size=window_size,
        total_q=total_q, total_k=total_k,
    )  # fmt: skip
    assert_mask(mask, expected)


@given(st.lists(st.integers(0, 4), max_size=4))
def test_packed_keys_default_to_the_packing_of_the_queries(lengths):
    owner = [n for n, length in enumerate(lengths) for _ in range(length)]
    expected = dense(len(owner), len(owner), lambda i, j: owner[i] == owner[j])
    assert_mask(masks.packed(cumulative(lengths)), expected)


@given(SIZES, SIZES, st.data())
def test_prefix_lm_is_causal_but_for_the_prefix(seqlen_q, seqlen_k, data):
    prefixes = data.draw(st.lists(st.integers(0, seqlen_k), min_size=1, max_size=3))
    diagonal = seqlen_k - seqlen_q
    expected = torch.stack(
        [dense(seqlen_q, seqlen_k, lambda i, j, p=p: j < p or j <= i + diagonal) for p in prefixes]
    )
    assert_mask(masks.prefix_lm(torch.tensor(prefixes), seqlen_q, seqlen_k), expected)
    assert_mask(masks.prefix_lm(prefixes[0], seqlen_q, seqlen_k), expected[0])


@given(span_ids())
def test_a_row_sees_its_span_or_itself(ids):
    assert_mask(masks.spans(torch.tensor(ids, dtype=torch.int64)), dense_spans(ids))


def test_spans_of_a_batch_are_independent():
    ids = [[0, 0, -1, 1], [-1, 2, 2, 0]]
    expected = torch.stack([dense_spans(row) for row in ids])
    assert_mask(masks.spans(torch.tensor(ids)), expected)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 0), (0, 3), (3, 0)])
def test_no_rows_or_no_keys(seqlen_q, seqlen_k):
    nothing = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    unused = {"total_q": seqlen_q, "total_k": seqlen_k}
    for mask in (
        masks.full(seqlen_q, seqlen_k),
        masks.causal(seqlen_q, seqlen_k),
        masks.window(seqlen_q, seqlen_k, window_size=(1, 1)),
        masks.top_left(seqlen_q, seqlen_k),
        masks.prefix_lm(0, seqlen_q, seqlen_k),
        masks.padding(torch.tensor([0]), seqlen_q, seqlen_k),
        masks.padding(torch.tensor([0]), seqlen_q, seqlen_k, side="left"),
        masks.packed(torch.tensor([0]), **unused),
        masks.packed(torch.tensor([0, 0, 0]), **unused),
        IntervalMask.from_dense(nothing),
    ):
        assert_mask(mask, nothing)
        assert_mask(mask & mask, nothing)
        assert_mask(mask | mask, nothing)


def test_spans_of_nothing():
    assert masks.spans(torch.zeros(0, dtype=torch.int64)).shape == (1, 0)
    assert masks.spans(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


# Combinations


@given(pairs_of_masks())
def test_and_shows_what_both_show(pair):
    left, right = pair
    assert_mask(left & right, (left.to_dense() & right.to_dense()))


@given(pairs_of_masks())
def test_or_shows_what_either_shows_or_names_the_row_that_is_no_interval(pair):
    left, right = pair
    union = left.to_dense() | right.to_dense()
    runs = (union.int().diff(prepend=torch.zeros(*union.shape[:2], 1).int()) == 1).sum(-1)
    if (runs <= 1).all():
        assert_mask(left | right, union)
    else:
        batch, row = (runs > 1).nonzero()[0].tolist()
        with pytest.raises(ValueError, match=rf"row {row} of batch {batch}\b"):
            left | right


@given(st.data())
def test_empty_rows_are_the_identity_of_or(data):
    mask = data.draw(random_masks(4, 6))
    nothing = IntervalMask(torch.full((4,), 3), torch.full((4,), 3), 6)
    assert_mask(mask | nothing, mask.to_dense())
    assert_mask(nothing | mask, mask.to_dense())


@given(span_ids())
def test_causal_or_spans_always_works(ids):
    seqlen = len(ids)
    causal = dense(seqlen, seqlen, lambda i, j: j <= i)
    mask = masks.causal(seqlen) | masks.spans(torch.tensor(ids, dtype=torch.int64))
    assert_mask(mask, causal | dense_spans(ids))


@given(span_ids(), st.integers(0, 5))
def test_a_causal_window_or_spans_always_works(ids, left):
    seqlen = len(ids)
    window = dense(seqlen, seqlen, lambda i, j: i - left <= j <= i)
    mask = masks.causal(seqlen) & masks.window(seqlen, window_size=(left, -1))
    assert_mask(mask | masks.spans(torch.tensor(ids, dtype=torch.int64)), window | dense_spans(ids))


def test_the_order_of_window_and_spans_matters():
    image = masks.spans(torch.tensor([-1, 0, 0, 0, 0, -1]))
    causal, window = masks.causal(6), masks.window(6, window_size=(1, -1))
    whole_image, cut_image = (causal & window) | image, (causal | image) & window
    # Row 4, the last of the image's keys 1 to 4, stands at key 4 with a window back to key 3.
    assert (whole_image.start[0, 4], whole_image.end[0, 4]) == (1, 5)
    assert (cut_image.start[0, 4], cut_image.end[0, 4]) == (3, 5)


def test_combining_leaves_the_operands_as_they_were():
    left, right = masks.causal(5), masks.spans(torch.tensor([0, 0, -1, 1, 1]))
    before = [bound.clone() for mask in (left, right) for bound in (mask.start, mask.end)]
    left | right, left & right, masks.prefix_lm(3, 5)
    after = [bound for mask in (left, right) for bound in (mask.start, mask.end)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("known", [(None, 6), (6, None), (6, 6), (None, None)])
def test_a_mask_that_knows_its_number_of_keys_passes_it_on(known):
    start, end = torch.tensor([0, 1]), torch.tensor([2, 3])
    left, right = (IntervalMask(start, end, seqlen_k) for seqlen_k in known)
    expected = 6 if 6 in known else None
    assert (left & right).seqlen_k == (left | right).seqlen_k == expected


# Dense form


@given(st.data(), SIZES, SIZES)
def test_from_dense_undoes_to_dense(data, seqlen_q, seqlen_k):
    mask = data.draw(random_masks(seqlen_q, seqlen_k))
    shown = mask.to_dense()
    for form in (shown, shown[:, None], shown.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_mask(IntervalMask.from_dense(form), shown)
    if len(shown) == 1:
        assert_mask(IntervalMask.from_dense(shown[0]), shown)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.data())
def test_from_dense_names_the_first_row_that_is_no_interval(batch, seqlen_q, seqlen_k, data):
    count = batch * seqlen_q * seqlen_k
    cells = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    shown = torch.tensor(cells).view(batch, seqlen_q, seqlen_k)
    gaps = ["01" in "".join("01"[c] for c in row).lstrip("0") for row in shown.flatten(0, 1)]
    if not any(gaps):
        assert_mask(IntervalMask.from_dense(shown), shown)
    else:
        first, row = divmod(gaps.index(True), seqlen_q)
        with pytest.raises(ValueError, match=rf"row {row} of batch {first}\b"):
            IntervalMask.from_dense(shown)


def test_to_dense_needs_the_number_of_keys_once():
    start, end = torch.tensor([0, 1]), torch.tensor([2, 3])
    mask = IntervalMask(start, end)
    assert mask.to_dense(4).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="pass seqlen_k"):
        mask.to_dense()
    with pytest.raises(ValueError, match="seqlen_k is 5; the mask has 4"):
        IntervalMask(start, end, 4).to_dense(5)


# Construction, places and caching


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_bounds_of_any_integer_dtype_and_rank(dtype):
    start, end = torch.tensor([0, 2, 1], dtype=dtype), torch.tensor([3, 2, 2], dtype=dtype)
    expected = dense(3, 4, lambda i, j: (i == 0 and j < 3) or (i == 2 and j == 1))
    assert_mask(IntervalMask(start, end, 4), expected)
    assert_mask(IntervalMask(start[None], end, 4), expected)
    both = IntervalMask(start, end.expand(2, 3), 4)
    assert_mask(both, expected.expand(2, 3, 4))


def test_an_empty_row_is_stored_as_zero_and_zero():
    mask = IntervalMask(torch.tensor([3, 1]), torch.tensor([3, 2]))
    assert mask.start.tolist() == [[0, 1]]
    assert mask.end.tolist() == [[0, 2]]


def test_to_moves_the_bounds():
    mask = masks.causal(3, 4)
    moved = mask.to("meta")
    assert moved.device == moved.start.device == moved.end.device == torch.device("meta")
    assert (moved.shape, moved.seqlen_k) == ((1, 3), 4)
    assert mask.device == torch.device("cpu")


def test_builders_make_their_bounds_where_asked():
    for mask in (
        masks.full(3, device="meta"),
        masks.causal(3, device="meta"),
        masks.window(3, window_size=(1, 1), device="meta"),
        masks.top_left(3, 4, device="meta"),
        masks.prefix_lm(2, 3, device="meta"),
    ):
        assert mask.device == torch.device("meta")


def test_repr_says_shape_keys_and_device():
    text = repr(masks.padding(torch.tensor([1, 2]), 3, 4))
    assert all(part in text for part in ("IntervalMask", "(2, 3)", "4", "cpu"))


def test_equal_sizes_share_a_mask():
    assert masks.causal(31, 33) is masks.causal(31, 33)
    assert masks.causal(31, 33) is not masks.causal(31, 34)
    assert masks.full(7) is not masks.causal(7)
    assert masks.window(7, window_size=(2, 0)) is not masks.window(7, window_size=(0, 2))


def test_a_mask_first_used_in_inference_mode_can_train():
    masks._cache.clear()
    with torch.inference_mode():
        masks.causal(6), masks.window(6, window_size=(2, 1)), masks.full(6)
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    for mask in (masks.causal(6), masks.window(6, window_size=(2, 1)), masks.full(6)):
        assert not mask.start.is_inference()
        (grad,) = torch.autograd.grad(mm.attention(q, q, q, mask=mask).sum(), q)
        assert grad.isfinite().all()


def test_a_mask_first_built_while_tracing_is_not_kept():
    masks._cache.clear()
    with FakeTensorMode():
        masks.causal(6)
    assert_mask(masks.causal(6), dense(6, 6, lambda i, j: j <= i))


def test_fake_masks_neither_come_from_the_cache_nor_stay_in_it():
    masks._cache.clear()
    masks.causal(5)
    with FakeTensorMode():
        assert isinstance(masks.causal(5).start, FakeTensor)
        if torch.backends.cuda.is_built():  # with no GPU, too
            assert masks.prefix_lm(2, 5, device="cuda").end.device.type == "cuda"
    assert type(masks.causal(5).start) is Tensor
    assert len(masks._cache) == 1


def test_the_cache_stays_small():
    for seqlen in range(2 * masks._CACHE_SIZE):
        masks.causal(1, seqlen)
    assert len(masks._cache) <= masks._CACHE_SIZE


def test_are_cached_masks_safe_from_their_users():
    masks.causal(23).end.fill_(1)
    assert torch.equal(masks.causal(23).to_dense()[0], torch.ones(23, 23).tril().bool())


def test_does_a_window_of_int_max_mean_unbounded():
    wide = masks.window(9, 12, window_size=(2**31 - 1, 2**33))
    assert torch.equal(wide.to_dense(), masks.full(9, 12).to_dense())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_do_bounds_edited_beyond_the_keys_stay_inside(backend):
    q, k, v = (torch.randn(1, 16, 2, 8) for _ in range(3))
    mask = masks.window(16, window_size=(3, 3))
    mask = IntervalMask(mask.start.clone(), mask.end.clone(), 16)
    mask.end.add_(20)
    mask.start.sub_(30)
    full = mm.attention(q, k, v)
    torch.testing.assert_close(mm.attention(q, k, v, mask=mask, backend=backend), full)


def test_is_the_transposed_mask_kept_and_made_anew():
    mask = IntervalMask(torch.tensor([0, 1]), torch.tensor([2, 3]), 3)
    assert mask.key_rows() is mask.key_rows()
    mask.end[0, 0] = 1
    assert mask.key_rows()[1].tolist() == [[1, 2, 2]]
