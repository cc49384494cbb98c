"""What becomes of scores that are hidden, capped, lowest or vast, in both passes?"""

import itertools

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import masks, testing
from mmkernels._core import triton_runtime
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from tests.attention import backends

SOFTCAPPED = ("triton", "reference")


def passes(q: Tensor, k: Tensor, v: Tensor, backend: str, dout: Tensor, **options) -> list[Tensor]:
    """out, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = backends.call(mm.attention, *leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(
    ("bad", "dense", "backend"),
    [
        backends.param(bad, dense, name, on=name, id=f"{bad}-{'dense' if dense else 'rows'}-{name}")
        for bad, dense, name in itertools.product(("nan", "inf", "-inf"), (False, True), SOFTCAPPED)
    ],
)
@pytest.mark.parametrize("which", ["k", "v"])
def test_softcap_of_a_hidden_key_reaches_no_gradient(which, bad, dense, backend):
    q, k, v = testing.make_qkv(1, 9, 20, 2, 1, 16)
    mask = masks.padding(torch.tensor([13]), 9, 20)
    options = {"mask": mask.to_dense()[:, None] if dense else mask, "softcap": 5.0}
    dout = torch.randn(1, 9, 2, 16)
    wanted = passes(q, k, v, "reference", dout, **options)
    {"k": k, "v": v}[which][:, 13:] = float(bad)
    for x, y in zip(passes(q, k, v, backend, dout, **options), wanted, strict=True):
        torch.testing.assert_close(x, y, **backends.tolerance(torch.float32))


@backends.each("triton", "cpu", "reference")
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e38, -2e37, -5e36, -1e9])
def test_the_lowest_value_as_a_mask(lowest, backend):
    """As models add it: the rows of left padding hold nothing else, and are their values' mean."""
    length, padding = 24, 10
    q, k, v = testing.make_qkv(1, length, length, 2, 2, 16)
    shown = masks.causal(length).to_dense()[0] & (torch.arange(length) >= padding)
    bias = torch.zeros(1, 1, length, length).masked_fill(~shown, lowest)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias
    ).transpose(1, 2)
    dout = torch.randn(1, length, 2, 16)
    dout[:, :padding] = 0.0  # a loss does not look at padding
    out, *grads = passes(q, k, v, backend, dout, bias=bias)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    exact = passes(q, k, v, "reference", dout, bias=bias.masked_fill(bias < 0, -torch.inf))[1:]
    for x, y in zip(grads, exact, strict=True):
        torch.testing.assert_close(x, y, **backends.tolerance(torch.float32))


def compiled(arch: str, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """out and lse by the compiled kernel, in the emulator."""
    from tests.triton_harness import on_device, ptxsim_launcher

    emulate(ptxsim_launcher(KNOWN_GPUS[arch]))
    try:
        qkv = map(on_device, (q, k, v))
        return mm.attention(*qkv, return_lse=True, backend="triton", **options)
    finally:
        emulate(None)


@pytest.mark.compiled
@pytest.mark.ptxsim
@pytest.mark.skipif(triton_runtime.import_error() is not None, reason="needs triton")
@pytest.mark.parametrize(("size", "right"), [(8e3, True), (1e5, False)])
def test_vast_scores_are_right_or_nan(size, right):
    """Never a row that claims to have no key: up to 2**31 right, beyond it not a number."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 64, generator=generator) for _ in "qkv")
    q, k = (x.sign() * size for x in (q, k))
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    out, lse = compiled("sm_90", q, k, v)
    exact, exact_lse = mm.attention(
        *(x.double() for x in (q, k, v)), return_lse=True, backend="reference"
    )
    assert exact_lse.isfinite().all()
    assert not (lse == -torch.inf).any()
    finite = out.isfinite()
    assert finite.all() or not right
    torch.testing.assert_close(out.double()[finite], exact[finite], atol=0.02, rtol=0.02)
