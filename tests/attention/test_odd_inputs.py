"""Does no input, however odd, crash the process or give a wrong result?"""

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends
from tests.attention.right_calls import integers

masks = mm.masks
BACKENDS = backends.each("reference", "cpu", "auto", "triton")


def expected_rows(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse in float64, row by row."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, groups = k.shape[1], heads // max(k.shape[2], 1)
    out = torch.zeros(batch, seqlen_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen_q):
                last = max(i + 1 + seqlen_k - seqlen_q, 0) if causal else seqlen_k
                if last > 0:
                    scores = k[b, :last, h // groups] @ q[b, i, h] * dim**-0.5
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, i, h] = scores.softmax(0) @ v[b, :last, h // groups]
    return out, lse


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def strided(x: Tensor, *steps: int) -> Tensor:
    """x with every dimension a stride of `steps` times what it needs."""
    room = torch.full([n * step for n, step in zip(x.shape, steps, strict=True)], torch.nan)
    view = room[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(x)


def misaligned(x: Tensor) -> Tensor:
    """x one element behind an aligned address."""
    room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def last_stride_2(x: Tensor) -> Tensor:
    return strided(x, 1, 1, 1, 2)


def transposed(x: Tensor) -> Tensor:
    """The memory of (B, H, D, S), so that the last stride is S."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


ODD = {
    "plain": lambda: (normal(2, 5, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 6)),
    "no rows": lambda: (normal(2, 0, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 6)),
    "no keys": lambda: (normal(2, 5, 4, 8), normal(2, 0, 2, 8), normal(2, 0, 2, 6)),
    "no rows and no keys": lambda: (normal(2, 0, 4, 8), normal(2, 0, 2, 8), normal(2, 0, 2, 8)),
    "no batch": lambda: (normal(0, 5, 4, 8), normal(0, 7, 2, 8), normal(0, 7, 2, 6)),
    "no heads": lambda: (normal(2, 5, 0, 8), normal(2, 7, 0, 8), normal(2, 7, 0, 8)),
    "one of everything": lambda: (normal(1, 1, 1, 1), normal(1, 1, 1, 1), normal(1, 1, 1, 1)),
    "one row": lambda: (normal(2, 1, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)),
    "one key": lambda: (normal(2, 5, 4, 8), normal(2, 1, 4, 8), normal(2, 1, 4, 8)),
    "more rows than keys": lambda: (normal(1, 9, 2, 8), normal(1, 4, 2, 8), normal(1, 4, 2, 8)),
    "wide values": lambda: (normal(2, 5, 2, 3), normal(2, 7, 2, 3), normal(2, 7, 2, 40)),
    "expanded batch": lambda: (
        normal(1, 5, 4, 8).expand(3, -1, -1, -1), normal(1, 7, 4, 8).expand(3, -1, -1, -1),
        normal(1, 7, 4, 8).expand(3, -1, -1, -1),
    ),
    "expanded heads": lambda: (
        normal(2, 5, 4, 8), normal(2, 7, 1, 8).expand(-1, -1, 4, -1),
        normal(2, 7, 1, 8).expand(-1, -1, 4, -1),
    ),
    "expanded rows": lambda: (
        normal(2, 1, 4, 8).expand(-1, 5, -1, -1), normal(2, 1, 4, 8).expand(-1, 7, -1, -1),
        normal(2, 1, 4, 8).expand(-1, 7, -1, -1),
    ),
    "expanded head dim": lambda: (
        normal(2, 5, 4, 1).expand(-1, -1, -1, 8), normal(2, 7, 4, 1).expand(-1, -1, -1, 8),
        normal(2, 7, 4, 1).expand(-1, -1, -1, 8),
    ),
    "strided rows": lambda: tuple(
        strided(normal(2, n, 4, 8), 2, 3, 2, 1) for n in (5, 7, 7)
    ),
    "strided head dim": lambda: tuple(last_stride_2(normal(2, n, 4, 8)) for n in (5, 7, 7)),
    "strided head dim, grouped": lambda: (
        last_stride_2(normal(2, 5, 4, 8)), last_stride_2(normal(2, 7, 2, 8)), normal(2, 7, 2, 8),
    ),
    "head dim not last in memory": lambda: tuple(transposed(normal(2, n, 4, 8)) for n in (5, 7, 7)),
    "head dim not last in memory, wide values": lambda: (
        *(transposed(normal(2, n, 4, 8)) for n in (5, 7)), transposed(normal(2, 7, 4, 11)),
    ),
    "heads before rows": lambda: tuple(
        normal(2, 4, n, 8).transpose(1, 2) for n in (5, 7, 7)
    ),
    "misaligned": lambda: tuple(misaligned(normal(2, n, 4, 8)) for n in (5, 7, 7)),
    "one packed projection": lambda: normal(2, 6, 3, 4, 8).unbind(2),
    "lazily negated": lambda: tuple(
        torch.randn(2, n, 4, 8, dtype=torch.complex64).conj().imag for n in (5, 7, 7)
    ),
    "keys and values are one": lambda: (normal(2, 5, 4, 8), *[normal(2, 7, 2, 8)] * 2),
    "all are one": lambda: (normal(2, 6, 4, 8),) * 3,
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@BACKENDS
@pytest.mark.parametrize("name", ODD)
def test_are_odd_inputs_served_and_right(name, backend, causal):
    with torch.device(testing.device_for(backend)):
        q, k, v = (x.detach() for x in ODD[name]())
    wanted_out, wanted_lse = expected_rows(q, k, v, causal)
    out, lse = mm.attention(q, k, v, causal=causal, backend=backend, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.cpu().double(), wanted_out, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=2e-6, rtol=2e-5)


def gradients(inputs: tuple[Tensor, ...], backend: str, causal: bool, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]  # detach keeps strides and offset
    out, lse = mm.attention(*leaves, causal=causal, backend=backend, return_lse=True)
    lse = lse.where(lse > -torch.inf, 0.0)
    return list(torch.autograd.grad(out.mul(dout).sum() + lse.square().sum(), leaves))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@backends.each("cpu", "auto", "triton")
@pytest.mark.parametrize("name", ODD)
def test_are_gradients_of_odd_inputs_right(name, backend, causal):
    with torch.device(testing.device_for(backend)):
        inputs = ODD[name]()
        dout = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    copies = tuple(x.double().contiguous() for x in inputs)
    wanted = gradients(copies, "reference", causal, dout.double())
    got = gradients(inputs, backend, causal, dout)
    for grad, want, x in zip(got, wanted, inputs, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
        torch.testing.assert_close(grad.double(), want, atol=5e-6, rtol=5e-5)


@BACKENDS
def test_is_the_gradient_of_an_expanded_sum_right(backend):
    q, k, v = (normal(2, n, 4, 8) for n in (5, 7, 7))
    grads = []
    for which, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        # The gradient that reaches attention is one number with strides of 0.
        out = backends.call(mm.attention, *leaves, backend=which)
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for grad, want in zip(*grads, strict=True):
        torch.testing.assert_close(grad.double(), want, atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-30, 3.0])
@backends.each("reference", "cpu", "triton")
def test_is_any_finite_scale_served(backend, scale, causal):
    q, k, v = (normal(1, 7, 2, 8) for _ in range(3))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", *leaves[:2]) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), leaves[2])
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"causal": causal, "softmax_scale": scale, "backend": backend}
    out = backends.call(mm.attention, *leaves, **options)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    for x, y in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-3)


@BACKENDS
def test_are_sequences_of_no_length_served(backend):
    q, k, v = normal(5, 4, 8), normal(7, 2, 8), normal(7, 2, 6)
    cu_q, cu_k = integers(0, 0, 3, 3, 5, 5), integers(0, 2, 2, 2, 7, 7)
    arguments = (q, k, v, cu_q, cu_k, 3, 5)
    out, lse = backends.call(mm.attention_varlen, *arguments, return_lse=True, backend=backend)
    wanted, wanted_lse = expected_rows(q[None, 3:], k[None, 2:], v[None, 2:], causal=False)
    torch.testing.assert_close(out[3:].double(), wanted[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse[:, 3:].double(), wanted_lse[0], atol=2e-6, rtol=2e-5)
    assert not out[:3].any() and (lse[:, :3] == -torch.inf).all()


@BACKENDS
@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (3, 0)], ids=["nothing", "no rows", "no keys"])
def test_are_empty_packings_served(sizes, backend):
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (sizes[0], sizes[1], sizes[1]))
    for cu in (integers(0), integers(0, 0, 0)):
        arguments = (q, k, v, cu, cu, 0, 0)
        out, lse = backends.call(mm.attention_varlen, *arguments, return_lse=True, backend=backend)
        assert not out.any() and (lse == -torch.inf).all()
        assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@BACKENDS
def test_are_empty_caches_served(backend):
    def served(q: Tensor, k: Tensor, v: Tensor, *rest: object, **options: object) -> None:
        arguments = (mm.attention_with_kvcache, q, k, v, *rest)
        out, lse = backends.call(*arguments, return_lse=True, backend=backend, **options)
        assert out.shape == q.shape and not out.any() and (lse == -torch.inf).all()

    q = normal(2, 3, 4, 8)
    table = torch.full((2, 3), -1, dtype=torch.int32)
    served(q, *[normal(2, 0, 2, 8)] * 2)
    served(q, *[normal(2, 5, 2, 8)] * 2, cache_seqlens=0)
    served(q, *[normal(2, 5, 2, 8)] * 2, normal(2, 0, 2, 8), normal(2, 0, 2, 8), cache_seqlens=0)
    served(q, *[normal(4, 2, 2, 8)] * 2, cache_seqlens=0, block_table=table)
    served(q, *[normal(0, 2, 2, 8)] * 2, cache_seqlens=0, block_table=table)
    served(q, *[normal(4, 2, 2, 8)] * 2, cache_seqlens=0, block_table=table[:, :0])
    served(q[:0], *[normal(0, 5, 2, 8)] * 2, cache_seqlens=integers())
    served(q[:0], *[normal(4, 2, 2, 8)] * 2, cache_seqlens=integers(), block_table=table[:0])
    served(q[:, :0], *[normal(2, 5, 2, 8)] * 2, cache_seqlens=integers(2, 3))
