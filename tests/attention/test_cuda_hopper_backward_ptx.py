"""Are the CUDA backward kernels for Hopper right? Their launchers and PTX run in the emulator.

Each question is asked of both forms: dq by a kernel of its own, and dq summed in any order.
"""

import math
from typing import Any

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention import cuda_backward as module
from mmkernels.attention.interval import IntervalMask
from tests.attention import cuda_backward
from tests.attention.cuda_backward import problem
from tests.attention.cuda_problems import NAMES, SHAPE, EmulatedOps, forwarded, masked, poisoned
from tests.cuda_harness import EVERY_WIDTH, on_device, strided

pytestmark = [pytest.mark.nvcc, pytest.mark.ptxsim]
slow = pytest.mark.slow
bf16, fp16 = torch.bfloat16, torch.float16
FORMS = {"fixed order": True, "any order": False}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def deterministic(request) -> bool:
    return request.param


def run(x: cuda_backward.Problem, deterministic: bool, **options: Any) -> Any:
    return cuda_backward.run(x, arch="sm_90a", deterministic=deterministic, **options)


def check(x: cuda_backward.Problem, deterministic: bool) -> Any:
    return cuda_backward.check(x, arch="sm_90a", deterministic=deterministic)


def backward(
    tensors: tuple[torch.Tensor, ...], bounds: tuple[torch.Tensor, ...], deterministic: bool
) -> list[torch.Tensor]:
    """dq, dk and dv of what `forwarded` gives."""
    return cuda_backward.attention_backward(
        *tensors, bounds, arch="sm_90a", deterministic=deterministic
    )[0]


@pytest.mark.parametrize("mask", testing.MASKS)
def test_every_mask(mask, deterministic):
    check(masked(mask, SHAPE, 64), deterministic)


@EVERY_WIDTH
@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_every_width_and_dtype(head_dim, dtype, mask, deterministic):
    check(masked(mask, SHAPE, head_dim, dtype), deterministic)


@pytest.mark.parametrize("seqlen_k", [1, 64, 65, 127, 129])
@pytest.mark.parametrize("seqlen_q", [1, 63, 64, 128, 129])
def test_lengths_around_a_tile(seqlen_q, seqlen_k, deterministic):
    check(problem((1, seqlen_q, seqlen_k, 1, 1), 64), deterministic)


@pytest.mark.parametrize(("start", "end"), [(0, 191), (1, 128), (63, 129), (64, 127), (129, 192)])
def test_bounds_around_a_tile(start, end, deterministic):
    bounds = (torch.full((1, 130), x) for x in (start, end))
    mask = IntervalMask(*bounds, 200)
    check(problem((1, 130, 200, 1, 1), 64, mask=mask), deterministic)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads(heads, kv_heads, deterministic):
    check(masked("causal", (2, 70, 70, heads, kv_heads), 64), deterministic)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [bf16, pytest.param(fp16, marks=slow)])
def test_softcap_and_scale(head_dim, dtype, deterministic):
    shape, mask = (1, 130, 130, 2, 1), mm.masks.causal(130)
    for numbers in ({"softcap": 5.0}, {"softcap": 0.3}, {"softmax_scale": 0.7}):
        check(problem(shape, head_dim, dtype, mask, **numbers), deterministic)


@pytest.mark.parametrize("softcap", [0.01, 1e4])
@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_softcaps_at_both_ends_of_what_the_op_hands_on(softcap, dtype, deterministic):
    check(problem((1, 70, 70, 1, 1), 64, dtype, softcap=softcap), deterministic)


