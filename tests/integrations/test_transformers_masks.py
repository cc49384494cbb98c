"""The mask function builds what `sdpa_mask` does, as bounds where the mask has them."""

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

from transformers import masking_utils  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from mmkernels.attention.interval import IntervalMask  # noqa: E402
from mmkernels.integrations import transformers_masks  # noqa: E402
from mmkernels.integrations.interval_tensor import IntervalTensor  # noqa: E402
from mmkernels.integrations.transformers import NAME, VARLEN_NAME  # noqa: E402
from mmkernels.integrations.transformers_masks import interval_mask  # noqa: E402

FOUR = "cache_position" in inspect.signature(sdpa_mask).parameters
BATCH, LENGTH = 3, 12
IMAGES = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, -1, 2, 2]]).repeat(BATCH, 1)
PACKED = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]).repeat(BATCH, 1)


def everything(batch, head, query, key):
    return query >= 0


def window(left):
    return sliding_window_causal_mask_function(left)


def same(ids):
    return lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (ids[b, q] >= 0)


def prefix(length):
    return lambda b, h, q, k: k < length


def chunks(size):
    return lambda b, h, q, k: q // size == k // size


def random(batch, head, query, key):
    return (query * 31 + key * 17) % 5 != 0


INTERVALS = {
    "causal": causal_mask_function,
    "bidirectional": getattr(masking_utils, "bidirectional_mask_function", everything),
    "window": window(4),
    "bidirectional window": lambda b, h, q, k: (q - k).abs() <= 3,
    "packed": and_masks(causal_mask_function, same(PACKED)),
    "chunked": and_masks(causal_mask_function, chunks(5)),
    "prefix": or_masks(causal_mask_function, prefix(5)),
    "images": or_masks(causal_mask_function, same(IMAGES)),
    "windowed images": or_masks(window(4), same(IMAGES)),
}
if hasattr(masking_utils, "blockwise_overlay"):
    INTERVALS["library's images"] = or_masks(
        causal_mask_function, masking_utils.blockwise_overlay(IMAGES)
    )
PADDINGS = {
    "none": None,
    "right": torch.arange(LENGTH) < torch.tensor([[12], [7], [1]]),
    "left": torch.arange(LENGTH) >= torch.tensor([[0], [7], [11]]),
    "both": (torch.arange(LENGTH) >= 2) & (torch.arange(LENGTH) < torch.tensor([[9], [4], [12]])),
    "all": torch.arange(LENGTH) < torch.tensor([[12], [0], [3]]),
}


def arguments(function, padding=None, first=0, rows=LENGTH, **changed):
    """For sdpa_mask and ours, in the running version's words; rows from `first` on."""
    common = {"batch_size": BATCH, "kv_length": LENGTH, "mask_function": function}
    common |= {"attention_mask": padding, "allow_is_causal_skip": False}
    if FOUR:
        return common | {"cache_position": torch.arange(first, first + rows)} | changed
    return common | {"q_length": rows, "q_offset": first, "device": "cpu"} | changed


