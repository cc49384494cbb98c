"""Are the compiled Triton kernels right? Their PTX runs in the emulator, forward and backward."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels import testing
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from mmkernels.attention.dropout import keep_mask
from mmkernels.attention.interval import IntervalMask
from tests.triton_harness import Emulation, on_device, ptxsim_launcher

pytestmark = [pytest.mark.compiled, pytest.mark.ptxsim]
slow = pytest.mark.slow
masks = mm.masks
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (2, 261, 261, 4, 2)  # batch, Sq, Sk, heads, key heads


def emulated(arch: str, call: Any, seed: int = 0) -> tuple[Any, list[Emulation]]:
    """What call() returns with its kernels in the emulator, and the emulator's results."""
    launcher = ptxsim_launcher(KNOWN_GPUS[arch], seed=seed)
    emulate(launcher)
    try:
        return call(), launcher.run.results
    finally:
        emulate(None)


def placed(mask: IntervalMask | None) -> IntervalMask | None:
    if mask is None:
        return None
    return IntervalMask(on_device(mask.start), on_device(mask.end), mask.seqlen_k)


def normal(*shape: int, dtype: torch.dtype = fp32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cotangents_of(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    dout = normal(batch, seqlen_q, heads, v.shape[3], dtype=q.dtype, seed=8)
    return on_device(dout), on_device(normal(batch, heads, seqlen_q, seed=9))


def run(tensors: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """out, lse, and the gradients of `tensors` (q, k, v and others that need one)."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    q, v = leaves["q"], leaves["v"]
    out, lse = mm.attention(**leaves, backend=backend, return_lse=True, **options)
    dout, dlse = cotangents_of(q, v)
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout.to(out), dlse.to(lse)))
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def run_eager(tensors: dict[str, Tensor], mask: Any, **options: Any) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    dense = mask.to_dense()[:, None] if isinstance(mask, IntervalMask) else mask
    out, lse = testing.eager_attention(**leaves, mask=dense, **options)
    dout, dlse = cotangents_of(leaves["q"], leaves["v"])
    made = (out, lse.where(lse > -torch.inf, 0.0))
    grads = torch.autograd.grad(made, list(leaves.values()), (dout, dlse.to(lse)))
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def check(
    arch: str, tensors: dict[str, Tensor], mask: Any = None, **options: Any
) -> list[Emulation]:
    """Holds every output and gradient to the error rule; what the emulator counted."""
    got, results = emulated(arch, lambda: run(tensors, "triton", mask=mask, **options))
    wide = {name: x.double() for name, x in tensors.items()}
    exact = run(wide, "reference", mask=mask, **options)
    eager = run_eager(tensors, mask, **options)
    dout, dlse = cotangents_of(tensors["q"], tensors["v"])
    delta = (dout.double() * exact["out"]).sum(-1).transpose(1, 2) - dlse
    rounding = testing.attention_rounding(tensors["q"].dtype, exact["lse"], delta)
    for name, x in got.items():
        limit = rounding
        if name == "dsinks":  # a sum over all rows, in which large terms cancel
            sinks = tensors["sinks"].double()[:, None]
            terms = torch.exp(sinks - exact["lse"]).where(exact["lse"] > -torch.inf, 0)
            size = float((terms * delta.abs()).sum((0, 2)).max())
            limit *= size / float(exact[name].abs().max())
        testing.assert_accurate(name, x, exact[name], eager[name], limit)
    empty = exact["lse"] == -torch.inf
    assert not got["out"].transpose(1, 2)[empty].any()
    assert not got["dq"].transpose(1, 2)[empty].any()
    return results


def qkv(
    shape: tuple[int, ...], head_dim: int, value_dim: int | None = None, dtype: torch.dtype = bf16
) -> dict[str, Tensor]:
    made = testing.make_qkv(*shape, head_dim, value_dim, dtype=dtype)
    return dict(zip("qkv", map(on_device, made), strict=True))


def copied_by_tma(results: list[Emulation]) -> set[str]:
    return {r.kernel for r in results if r.result["tma_ld_bytes"] > 0}


MAIN = {"forward_kernel", "keys_kernel", "queries_kernel"}


# arch, mask, D, Dv, dtype: what is not slow has every mask and every width once.
def cases() -> Iterator[Any]:
    quick = [
        *(("sm_90", mask, 64, 64, bf16) for mask in testing.MASKS),
        *(("sm_80", mask, 64, 64, bf16) for mask in ("none", "ragged", "image spans")),
        ("sm_90", "causal", 128, 128, bf16),
        ("sm_90", "documents", 80, 80, bf16),
        ("sm_90", "ragged", 40, 72, fp16),
        ("sm_80", "window", 128, 64, fp16),
        ("sm_80", "ragged", 16, 40, fp32),
    ]
    widths = [(64, 64), (80, 80), (128, 128), (256, 256), (40, 40), (64, 128), (128, 80)]
    for arch in ("sm_90", "sm_80"):
        for mask in testing.MASKS:
            for width in widths:
                for dtype in (bf16, fp16):
                    case = (arch, mask, *width, dtype)
                    yield pytest.param(*case, marks=() if case in quick else slow, id=name(case))
    for case in quick:
        if case[2:4] not in widths or case[4] == fp32:
            yield pytest.param(*case, id=name(case))


def name(case: tuple) -> str:
    arch, mask, dim, value_dim, dtype = case
    return f"{arch}-{mask}-{dim}-{value_dim}-{str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize(("arch", "mask", "head_dim", "value_dim", "dtype"), list(cases()))
def test_every_mask_and_width(arch, mask, head_dim, value_dim, dtype):
    shape = (2, 200, 333, 4, 2) if head_dim == 80 else SHAPE
    built = placed(testing.MASKS[mask](*shape[:3]))
    results = check(arch, qkv(shape, head_dim, value_dim, dtype), built)
    powers = all(dim in (16, 32, 64, 128, 256) for dim in (head_dim, value_dim))
    tma = arch == "sm_90" and powers
    assert copied_by_tma(results) == (MAIN if tma else set())


# Name -> tensors that take a gradient, and the other options.
S = SHAPE[1]
EXTRAS = {
    "bias": lambda: ({"bias": normal(1, 4, S, S, dtype=bf16)}, {}),
    "bias of a row, for all": lambda: ({"bias": normal(1, 1, 1, S, dtype=bf16)}, {}),
    "bias of a column": lambda: ({"bias": normal(2, 1, S, 1, dtype=bf16)}, {}),
    "bias that hides": lambda: (
        {"bias": normal(2, 1, S, S, dtype=bf16).masked_fill(normal(S, S) > 0.5, -torch.inf)}, {}
    ),
    "bool": lambda: ({}, {"mask": on_device(hiding(normal(2, 1, S, S) > 0))}),
    "sinks": lambda: ({"sinks": normal(4, dtype=bf16)}, {}),
    "ALiBi": lambda: ({}, {"alibi_slopes": on_device(torch.tensor([0.5, 0.1, 0.0, 1.0]))}),
    "softcap": lambda: ({}, {"softcap": 5.0}),
    "scale below 0": lambda: ({}, {"softmax_scale": -0.2}),
    "all": lambda: (
        {"bias": normal(1, 4, S, S, dtype=bf16), "sinks": normal(4, dtype=bf16)},
        {"alibi_slopes": on_device(torch.tensor([0.5, 0.1, 0.0, 1.0])), "softcap": 5.0},
    ),
}  # fmt: skip
QUICK_EXTRAS = {
    ("sm_90", "bias that hides"), ("sm_90", "bool"), ("sm_90", "scale below 0"),
    ("sm_90", "bias of a row, for all"), ("sm_80", "all"), ("sm_80", "bias of a column"),
}  # fmt: skip


def hiding(shown: Tensor) -> Tensor:
    shown[..., :3, :] = False
    shown[..., -1, :] = False
    return shown


@pytest.mark.parametrize(
    ("arch", "extra"),
    [
        pytest.param(arch, extra, marks=() if (arch, extra) in QUICK_EXTRAS else slow)
        for arch in ("sm_90", "sm_80")
        for extra in EXTRAS
    ],
)
def test_every_extra(arch, extra):
    tensors, options = EXTRAS[extra]()
    tensors = {name: on_device(x) for name, x in tensors.items()}
    mask = options.pop("mask", None)
    if mask is None and extra != "bias of a row, for all":
        mask = placed(testing.MASKS["left padding, causal"](*SHAPE[:3]))
    check(arch, {**qkv(SHAPE, 64), **tensors}, mask, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=slow)])
def test_dropout_keeps_what_the_reference_keeps(arch, bias):
    """All scores are 0, so what was kept can be read off every output, four keys to a number."""
    batch, size, heads, dim = 2, 256, 3, 64
    digits = torch.eye(dim).repeat(4, 1) * 2.0 ** torch.arange(4).repeat_interleave(dim)[:, None]
    coded = digits[None, :, None].expand(batch, -1, heads, -1).to(bf16)
    zeros = torch.zeros_like(coded)
    ones = torch.ones_like(coded)

    def bits(x: Tensor) -> Tensor:
        """(B, H, S, 256) from (B, S, H, 64), whose elements are sums of bits."""
        number = x.float().round().long().transpose(1, 2)
        return torch.cat([number >> digit & 1 for digit in range(4)], -1).bool()

    def call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        leaves = [on_device(x).requires_grad_() for x in (q, k, v)]
        options = {}
        if bias:
            options["bias"] = torch.zeros(batch, heads, size, size).requires_grad_()
        out = mm.attention(
            *leaves, dropout_p=0.5, generator=torch.Generator().manual_seed(3), backend="triton",
            softmax_scale=1.0, **options,
        )  # fmt: skip
        return [out, *torch.autograd.grad(out, [*leaves, *options.values()], on_device(dout))]

    seed = torch.randint(
        0, 2**63 - 1, (1,), dtype=torch.int64, generator=torch.Generator().manual_seed(3)
    )
    keep = keep_mask(seed, 0.5, batch, heads, size, size)
    (out, _, _, dv, *_), _ = emulated(arch, lambda: call(zeros, zeros, coded, coded))
    assert torch.equal(bits(out * 128), keep)
    assert torch.equal(bits(dv * 128), keep.transpose(2, 3))

    # With v and dout all ones dp is 64, and ds = (keep - share) / 2, where share is the row's.
    share = keep.float().mean(-1, keepdim=True)
    (_, dq, dk, _, *dbias), _ = emulated(arch, lambda: call(zeros, coded, ones, ones))
    assert torch.equal(bits(dq * 2 + 15 * share.transpose(1, 2)), keep)
    if bias:
        assert torch.equal(dbias[0] * 2 + share > 0.5, keep)
    (_, _, dk, _, *_), _ = emulated(arch, lambda: call(coded, zeros, ones, ones))
    weighted = (digits.T @ share).transpose(2, 3)  # (B, H, 1, 64)
    assert torch.equal(bits(dk * 2 + weighted.transpose(1, 2)), keep.transpose(2, 3))


def eager_with_dropout(
    tensors: dict[str, Tensor], keep: Tensor, dropout_p: float
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    q, k, v = (x.transpose(1, 2) for x in leaves.values())
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, -1) * keep / (1 - dropout_p)
    out = (weights @ v).transpose(1, 2)
    lse = torch.logsumexp(scores, -1)
    dout, dlse = cotangents_of(leaves["q"], leaves["v"])
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse.to(lse)))
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=slow)])
def test_dropout_obeys_the_error_rule(arch):
    tensors = qkv((1, 200, 261, 4, 2), 64)

    def options() -> dict[str, Any]:
        return {"dropout_p": 0.3, "generator": torch.Generator().manual_seed(5)}

    got, _ = emulated(arch, lambda: run(tensors, "triton", **options()))
    wide = {name: x.double() for name, x in tensors.items()}
    exact = run(wide, "reference", **options())
    seed = torch.randint(0, 2**63 - 1, (1,), generator=torch.Generator().manual_seed(5))
    eager = eager_with_dropout(tensors, keep_mask(seed, 0.3, 1, 4, 200, 261), 0.3)
    dout, dlse = cotangents_of(tensors["q"], tensors["v"])
    delta = (dout.double() * exact["out"]).sum(-1).transpose(1, 2) - dlse
    rounding = testing.attention_rounding(bf16, exact["lse"], delta)
    for name, x in got.items():
        testing.assert_accurate(name, x, exact[name], eager[name], rounding)


HIDING = {
    "causal": lambda: masks.causal(S),
    "documents": lambda: masks.packed(torch.tensor([0, 1, 70, 70, 200]), total_q=S, total_k=S),
    "ragged": lambda: testing.MASKS["ragged"](*SHAPE[:3]),
}


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize(
    ("arch", "mask", "head_dim"),
    [
        ("sm_90", "causal", 64),
        ("sm_90", "ragged", 64),
        ("sm_80", "documents", 64),
        pytest.param("sm_90", "ragged", 80, marks=slow),
        pytest.param("sm_90", "documents", 128, marks=slow),
        pytest.param("sm_80", "ragged", 80, marks=slow),
    ],
)
def test_nan_reaches_the_rows_that_see_it_and_no_other(arch, mask, head_dim, which):
    built = HIDING[mask]()
    tensors = qkv(SHAPE, head_dim)
    dirty, clean = tensors[which].clone(), tensors[which].clone()
    touched = torch.zeros(2, 4, S, dtype=torch.bool)
    for b, j, h, d in ((0, 12, 0, 3), (0, 150, 1, 5), (1, 199, 0, head_dim - 1)):
        dirty[b, j, h, d], clean[b, j, h, d] = math.nan, 0.0
        touched[b, 2 * h : 2 * h + 2] |= built.to_dense().expand(2, S, S)[b, :, j]
    run_with = functools.partial(run, backend="triton", mask=placed(built))
    got, _ = emulated(arch, lambda: run_with({**tensors, which: on_device(dirty)}))
    wanted, _ = emulated(arch, lambda: run_with({**tensors, which: on_device(clean)}))
    assert touched.any() and not touched.all()
    for name in ("out", "lse", "dq"):
        x, y = (r[name] if name == "lse" else r[name].transpose(1, 2) for r in (got, wanted))
        torch.testing.assert_close(x[~touched], y[~touched], atol=0.03, rtol=0.03)
    assert got["out"].transpose(1, 2)[touched].isnan().any(-1).all()
    assert got["dq"].transpose(1, 2)[touched].isnan().any(-1).all()
    if which == "k":
        assert got["lse"][touched].isnan().all()
    else:
        column = got["out"].transpose(1, 2)[0, :2, :, 4]
        assert column.isfinite().all(), "another column of v"


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_keys_that_no_row_sees_may_hold_anything(arch):
    mask = placed(masks.padding(torch.tensor([130, 0]), S))
    tensors = qkv(SHAPE, 64)
    run_with = functools.partial(run, backend="triton", mask=mask)
    wanted, _ = emulated(arch, lambda: run_with(tensors))
    dirty = {name: x.clone() for name, x in tensors.items()}
    for name in "kv":
        dirty[name][0, 130:], dirty[name][1] = math.nan, math.inf
    got, _ = emulated(arch, lambda: run_with({n: on_device(x) for n, x in dirty.items()}))
    for name, x in got.items():
        torch.testing.assert_close(x, wanted[name], atol=0.02, rtol=0.02)
    assert not got["out"][1].any() and (got["lse"][1] == -torch.inf).all()
    for name in ("dk", "dv"):
        assert not got[name][0, 130:].any() and not got[name][1].any()


@pytest.mark.parametrize(
    ("arch", "head_dim", "mask"),
    [
        ("sm_90", 64, "image spans"),
        ("sm_80", 64, "image spans"),
        pytest.param("sm_90", 80, "ragged", marks=slow),
        pytest.param("sm_90", 128, "none", marks=slow),
    ],
)
def test_every_order_of_warps_gives_the_same_bits(arch, head_dim, mask):
    tensors = qkv(SHAPE, head_dim)
    built = placed(testing.MASKS[mask](*SHAPE[:3]))
    first, *others = (
        emulated(arch, lambda: run(tensors, "triton", mask=built), seed)[0] for seed in (0, 7, 1234)
    )
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


def strided(kind: str, x: Tensor) -> Tensor:
    """x (B, S, H, D) with other strides."""
    batch, length, heads, dim = x.shape
    if kind == "every second element":
        wide = x.new_full((batch, length, heads, 2 * dim), math.nan)
        wide[..., ::2] = x
        return on_device(wide)[..., ::2]
    if kind == "heads first":
        return on_device(x.transpose(1, 2)).transpose(1, 2)
    if kind == "start not aligned":
        flat = x.new_full((x.numel() + 1,), math.nan)
        flat[1:] = x.flatten()
        return on_device(flat)[1:].view(x.shape)
    wide = x.new_full((batch, length, heads + 1, dim + 4), math.nan)  # "part of a wider tensor"
    wide[:, :, 1:, 4:] = x
    return on_device(wide)[:, :, 1:, 4:]


@pytest.mark.parametrize(
    ("arch", "kind", "tma"),
    [
        ("sm_90", "heads first", True),
        ("sm_90", "every second element", False),
        pytest.param("sm_90", "start not aligned", False, marks=slow),
        pytest.param("sm_90", "part of a wider tensor", False, marks=slow),
        pytest.param("sm_80", "every second element", False, marks=slow),
        pytest.param("sm_80", "start not aligned", False, marks=slow),
        ("sm_80", "part of a wider tensor", False),
    ],
)
def test_strides(arch, kind, tma):
    tensors = {name: strided(kind, x) for name, x in qkv((2, 190, S, 4, 2), 64).items()}
    assert all(kind == "start not aligned" or not x.is_contiguous() for x in tensors.values())
    results = check(arch, tensors, placed(masks.causal(190, S)))
    assert copied_by_tma(results) == (MAIN if tma else set())


def test_a_gradient_without_strides():
    """out.sum() sends back one element, expanded: no tensor map can say that."""
    tensors = {name: x.requires_grad_() for name, x in qkv((1, 130, 130, 2, 1), 64).items()}

    def grads(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            mm.attention(**tensors, causal=True, backend=backend).sum(), list(tensors.values())
        )

    got, results = emulated("sm_90", lambda: grads("triton"))
    assert "keys_kernel" not in copied_by_tma(results)
    for x, y in zip(got, grads("reference"), strict=True):
        torch.testing.assert_close(x, y, atol=0.03, rtol=0.03)