@pytest.mark.parametrize("seqlen_q", [64, 70])
@pytest.mark.parametrize("empty", [False, True])
def test_a_key_of_minus_infinity_meets_no_row_that_is_not_there(seqlen_q, empty, deterministic):
    """Nor one without a key: there 0 times infinity would be NaN."""
    end = torch.full((1, seqlen_q), 70)
    end[0, 5] = 0 if empty else 70
    x = problem((1, seqlen_q, 70, 1, 1), 64, mask=IntervalMask(end * 0, end, 70))
    x.q[..., 3] = x.q[..., 3].abs() + 0.1
    x.k[0, 5, 0, 3] = -math.inf
    out, lse = testing.eager_attention(*(t.float() for t in x.qkv), mask=x.mask.to_dense()[:, None])
    delta = (x.dout.float() * out).sum(-1).transpose(1, 2)
    tensors = [x.dout, *x.qkv, on_device(lse), on_device(delta)]
    _, dk, dv = backward(tensors, x.bounds(), deterministic)
    assert dk.isfinite().all() and dv.isfinite().all() and not dv[0, 5].any()


def test_scores_that_softcap_saturates(deterministic):
    check(problem((1, 130, 130, 1, 1), 64, softcap=5.0, softmax_scale=8.0), deterministic)


def test_float16_gradients_of_scores_overflow_no_sooner_than_dq_and_dk(deterministic):
    x = problem((1, 64, 64, 1, 1), 64, fp16, softmax_scale=2.0**-9)
    x = x._replace(dout=on_device(x.dout * 16384), v=on_device(x.v * 16))
    (out, _), wanted = cuda_backward.exact(x)
    dp = torch.einsum("bihd,bjhd->bhij", x.dout.double(), x.v.double())
    ds = (dp - (x.dout.double() * out).sum(-1).transpose(1, 2)[..., None]) / 64  # p is about 1 / 64
    assert ds.abs().max() > 2 * torch.finfo(fp16).max
    for name, got, right in zip(NAMES, run(x, deterministic)[0], wanted, strict=True):
        error = (got.double() - right).abs().max() / right.abs().max()
        assert error < 0.01, f"{name}: {error}"


@pytest.mark.parametrize("swap", [False, True])
def test_strides(swap, deterministic):
    """Those of q are not those of dout, those of k not those of v."""
    x = masked("causal", (2, 130, 130, 2, 2), 64)
    kinds = ("heads first", "part of a wider tensor")
    names = zip(("q", "k", "v", "dout"), (kinds[::-1] if swap else kinds) * 2, strict=True)
    x = x._replace(**{name: strided(kind, getattr(x, name)) for name, kind in names})
    assert all(not t.is_contiguous() for t in (*x.qkv, x.dout))
    check(x, deterministic)


def test_strides_of_the_bounds(deterministic):
    x = masked("ragged", SHAPE, 64)
    tensors = forwarded(x)
    wanted = backward(tensors, x.bounds(), deterministic)
    rows, keys = (on_device(torch.stack(pair, -1)) for pair in (x.bounds()[:2], x.bounds()[2:]))
    bounds = (rows[..., 0], rows[..., 1], keys[..., 0], keys[..., 1])
    got = backward(tensors, bounds, deterministic)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mask", ["window", "ragged"])
def test_without_the_rows_that_see_a_key_all_are_looked_at(mask, deterministic):
    x = masked(mask, SHAPE, 64)
    tensors = forwarded(x)
    got = backward(tensors, x.bounds()[:2], deterministic)
    wanted = backward(tensors, x.bounds(), deterministic)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02, msg=name)


