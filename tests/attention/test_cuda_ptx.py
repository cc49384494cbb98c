"""Are the CUDA forward kernels right? Their launchers and PTX run in the emulator."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention.interval import IntervalMask
from tests import cuda_harness
from tests.cuda_harness import EVERY_WIDTH, STRIDED, on_device, strided

pytestmark = [pytest.mark.nvcc, pytest.mark.ptxsim]
slow = pytest.mark.slow
bf16, fp16 = torch.bfloat16, torch.float16
SHAPE = (2, 200, 261, 4, 2)  # batch, Sq, Sk, heads, key heads


@pytest.fixture(params=["sm_80", "sm_90a"], ids=["portable", "hopper"])
def arch(request) -> str:
    return request.param


def qkv(shape: tuple[int, ...], head_dim: int, dtype: torch.dtype = bf16) -> list[Tensor]:
    return [on_device(x) for x in testing.make_qkv(*shape, head_dim, dtype=dtype)]


def run(
    tensors: list[Tensor], mask: IntervalMask | None = None, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    bounds = () if mask is None else (on_device(mask.start), on_device(mask.end))
    return cuda_harness.attention_forward(*tensors, *bounds, **options)


def check(tensors: list[Tensor], mask: IntervalMask | None = None, **options: Any) -> Any:
    """Holds out and lse to the error rule; what the emulator counted."""
    out, lse, result = run(tensors, mask, **options)
    options = {name: x for name, x in options.items() if name in ("softmax_scale", "softcap")}
    exact = mm.attention(
        *(x.double() for x in tensors), mask=mask, return_lse=True, backend="reference", **options
    )
    dense = None if mask is None else mask.to_dense()[:, None]
    eager = testing.eager_attention(*tensors, mask=dense, **options)
    rounding = testing.attention_rounding(out.dtype, exact[1])
    for name, got, right, yardstick in zip(("out", "lse"), (out, lse), exact, eager, strict=True):
        testing.assert_accurate(name, got, right, yardstick, rounding)
    assert not out.transpose(1, 2)[exact[1] == -math.inf].any()
    return result


@pytest.mark.parametrize("mask", testing.MASKS)
def test_every_mask(arch, mask):
    check(qkv(SHAPE, 64), testing.MASKS[mask](*SHAPE[:3]), arch=arch)


@EVERY_WIDTH
@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_every_width_and_dtype(arch, head_dim, dtype, mask):
    check(qkv(SHAPE, head_dim, dtype), testing.MASKS[mask](*SHAPE[:3]), arch=arch)


@pytest.mark.parametrize("seqlen_k", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("seqlen_q", [1, 127, 128, 129, 193])
def test_lengths_around_a_tile(arch, seqlen_q, seqlen_k):
    check(qkv((1, seqlen_q, seqlen_k, 1, 1), 64), arch=arch)


@pytest.mark.parametrize("edge", [127, 128, 129])
def test_ranges_of_keys_around_a_tile(arch, edge):
    """64 rows, those of a warpgroup of the Hopper kernel, see keys from or up to the edge alone."""
    rows = torch.arange(128) // 64
    for start, end in ((rows * edge, 300 - rows), (0 * rows, 300 - rows * (300 - edge))):
        mask = IntervalMask(start.int()[None], end.int()[None], 300)
        check(qkv((1, 128, 300, 1, 1), 128), mask, arch=arch)


def test_rows_without_keys_among_rows_with_many(arch):
    end = torch.where(torch.arange(130) % 3 == 1, 0, 300).int()[None]
    check(qkv((1, 130, 300, 2, 1), 64), IntervalMask(torch.zeros_like(end), end, 300), arch=arch)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads(arch, heads, kv_heads):
    shape = (2, 70, 70, heads, kv_heads)
    check(qkv(shape, 64), mm.masks.causal(70), arch=arch)


def test_no_keys_and_no_queries(arch):
    out, lse, _ = run(qkv((2, 70, 0, 2, 1), 64), arch=arch)
    assert not out.any() and (lse == -math.inf).all()
    assert run(qkv((2, 0, 70, 2, 1), 64), arch=arch)[2] is None, "nothing to launch"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_softcap_and_scale(arch, head_dim):
    shape = (1, 130, 130, 2, 1)
    check(qkv(shape, head_dim), mm.masks.causal(130), softcap=5.0, arch=arch)
    check(qkv(shape, head_dim), mm.masks.causal(130), softmax_scale=0.7, arch=arch)


@pytest.mark.parametrize("kind", STRIDED)
def test_strides(arch, kind):
    tensors = [strided(kind, x) for x in qkv((2, 130, 130, 2, 2), 64)]
    assert all(not x.is_contiguous() for x in tensors)
    check(tensors, mm.masks.causal(130), arch=arch)


@pytest.mark.parametrize("softcap", [0.01, 1e4])
def test_softcaps_at_both_ends_of_what_the_op_hands_on(arch, softcap):
    check(qkv((1, 70, 70, 1, 1), 64, fp16), softcap=softcap, arch=arch)


def test_strides_of_the_bounds(arch):
    mask = testing.MASKS["ragged"](*SHAPE[:3])
    tensors = qkv(SHAPE, 64)
    both = on_device(torch.stack((mask.start, mask.end), -1))
    out, lse, _ = cuda_harness.attention_forward(*tensors, both[..., 0], both[..., 1], arch=arch)
    for x, y in zip((out, lse), run(tensors, mask, arch=arch)[:2], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("which", [1, 2], ids=["k", "v"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "bad"),
    [(64, bf16, math.nan), (80, fp16, math.inf), (128, bf16, math.nan)],
)
def test_nan_reaches_the_rows_that_see_it_and_no_other(arch, head_dim, dtype, bad, which):
    mask = testing.MASKS["ragged"](*SHAPE[:3])
    dirty, clean = qkv(SHAPE, head_dim, dtype), qkv(SHAPE, head_dim, dtype)
    touched = torch.zeros(2, 4, 200, dtype=torch.bool)
    for b, j, h, d in ((0, 12, 0, 3), (0, 150, 1, 5), (1, 199, 0, head_dim - 1)):
        dirty[which][b, j, h, d], clean[which][b, j, h, d] = bad, 0.0
        touched[b, 2 * h : 2 * h + 2] |= mask.to_dense()[b, :, j]
    (out, lse, _), (wanted, wanted_lse, _) = (
        run(tensors, mask, arch=arch) for tensors in (dirty, clean)
    )
    assert touched.any() and not touched.all()
    out, wanted = out.transpose(1, 2), wanted.transpose(1, 2)
    if arch == "sm_90a":  # the portable kernel computes a touched row's neighbours anew
        torch.testing.assert_close(out[~touched], wanted[~touched], rtol=2**-6, atol=2**-9)
        torch.testing.assert_close(lse[~touched], wanted_lse[~touched])
    else:
        assert torch.equal(out[~touched], wanted[~touched])
        assert torch.equal(lse[~touched], wanted_lse[~touched])
    if which == 2:
        assert out[touched].isnan().any(-1).all() and lse[touched].isfinite().all()
        assert out[0, :2, :, 4].isfinite().all(), "another column of v"
    elif math.isnan(bad):
        assert out[touched].isnan().all() and lse[touched].isnan().all()


def test_every_order_of_warps_gives_the_same_bits(arch):
    tensors, mask = qkv(SHAPE, 64), testing.MASKS["image spans"](*SHAPE[:3])
    first, *others = (run(tensors, mask, arch=arch, seed=seed)[:2] for seed in (0, 7, 1234))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_portable_code_for_newer_gpus(head_dim):
    check(qkv(SHAPE, head_dim), mm.masks.causal(*SHAPE[1:3]), arch="sm_90")


@pytest.mark.parametrize(
    ("head_dim", "mask"), [(64, "ragged"), pytest.param(128, "image spans", marks=slow)]
)
def test_blocks_that_take_several_tiles(head_dim, mask):
    """The emulator's GPU has 132 processors, each of which keeps one block of the Hopper kernel."""
    shape = (7, 70, 150, 60, 30)
    check(qkv(shape, head_dim), testing.MASKS[mask](*shape[:3]), arch="sm_90a")
