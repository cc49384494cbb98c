"""Are the CUDA backward kernels right? Their launchers and PTX run in the emulator."""

import ctypes
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention import cuda, triton_backend
from mmkernels.attention import cuda_backward as module
from tests import cuda_harness
from tests.attention import cuda_backward
from tests.attention.cuda_backward import attention_delta, check, problem, run
from tests.attention.cuda_problems import NAMES, SHAPE, EmulatedOps, forwarded, masked, poisoned
from tests.cuda_harness import EVERY_WIDTH, STRIDED, on_device, strided

pytestmark = [pytest.mark.nvcc, pytest.mark.ptxsim]
slow = pytest.mark.slow
bf16, fp16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("mask", testing.MASKS)
def test_every_mask(mask):
    check(masked(mask, SHAPE, 64))


def test_rows_without_a_key_run_through_full_tiles():
    end = torch.full((1, 200), 261)
    end[0, [0, 5, 77, 150, 199]] = 0
    x = problem(SHAPE, 64, mask=mm.masks.IntervalMask(torch.zeros_like(end), end, 261))
    check(x)
    x.q[:, 77] = math.nan
    assert not run(x)[0][0][:, 77].any(), "dq, whatever q is"


@pytest.mark.parametrize("length", [64, 33])
def test_whole_tiles_of_rows_that_miss_one_key_of_a_tile(length):
    bounds = torch.tensor([[0, 127], [1, 261], [0, 255], [129, 261], [0, 261], [0, 260]])
    start, end = bounds.repeat_interleave(length, 0).T[:, None]
    mask = mm.masks.IntervalMask(start, end, 261)
    check(problem((1, 6 * length, 261, 1, 1), 64, mask=mask))


@EVERY_WIDTH
@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_every_width_and_dtype(head_dim, dtype, mask):
    check(masked(mask, SHAPE, head_dim, dtype))


@pytest.mark.parametrize("seqlen_k", [1, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("seqlen_q", [1, 31, 32, 33, 127, 128, 129])
def test_lengths_around_a_tile(seqlen_q, seqlen_k):
    check(problem((1, seqlen_q, seqlen_k, 1, 1), 64))


@pytest.mark.parametrize("seqlen", [63, 64, 65])
def test_lengths_around_a_tile_of_wide_heads(seqlen):
    check(problem((1, seqlen, seqlen, 1, 1), 128))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads(heads, kv_heads):
    check(masked("causal", (2, 70, 70, heads, kv_heads), 64))


def test_no_keys_and_no_queries():
    (dq, dk, dv), results = run(problem((2, 70, 0, 2, 1), 64))
    assert len(results) == 1 and not dq.any() and dk.numel() == dv.numel() == 0
    (dq, dk, dv), results = run(problem((2, 0, 70, 2, 1), 64))
    assert len(results) == 1 and not dk.any() and not dv.any() and dq.numel() == 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [bf16, pytest.param(fp16, marks=slow)])
def test_softcap_and_scale(head_dim, dtype):
    shape = (1, 130, 130, 2, 1)
    check(problem(shape, head_dim, dtype, mm.masks.causal(130), softcap=5.0))
    check(problem(shape, head_dim, dtype, mm.masks.causal(130), softmax_scale=0.7))


def test_float16_gradients_of_scores_overflow_no_sooner_than_dq_and_dk():
    x = problem((1, 64, 64, 1, 1), 64, fp16, softmax_scale=2.0**-9)
    x = x._replace(dout=on_device(x.dout * 16384), v=on_device(x.v * 16))
    (out, _), wanted = cuda_backward.exact(x)
    dp = torch.einsum("bihd,bjhd->bhij", x.dout.double(), x.v.double())
    ds = (dp - (x.dout.double() * out).sum(-1).transpose(1, 2)[..., None]) / 64  # p is about 1 / 64
    assert ds.abs().max() > 2 * torch.finfo(fp16).max
    for name, got, right in zip(NAMES, run(x)[0], wanted, strict=True):
        error = (got.double() - right).abs().max() / right.abs().max()
        assert error < 0.01, f"{name}: {error}"


@pytest.mark.parametrize("first", range(3))
def test_strides(first):
    """Each tensor has other strides than the rest."""
    x = masked("causal", (2, 130, 130, 2, 2), 64)
    kinds = (STRIDED + STRIDED)[first : first + 3]
    names = zip(("q", "k", "v", "dout"), (*kinds, kinds[1]), strict=True)
    x = x._replace(**{name: strided(kind, getattr(x, name)) for name, kind in names})
    assert all(not t.is_contiguous() for t in (*x.qkv, x.dout))
    check(x)


def test_strides_of_the_bounds():
    x = masked("ragged", SHAPE, 64)
    tensors = forwarded(x)
    wanted, _ = cuda_backward.attention_backward(*tensors, x.bounds())
    rows, keys = (on_device(torch.stack(pair, -1)) for pair in (x.bounds()[:2], x.bounds()[2:]))
    bounds = (rows[..., 0], rows[..., 1], keys[..., 0], keys[..., 1])
    got, _ = cuda_backward.attention_backward(*tensors, bounds)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mask", ["window", "ragged"])
def test_without_the_rows_that_see_a_key_all_are_looked_at(mask):
    x = masked(mask, SHAPE, 64)
    tensors = forwarded(x)
    got, _ = cuda_backward.attention_backward(*tensors, x.bounds()[:2])
    wanted, _ = cuda_backward.attention_backward(*tensors, x.bounds())
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02, msg=name)