def test_bounds_outside_of_the_keys_are_clamped(deterministic):
    x = masked("causal", (1, 70, 70, 1, 1), 64)
    tensors, (start, end, row_start, row_end) = forwarded(x), x.bounds()
    wide = (
        start - 5,
        torch.where(end == 70, 1000, end),
        row_start - (row_start == 0) * 9,
        row_end + 9,
    )
    got = backward(tensors, tuple(on_device(b.int()) for b in wide), deterministic)
    wanted = backward(tensors, x.bounds(), deterministic)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "bad", "mask"),
    [
        (64, bf16, math.nan, "ragged"),
        (64, bf16, -math.inf, "documents"),
        (80, fp16, math.inf, "ragged"),
        (128, bf16, math.nan, "causal"),
    ],
)
def test_nan_reaches_the_rows_that_see_it_and_no_other(
    head_dim, dtype, bad, mask, which, deterministic
):
    x = masked(mask, SHAPE, head_dim, dtype)
    dirty, clean, touched = poisoned(x, which, bad)
    got, wanted = run(dirty, deterministic)[0], run(clean, deterministic)[0]
    dq, wanted_dq = got[0].transpose(1, 2), wanted[0].transpose(1, 2)
    if deterministic:
        assert torch.equal(dq[~touched], wanted_dq[~touched])
    else:  # a touched row's neighbours come from the other kernel
        torch.testing.assert_close(dq[~touched], wanted_dq[~touched], rtol=2**-6, atol=2**-9)
    if math.isnan(bad):
        assert dq[touched].isnan().any(-1).all()
    seen = x.mask.to_dense()[:, None] & touched[..., None]  # (B, Hq, Sq, Sk): by a touched row
    reached = seen.any(2).unflatten(1, (2, 2)).any(2).transpose(1, 2)  # (B, Sk, Hkv)
    for name, a, b in zip(NAMES[1:], got[1:], wanted[1:], strict=True):
        assert torch.equal(a[~reached], b[~reached]), name
    if mask != "ragged":
        assert not reached.all()


def test_keys_that_no_row_sees_may_hold_anything(deterministic):
    mask = mm.masks.padding(torch.tensor([130, 0]), *SHAPE[1:3])
    x = problem(SHAPE, 64, mask=mask)
    wanted, _ = run(x, deterministic)
    for bad in (math.nan, math.inf):
        dirty = {name: getattr(x, name).clone() for name in "kv"}
        for t in dirty.values():
            t[0, 130:], t[1] = bad, bad
        x_dirty = x._replace(**{name: on_device(t) for name, t in dirty.items()})
        got, _ = run(x_dirty, deterministic)
        for name, a, b in zip(NAMES, got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-9, msg=name)
    assert not wanted[0][1].any()
    for grad in wanted[1:]:
        assert not grad[0, 130:].any() and not grad[1].any()


def test_a_row_whose_lse_is_nan_stays_alone(deterministic):
    x = masked("causal", SHAPE, 64)
    tensors = forwarded(x)
    wanted = backward(tensors, x.bounds(), deterministic)
    tensors[4][0, 1, 100] = math.nan
    dq, dk, dv = backward(tensors, x.bounds(), deterministic)
    other = torch.ones(dq.shape[:3], dtype=torch.bool)
    other[0, 100, 1] = False
    torch.testing.assert_close(dq[other], wanted[0][other], rtol=2**-6, atol=2**-9)
    assert dq[~other].isnan().all()
    for got, right in ((dk, wanted[1]), (dv, wanted[2])):
        assert torch.equal(got[0, 162:], right[0, 162:]), "keys that the row does not see"
        assert got[0, :162, 0].isnan().all() and torch.equal(got[:, :, 1], right[:, :, 1])


def test_a_row_without_a_key_gets_zeros_whatever_its_query_holds(deterministic):
    end = torch.full((1, 130), 128)
    end[0, 20] = 0
    mask = IntervalMask(torch.zeros_like(end), end, 200)
    tensors = forwarded(x := problem((1, 130, 200, 1, 1), 64, mask=mask))
    wanted, *_ = backward(tensors, x.bounds(), deterministic)
    tensors[1][0, 20] = math.nan
    dq, *_ = backward(tensors, x.bounds(), deterministic)
    assert torch.equal(dq, wanted) and not dq[0, 20].any()


@pytest.mark.parametrize(
    ("head_dim", "mask"), [(64, "image spans"), pytest.param(128, "ragged", marks=slow)]
)
def test_every_order_of_warps_gives_the_same_bits(head_dim, mask):
    x = masked(mask, SHAPE, head_dim)
    first, *others = (run(x, True, seed=seed)[0] for seed in (0, 7, 1234))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=slow)])
