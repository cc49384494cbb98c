"""Does every pair of forward and backward backends obey the error rule?"""

import itertools

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops, registry

BACKENDS = [backend.name for backend in registry.backends("attention_forward")]
PAIRS = list(itertools.product(BACKENDS, BACKENDS))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, value_dim
SHAPES = {
    "odd": (2, 67, 67, 3, 3, 20, 20),
    "grouped": (2, 65, 130, 6, 2, 32, 32),
    "wide values": (1, 33, 70, 4, 1, 16, 40),
    "narrow values": (1, 40, 61, 2, 2, 72, 24),
    "one query": (3, 1, 150, 4, 2, 64, 64),
    "two tiles": (1, 300, 300, 2, 1, 8, 8),
}


def run_eager(inputs, mask, extra, cotangents):
    """out, lse and the gradients of eager PyTorch in the inputs' dtype."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    dense = None if mask is None else mask.to_dense()[:, None]
    named = dict(zip(extra, leaves[3:], strict=True))
    out, lse = testing.eager_attention(*leaves[:3], mask=dense, **named)
    results = [(out, cotangents[0]), (lse.where(lse > -torch.inf, 0.0), cotangents[1])]
    tensors, grads = zip(*results, strict=True)
    grads = torch.autograd.grad(
        tensors, leaves, [g.to(t.dtype) for t, g in zip(tensors, grads, strict=True)]
    )
    return [out, lse, *grads]


def run_exact(inputs, mask, extra, cotangents):
    """The reference in float64, under autograd."""
    leaves = [x.double().requires_grad_() for x in inputs]
    named = dict(zip(extra, leaves[3:], strict=True))
    results = mm.attention(*leaves[:3], mask=mask, return_lse=True, backend="reference", **named)
    grads = torch.autograd.grad(results, leaves, [g.double() for g in cotangents])
    return [*results, *grads]


def run_ops(inputs, mask, extra, cotangents, forward, backward):
    """One backend's forward with another one's backward."""
    q, k, v = inputs[:3]
    named = dict(zip(extra, inputs[3:], strict=True))
    bias, sinks = named.get("bias"), named.get("sinks")
    bounds = (None, None) if mask is None else (mask.start, mask.end)
    scores = (bias, None, sinks, None)
    numbers = (q.shape[-1] ** -0.5, 0.0, 0.0)
    out, lse = ops.attention_forward(q, k, v, *bounds, *scores, *numbers, forward)
    dq, dk, dv, dbias, dsinks = ops.attention_backward(
        *cotangents, q, k, v, out, lse, *bounds, None, None, *scores, *numbers,
        bias is not None, True, backward,
    )  # fmt: skip
    extras = {"bias": dbias, "sinks": dsinks}
    return [out, lse, dq, dk, dv, *(extras[name] for name in extra)]


def check(shape, mask_name, dtype, forward, backward, extra=(), seed=0):
    batch, seqlen_q, seqlen_k, heads, _, _, value_dim = shape
    generator = torch.Generator().manual_seed(seed + 1)
    make = {
        "bias": lambda: torch.randn((heads, seqlen_q, seqlen_k), generator=generator)[None],
        "sinks": lambda: torch.randn(heads, generator=generator),
    }
    inputs = [*testing.make_qkv(*shape, dtype=dtype, seed=seed)]
    inputs += [make[name]().to(dtype) for name in extra]
    mask = testing.MASKS[mask_name](batch, seqlen_q, seqlen_k)
    dout = torch.randn((batch, seqlen_q, heads, value_dim), generator=generator).to(dtype)
    dlse = torch.randn((batch, heads, seqlen_q), generator=generator)
    cotangents = (dout, dlse.to(ops.lse_dtype(dtype)))
    arguments = (inputs, mask, extra, cotangents)
    got = run_ops(*arguments, forward, backward)
    exact, eager = run_exact(*arguments), run_eager(*arguments)
    names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in extra)]
    exact = [x.detach() for x in exact]
    delta = (dout.double() * exact[0]).sum(-1).transpose(1, 2) - dlse
    rounding = testing.attention_rounding(dtype, exact[1], delta)
    for name, *values in zip(names, got, exact, eager, strict=True):
        limit = rounding
        if name == "dsinks":  # a sum over all rows, in which large terms cancel
            terms = torch.exp(inputs[-1].double()[:, None] - exact[1]).where(
                exact[1] > -torch.inf, 0
            )
            limit *= float((terms * delta.abs()).sum((0, 2)).max() / values[1].abs().max())
        testing.assert_accurate(name, *values, rounding=limit)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape, mask, pair):
    check(SHAPES[shape], mask, torch.float32, *pair)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("mask", testing.MASKS)
def test_other_dtypes(mask, pair, dtype):
    check(SHAPES["grouped"], mask, dtype, *pair)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "ragged"])
@pytest.mark.parametrize("shape", ["odd", "grouped"])
def test_sinks(shape, mask, dtype):
    for pair in PAIRS:
        check(SHAPES[shape], mask, dtype, *pair, extra=("sinks",))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "ragged"])
@pytest.mark.parametrize("forward", BACKENDS)
def test_bias(forward, mask, dtype):
    check(SHAPES["grouped"], mask, dtype, forward, "reference", extra=("bias", "sinks"))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_softmax_scale_that_is_not_positive(scale, dtype):
    """torch's CPU kernel scales its own causal -inf."""
    q, k, v = testing.make_qkv(1, 200, 200, 2, 2, 16, dtype=dtype)
    got = mm.attention(q, k, v, causal=True, softmax_scale=scale, return_lse=True, backend="cpu")
    wide = (x.double() for x in (q, k, v))
    exact = mm.attention(*wide, causal=True, softmax_scale=scale, return_lse=True)
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), other, atol=0.02, rtol=0.02)


def test_lse_gradient_beyond_float16():
    q, k, v = (x.requires_grad_() for x in testing.make_qkv(1, 9, 9, 2, 2, 16, dtype=torch.float16))
    grads = []
    for backend in ("cpu", "reference"):
        _, lse = mm.attention(q, k, v, return_lse=True, backend=backend)
        grads.append(torch.autograd.grad(lse.sum() * 1e5, q)[0])
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads, rtol=2e-3, atol=10.0)


def test_bias_is_cut_into_tiles_of_keys():
    q, k, v = testing.make_qkv(1, 130, 2100, 2, 2, 8)
    bias = torch.randn(2, 130, 2100)
    bias[:, 5, :1024] = -torch.inf  # a whole tile of row 5
    got = mm.attention(q, k, v, bias=bias, return_lse=True, backend="cpu")
    wanted = mm.attention(q, k, v, bias=bias, return_lse=True, backend="reference")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
