"""Does every pair of forward and backward backends obey the error rule, under every mask?"""

import itertools

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends, passes

PAIRS = list(itertools.product(backends.ALL, backends.ALL))
if backends.HAS_GPU:  # where the two have their tensors in different places
    PAIRS = [pair for pair in PAIRS if set(pair) != {"triton", "cpu"}]

# batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, value_dim
SHAPES = {
    "odd": (2, 67, 67, 3, 3, 20, 20),
    "grouped": (2, 65, 130, 6, 2, 32, 32),
    "wide values": (1, 33, 70, 4, 1, 16, 40),
    "narrow values": (1, 40, 61, 2, 2, 72, 24),
    "one query": (3, 1, 150, 4, 2, 64, 64),
    "two tiles": (1, 300, 300, 2, 1, 8, 8),
}
# The same in the interpreter: two heads or two batch elements, at most three tiles in a row.
SMALL_SHAPES = {
    "odd": (2, 67, 67, 1, 1, 20, 20),
    "grouped": (1, 35, 70, 4, 2, 32, 32),
    "wide values": (1, 33, 70, 2, 1, 16, 40),
    "narrow values": (1, 40, 61, 2, 2, 72, 24),
    "one query": (2, 1, 90, 2, 1, 64, 64),
    "two tiles": (1, 90, 90, 2, 1, 8, 8),
}


def cases():
    """Every pair on every shape; in the interpreter two different backends on one shape."""
    return [
        backends.param(shape, pair, on=pair, id=f"{shape}-{'-'.join(pair)}")
        for shape, pair in itertools.product(SHAPES, PAIRS)
        if shape == "grouped" or pair[0] == pair[1] or not backends.interpreted(*pair)
    ]


def pairs(*dtypes):
    """Every pair in every dtype that both serve."""
    return [
        backends.param(pair, dtype, on=pair, id=f"{'-'.join(pair)}-{backends.short(dtype)}")
        for pair, dtype in itertools.product(PAIRS, dtypes)
        if all(backends.serves(name, dtype) for name in pair)
    ]


def check(shape, pair, mask, dtype, extra=()):
    sizes = SMALL_SHAPES if backends.interpreted(*pair) else SHAPES
    passes.check(sizes[shape], mask, dtype, *pair, extra)


@pytest.mark.parametrize(("shape", "pair"), cases())
@pytest.mark.parametrize("mask", testing.MASKS)
def test_float32(shape, mask, pair):
    check(shape, pair, mask, torch.float32)


@pytest.mark.parametrize(("pair", "dtype"), pairs(*backends.DTYPES[1:]))
@pytest.mark.parametrize("mask", testing.MASKS)
def test_other_dtypes(mask, pair, dtype):
    check("grouped", pair, mask, dtype)


@pytest.mark.parametrize(("pair", "dtype"), pairs(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("mask", ["none", "causal", "ragged"])
@pytest.mark.parametrize("shape", ["odd", "grouped"])
def test_sinks(shape, mask, pair, dtype):
    check(shape, pair, mask, dtype, ("sinks",))


@backends.each_in((torch.float32, torch.bfloat16, torch.float16), *backends.ALL)
@pytest.mark.parametrize("mask", ["none", "causal", "ragged"])
def test_bias(mask, backend, dtype):
    """cpu gives a bias no gradient."""
    backward = "reference" if backend == "cpu" else backend
    check("grouped", (backend, backward), mask, dtype, ("bias", "sinks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_softmax_scale_that_is_not_positive(scale, dtype):
    """torch's CPU kernel scales its own causal -inf."""
    q, k, v = testing.make_qkv(1, 200, 200, 2, 2, 16, dtype=dtype)
    got = mm.attention(q, k, v, causal=True, softmax_scale=scale, return_lse=True, backend="cpu")
    wide = (x.double() for x in (q, k, v))
    exact = mm.attention(*wide, causal=True, softmax_scale=scale, return_lse=True)
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), other, atol=0.02, rtol=0.02)


@backends.each("cpu", "triton")
def test_lse_gradient_beyond_float16(backend):
    q, k, v = (x.requires_grad_() for x in testing.make_qkv(1, 9, 9, 2, 2, 16, dtype=torch.float16))
    grads = []
    for name in (backend, "reference"):
        _, lse = backends.call(mm.attention, q, k, v, return_lse=True, backend=name)
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