def test_any_order_differs_by_rounding_alone(head_dim):
    x = masked("image spans", SHAPE, head_dim)
    first, *others = (run(x, False, seed=seed)[0] for seed in (0, 7, 1234))
    for dq, *dkv in others:
        torch.testing.assert_close(dq, first[0], rtol=2**-7, atol=2**-9)
        assert all(torch.equal(a, b) for a, b in zip(dkv, first[1:], strict=True))


# Columns that a row has in shared memory.
COLUMNS = {64: 64, 80: 128, 96: 128, 128: 128}


@pytest.mark.parametrize("head_dim", COLUMNS)
def test_nothing_is_moved_or_computed_twice(head_dim, deterministic):
    size, tiles = 1024, 8
    keys, other = check(problem((1, size, size, 1, 1), head_dim), deterministic)
    row = (
        2 * COLUMNS[head_dim]
    )  # boxes are counted whole; the GPU moves what of them is in a tensor
    assert keys["mma_flops"] == (8 if deterministic else 10) * size**2 * head_dim
    assert other["mma_flops"] == (6 if deterministic else 0) * size**2 * head_dim
    # Both staying tensors once, both moving ones once a tile of 128.
    assert keys["tma_ld_bytes"] == 2 * size * row * (1 + tiles)
    assert other["tma_ld_bytes"] == (keys["tma_ld_bytes"] if deterministic else 0)
    for result in (keys, other):
        assert result["lds_conflict"] == result["sts_conflict"] == result["gst_sectors"] == 0
    sums = 0 if deterministic else 4 * size * head_dim
    assert keys["tma_st_bytes"] == 2 * size * row + tiles * sums
    assert other["tma_st_bytes"] == size * row
    # What else is read: lse and delta once a tile, and the sums.
    rest = 0.04 * keys["tma_ld_bytes"]
    assert 32 * keys["gld_sectors"] <= rest and 32 * other["gld_sectors"] <= sums + rest


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_tiles_that_the_mask_hides_are_passed_over(mask, deterministic):
    size, head_dim = 1024, 64
    built = {"causal": mm.masks.causal(size), "window": mm.masks.window(size, window_size=(127, 0))}
    results = check(problem((1, size, size, 1, 1), head_dim, mask=built[mask]), deterministic)
    # Of 16 x 16 pairs of 64 rows and keys; a warpgroup that passes over a tile of its block lends
    # zeros to the sums of dq.
    pairs, lent = {"causal": (136, 8), "window": (16 + 15 + 14, 15)}[mask]
    wanted = 14 * pairs if deterministic else 10 * pairs + 2 * lent
    assert sum(r["mma_flops"] for r in results) == wanted * 64 * 64 * head_dim


@pytest.mark.parametrize("hopper", [True, False])
def test_the_backend_hands_over_sums_where_the_order_is_free(monkeypatch, hopper):
    given = []

    class Ops(EmulatedOps):
        def attention_backward(self, *inputs):
            given.append(inputs[15:])
            super().attention_backward(*inputs[:15])

    monkeypatch.setattr(module, "kernels_why_not", lambda *inputs: None)
    monkeypatch.setattr(module, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(torch.ops, "mmkernels_cuda", Ops(), raising=False)
    x = problem((2, 130, 20, 2, 1), 72)
    out, lse = cuda_backward.forward(x)
    rest = (None,) * 8 + (72**-0.5, 0.0, 0.0, False)
    for deterministic in (True, False):
        module.backward(x.dout, x.dlse, *x.qkv, out, lse, *rest, deterministic)
    assert given[0] == () and len(given[1]) == (2 if hopper else 0)
    if hopper:
        dq_sum, redo = given[1]
        assert dq_sum.shape == (2, 2, 2, 128 * 80) and dq_sum.dtype == torch.float32
        assert not dq_sum.any()
        assert redo.shape == (2, 2, 2) and redo.dtype == torch.int32