@pytest.fixture(params=[100, 2**22], ids=["blocks", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(transformers_masks, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", INTERVALS)
def test_interval_masks(name, padding):
    given = arguments(INTERVALS[name], PADDINGS[padding])
    mask = interval_mask(**given)
    assert isinstance(mask, IntervalTensor)
    assert mask.interval is not None
    assert torch.equal(mask.interval.to_dense()[:, None].expand(mask.shape), sdpa_mask(**given))
    empty = mask.interval.start == mask.interval.end
    assert (mask.interval.start[empty] == 0).all()


@pytest.mark.parametrize("name", INTERVALS)
@pytest.mark.parametrize("first, rows", [(4, 8), (11, 1), (3, 5), (20, 2)])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_rows_after_a_cache(name, first, rows, padding):
    """New rows below those of a cache, that may be static (fewer rows follow than it has keys)."""
    if first + rows > LENGTH and name not in ("causal", "bidirectional", "window", "chunked"):
        pytest.skip("its ids end before")
    given = arguments(INTERVALS[name], PADDINGS[padding], first, rows)
    mask = interval_mask(**given)
    assert isinstance(mask, IntervalTensor)
    assert torch.equal(mask.dense(), sdpa_mask(**given))


@pytest.mark.parametrize("name", ["causal", "window", "chunked"])
@pytest.mark.parametrize("padding", [None, "shorter", "as long"])
def test_keys_of_a_sliding_cache(name, padding):
    """Its first key is not the first token. A padding mask may end before the keys do."""
    real = None
    if padding:
        length = 17 if padding == "shorter" else 20
        real = torch.arange(length) >= torch.tensor([[0], [9], [14]])
    given = arguments(INTERVALS[name], real, 15, 4, kv_offset=8)
    mask = interval_mask(**given)
    assert isinstance(mask, IntervalTensor)
    assert torch.equal(mask.dense(), sdpa_mask(**given))


@pytest.mark.skipif(FOUR, reason="transformers 4 has cache_position, a tensor always")
@pytest.mark.parametrize("name", ["causal", "window"])
def test_offset_in_a_tensor(name):
    given = arguments(INTERVALS[name], None, 5, 3)
    offset = {"q_offset": torch.tensor([5])[0]}
    mask = interval_mask(**(given | offset))
    assert isinstance(mask, IntervalTensor)
    assert torch.equal(mask.dense(), sdpa_mask(**given))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("function", [random, causal_mask_function, window(6)])
def test_what_is_no_interval_is_dense(function):
    padding = None if function is random else torch.rand(BATCH, LENGTH) < 0.6
    given = arguments(function, padding)
    mask = interval_mask(**given)
    assert type(mask) is torch.Tensor
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(**given))


def test_stops_at_the_first_block_that_is_no_interval(monkeypatch):
    rows = []

    def hole_in_row_2(batch, head, query, key):
        return (query != 2) | (key != 1)

    def counted(**given):
        rows.append(len(given["cache_position"]) if FOUR else given["q_length"])
        return sdpa_mask(**given)

    monkeypatch.setattr(transformers_masks, "BLOCK_ELEMENTS", BATCH * LENGTH)
    monkeypatch.setattr(transformers_masks, "sdpa_mask", counted)
    assert type(interval_mask(**arguments(hole_in_row_2))) is torch.Tensor
    assert rows == [LENGTH, 1, 1, 1, LENGTH]  # is it skipped?; rows 0 to 2; the dense mask


@pytest.mark.parametrize("name", ["causal", "window"])
def test_memory(name):
    """Never is there a tensor of Sq * Sk elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not isinstance(result, IntervalTensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    length = 3000
    given = arguments(INTERVALS[name], rows=length, kv_length=length, batch_size=1)
    given["attention_mask"] = torch.arange(length)[None] < length - 9
    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr(transformers_masks, "BLOCK_ELEMENTS", 2**16)
        mask = interval_mask(**given)
    assert isinstance(mask, IntervalTensor)
    assert largest <= 8 * 2**16  # an index is eight bytes


CAN_SKIP = {"allow_is_causal_skip": True}


@pytest.mark.parametrize("padding", [None, "real", "left", "future"])
@pytest.mark.parametrize("first, rows", [(0, 12), (11, 1), (0, 5), (4, 8)])
@pytest.mark.parametrize("local_size", [None, 4, 99])
@pytest.mark.parametrize("causal", [True, False])
def test_skipped_for_one_row_where_the_library_skips(padding, first, rows, local_size, causal):
    given = {
        None: None,
        "real": torch.ones(BATCH, LENGTH, dtype=torch.bool),
        "left": PADDINGS["left"],
        "future": (torch.arange(LENGTH) < rows).expand(BATCH, -1),
    }[padding]
    function = causal_mask_function if causal else INTERVALS["bidirectional"]
    skip = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
    given = arguments(function, given, first, rows, local_size=local_size, **skip)
    wanted, mask = sdpa_mask(**given), interval_mask(**given)
    assert (mask is None) == (wanted is None and rows == 1)
    if mask is not None:  # what None stands for is here to be seen
        unskipped = dict.fromkeys(skip, False)
        assert torch.equal(mask & True, sdpa_mask(**(given | unskipped)))


@pytest.mark.skipif(FOUR, reason="transformers 4 always evaluates under vmap")
def test_functions_that_need_vmap():
    """They see one query and one key at a time."""

    def scalar(batch, head, query, key):
        assert query.ndim == 0
        return key <= query

    given = arguments(scalar, PADDINGS["left"], use_vmap=True)
    mask = interval_mask(**given)
    assert isinstance(mask, IntervalTensor)
    assert torch.equal(mask.dense(), sdpa_mask(**given))


def test_registered_with_the_attention_function():
    for name in (NAME, VARLEN_NAME):
        assert AttentionMaskInterface()[name] is interval_mask


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "window"])
def test_compiled(name, padding, skip):
    """In a graph plain masks are bounds, any other the library's; the values are the same."""

    def build(x, padding):
        mask = interval_mask(
            **arguments(INTERVALS[name], padding, rows=x.shape[0], allow_is_causal_skip=skip)
        )
        return x, (None if mask is None else mask & True), isinstance(mask, IntervalTensor)

    def library(x, padding):
        given = arguments(INTERVALS[name], padding, rows=x.shape[0], allow_is_causal_skip=False)
        mask = sdpa_mask(**given)
        return x, None if mask is None else mask & True

    torch._dynamo.reset()
    x = torch.zeros(LENGTH)
    given = x, PADDINGS[padding]
    _, mask, interval = torch.compile(build, backend="aot_eager", fullgraph=True)(*given)
    _, wanted = torch.compile(library, backend="aot_eager", fullgraph=True)(*given)
    assert (mask is None) == (wanted is None)
    if mask is not None:
        assert torch.equal(mask, wanted)
        plain = INTERVALS[name] in (
            causal_mask_function,
            getattr(masking_utils, "bidirectional_mask_function", None),
        )
        assert interval == (plain and padding == "none")


@pytest.mark.skipif(FOUR, reason="the library's own fails with fake tensors")
def test_fake_tensors_give_the_dense_mask():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        padding = mode.from_tensor(torch.ones(BATCH, LENGTH, dtype=torch.bool))
        mask = interval_mask(**arguments(causal_mask_function, padding))
    assert not isinstance(mask, IntervalTensor)
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH)


@pytest.mark.skipif(FOUR, reason="the library's own fails in torch.jit.trace")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_jit_trace_gives_the_dense_mask():
    def build(x):
        return x + interval_mask(**arguments(window(4)))

    x = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    assert torch.equal(torch.jit.trace(build, x)(x), build(x))


def test_fast_masks_are_not_evaluated(monkeypatch):
    """Plain causal with one run of real tokens costs O(N): the library makes no block of it."""
    calls = []

    def counted(**given):
        calls.append(given["mask_function"])
        return sdpa_mask(**given)

    monkeypatch.setattr(transformers_masks, "sdpa_mask", counted)
    assert isinstance(
        interval_mask(**arguments(causal_mask_function, PADDINGS["left"])), IntervalTensor
    )
    assert causal_mask_function not in calls


def test_bounds_shared_by_the_batch():
    mask = interval_mask(**arguments(window(4)))
    assert isinstance(mask.interval, IntervalMask)
    assert mask.shape[0] == BATCH
    assert mask.interval.shape[0] == 1