def test_bounds_outside_of_the_keys_are_clamped():
    x = masked("causal", (1, 70, 70, 1, 1), 64)
    tensors, (start, end, row_start, row_end) = forwarded(x), x.bounds()
    wide = (
        start - 5,
        torch.where(end == 70, 1000, end),
        row_start - (row_start == 0) * 9,
        row_end + 9,
    )
    got, _ = cuda_backward.attention_backward(*tensors, tuple(on_device(b.int()) for b in wide))
    wanted, _ = cuda_backward.attention_backward(*tensors, x.bounds())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, bf16), (72, fp16), (128, bf16)])
def test_delta(head_dim, dtype):
    x = masked("ragged", (2, 37, 50, 3, 1), head_dim, dtype)
    out, lse = cuda_backward.forward(x)
    dout = strided("part of a wider tensor", x.dout)
    flat_dlse = on_device(x.dlse.mT).mT
    exact = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    empty = lse == -math.inf
    assert empty.any()
    dout[empty.transpose(1, 2)] = math.nan
    for dlse, wanted in ((None, exact), (flat_dlse, exact - x.dlse), (x.dlse[:1, :1, :1], None)):
        if wanted is None:
            dlse, wanted = dlse.expand(lse.shape), exact - dlse
        delta, _ = attention_delta(dout, out, lse, dlse)
        assert not delta[empty].any()
        torch.testing.assert_close(delta[~empty].double(), wanted[~empty], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "bad", "mask"),
    [
        (64, bf16, math.nan, "ragged"),
        (64, bf16, -math.inf, "documents"),
        (80, fp16, math.inf, "ragged"),
        (128, bf16, math.nan, "ragged"),
        (128, bf16, math.nan, "causal"),
    ],
)
def test_nan_reaches_the_rows_that_see_it_and_no_other(head_dim, dtype, bad, mask, which):
    x = masked(mask, SHAPE, head_dim, dtype)
    dirty, clean, touched = poisoned(x, which, bad)
    got, wanted = run(dirty)[0], run(clean)[0]
    dq, wanted_dq = got[0].transpose(1, 2), wanted[0].transpose(1, 2)
    assert torch.equal(dq[~touched], wanted_dq[~touched])
    if math.isnan(bad):
        assert dq[touched].isnan().any(-1).all()
    seen = x.mask.to_dense()[:, None] & touched[..., None]  # (B, Hq, Sq, Sk): by a touched row
    reached = seen.any(2).unflatten(1, (2, 2)).any(2).transpose(1, 2)  # (B, Sk, Hkv)
    for name, a, b in zip(NAMES[1:], got[1:], wanted[1:], strict=True):
        assert torch.equal(a[~reached], b[~reached]), name
    if mask != "ragged":
        assert not reached.all()


def test_keys_that_no_row_sees_may_hold_anything():
    mask = mm.masks.padding(torch.tensor([130, 0]), *SHAPE[1:3])
    x = problem(SHAPE, 64, mask=mask)
    wanted, _ = run(x)
    for bad in (math.nan, math.inf):
        dirty = {name: getattr(x, name).clone() for name in "kv"}
        for t in dirty.values():
            t[0, 130:], t[1] = bad, bad
        got, _ = run(x._replace(**{name: on_device(t) for name, t in dirty.items()}))
        for name, a, b in zip(NAMES, got, wanted, strict=True):
            assert torch.equal(a, b), name
    assert not wanted[0][1].any()
    for grad in wanted[1:]:
        assert not grad[0, 130:].any() and not grad[1].any()


def test_a_row_whose_lse_is_nan_stays_alone():
    x = masked("causal", SHAPE, 64)
    tensors = forwarded(x)
    wanted, _ = cuda_backward.attention_backward(*tensors, x.bounds())
    tensors[4][0, 1, 100] = math.nan
    (dq, dk, dv), _ = cuda_backward.attention_backward(*tensors, x.bounds())
    other = torch.ones(dq.shape[:3], dtype=torch.bool)
    other[0, 100, 1] = False
    assert torch.equal(dq[other], wanted[0][other]) and dq[~other].isnan().all()
    for got, right in ((dk, wanted[1]), (dv, wanted[2])):
        assert torch.equal(got[0, 162:], right[0, 162:]), "keys that the row does not see"
        assert got[0, :162, 0].isnan().all() and torch.equal(got[:, :, 1], right[:, :, 1])


@pytest.mark.parametrize(
    ("head_dim", "mask"), [(64, "image spans"), pytest.param(128, "ragged", marks=slow)]
)
def test_every_order_of_warps_gives_the_same_bits(head_dim, mask):
    x = masked(mask, SHAPE, head_dim)
    first, *others = (run(x, seed=seed)[0] for seed in (0, 7, 1234))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_code_for_hopper(head_dim):
    check(masked("causal", SHAPE, head_dim), arch="sm_90")


# Head dim -> staying and moving rows of the keys kernel's tiles, and of the queries kernel's.
TILES = {64: ((128, 32), (128, 32)), 80: ((64, 64), (128, 32)), 96: ((64, 32), (64, 32)),
         128: ((64, 32), (64, 32))}  # fmt: skip


# Bank conflicts of a launch's loads: the copies of dk, dv and dq, whose rows are no whole number of
# 128 bytes.
@pytest.mark.parametrize(("head_dim", "conflicts"), [(64, 0), (128, 0), (80, 768), (96, 512)])
def test_nothing_is_moved_or_computed_twice(head_dim, conflicts):
    size = 1024
    results = check(problem((1, size, size, 1, 1), head_dim))
    row = 2 * head_dim
    for result, (rows, _), products, outputs, numbers in zip(
        results, TILES[head_dim], (4, 3), (2, 1), (8, 0), strict=True
    ):
        tiles = size // rows
        assert result["mma_flops"] == 2 * products * size * size * head_dim
        assert result["lds_conflict"] <= conflicts * outputs and result["sts_conflict"] == 0
        # Both staying tensors once, both moving ones once a tile, and lse and delta with these.
        assert result["cpasync_bytes"] == 2 * size * row * (1 + tiles) + size * numbers * tiles
        assert result["gld_sectors"] <= 1.05 * result["cpasync_bytes"] / 32
        assert result["gst_sectors"] == outputs * size * row / 32
    assert sum(result["mma_flops"] for result in results) / (10 * size**2 * head_dim) == 7 / 5


def test_delta_reads_once():
    x = problem((1, 1024, 1024, 1, 1), 64)
    out, lse = cuda_backward.forward(x)
    _, result = attention_delta(x.dout, out, lse, x.dlse)
    assert result["gld_sectors"] <= 1.05 * 1024 * (2 * 128 + 4 + 4) / 32
    assert result["gst_req"] == 1024 / 4, "one for the four rows of a warp"


def through_python(x: cuda_backward.Problem, monkeypatch: Any, dlse: Tensor | None) -> Any:
    """What the backend makes of a call, once it is willing."""
    monkeypatch.setattr(module, "kernels_why_not", lambda *inputs: None)
    monkeypatch.setattr(torch.ops, "mmkernels_cuda", EmulatedOps(), raising=False)
    out, lse = cuda_backward.forward(x)
    mask = (None,) * 4 if x.mask is None else (x.mask.start, x.mask.end, *x.mask.key_rows())
    scores = (None, None, None, None, x.q.shape[3] ** -0.5, 5.0, 0.0)
    return module.backward(x.dout, dlse, *x.qkv, out, lse, *mask, *scores, False, True)


@pytest.mark.parametrize("mask", ["none", "ragged"])
@pytest.mark.parametrize("kind", ["contiguous", "expanded", "misaligned"])
def test_the_backend_runs_the_kernels(monkeypatch, kind, mask):
    x = masked(mask, (2, 40, 50, 2, 1), 64)._replace(numbers=(("softcap", 5.0),))
    if kind == "expanded":
        x = x._replace(dout=x.dout[:1, :1, :1, :1].expand(x.dout.shape))
    elif kind == "misaligned":
        flat = torch.cat((x.dout.new_zeros(1), x.dout.flatten()))
        x = x._replace(dout=flat[1:].view(x.dout.shape))
    for dlse in (x.dlse, None):
        dq, dk, dv, dbias, dsinks = through_python(x, monkeypatch, dlse)
        wanted, _ = run(x._replace(dout=on_device(x.dout.contiguous())), dlse=dlse is not None)
        assert dbias.numel() == dsinks.numel() == 0
        assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), wanted, strict=True))


@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 1), (2, 5, 0, 2, 1), (0, 5, 5, 2, 1)])
def test_the_backend_answers_without_rows_or_keys(monkeypatch, shape):
    x = problem(shape, 64)
    *grads, _, _ = through_python(x, monkeypatch, None)
    assert all(got.shape == t.shape and not got.any() for got, t in zip(grads, x.qkv, strict=True))


def test_what_the_kernels_decline_is_tritons(monkeypatch):
    seen = []
    monkeypatch.setattr(triton_backend, "backward", lambda *inputs: seen.append(inputs))
    x = problem((1, 5, 5, 1, 1), 64)
    inputs = (x.dout, None, *x.qkv, x.q, x.dlse, *(None,) * 8, 0.1, 0.0, 0.5, False, True)
    module.backward(*inputs)
    ((*got,),) = seen
    assert len(got) == len(inputs) and all(a is b for a, b in zip(got, inputs, strict=True))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_why_not(monkeypatch):
    """Every reason of the forward kernel's, and a build without backward kernels."""
    built = {"forward": True, "backward": True}
    monkeypatch.setattr(cuda, "why_not", lambda *inputs: None if built["forward"] else "no forward")
    monkeypatch.setattr(triton_backend, "declines", lambda q, v: "no triton")
    names = type(
        "Ops", (), {"attention_backward_built": staticmethod(lambda *_: built["backward"])}
    )
    monkeypatch.setattr(torch.ops, "mmkernels_cuda", names, raising=False)
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        q = torch.empty(1, 8, 2, 64, dtype=bf16)
    rest = (None, None, None, None, None, None, None, None, None, None, 0.1, 0.0, 0.0, False, True)
    for case, reason in (
        ({"forward": True, "backward": True}, None),
        ({"forward": False, "backward": True}, "no triton"),
        ({"forward": True, "backward": False}, "no triton"),
    ):
        built.update(case)
        module._built_why_not.cache_clear()
        assert module.backward_why_not(None, None, q, q, q, *rest) == reason
    module._built_why_not.cache_clear()
    assert "q is on cpu" in module.backward_why_not(
        None, None, *(torch.empty(1, 1, 1, 64),) * 3, *rest
    )


def test_the_structs_are_those_of_the_header():
    text = (cuda_harness.CSRC / "attention" / "backward.h").read_text()
    for struct in (cuda_backward.AttentionBackward, cuda_backward.AttentionDelta):
        body = re.search(rf"struct {struct.__name__} {{(.*?)\n}};", text, re.S)[1]
        body = re.sub(r"//.*", "", body)
        kinds = {"*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32,
                 "float": ctypes.c_float}  # fmt: skip
        fields = []
        for line in body.split(";")[:-1]:
            kind, names = re.fullmatch(r"\s*(?:const )?(\w+\*?) (.*)", line, re.S).groups()
            kind = kinds["*" if kind.endswith("*") else kind]
            fields += [(name.strip(), kind) for name in names.split(",")]
        assert fields == list(struct._fields_)
