"""Does torch's flash attention op, with the kernels of mmkernels, give torch's results?"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention

if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash attention", allow_module_level=True)

from mmkernels.integrations import torch_flash
from tests.integrations.counting import kernel_calls

SHAPES = {"square": (2, 4, 4, 20, 20), "few key heads": (1, 4, 2, 33, 33), "long": (1, 2, 2, 5, 40)}


@pytest.fixture
def on_cpu():
    """The op has no CPU kernel of torch's, so ours can run there as it would on a GPU."""
    handle = torch_flash.Handle("CPU")
    yield
    handle.remove()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_and_backward(on_cpu, shape, is_causal, scale):
    batch, heads, heads_k, len_q, len_k = shape
    if is_causal and len_q != len_k:
        pytest.skip("torch does not choose its flash kernel then")
    q = torch.randn(batch, heads, len_q, 16, requires_grad=True)
    k, v = (torch.randn(batch, heads_k, len_k, 16, requires_grad=True) for _ in "kv")
    dout = torch.randn(batch, heads, len_q, 16)
    with kernel_calls() as calls:
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, scale=scale
        )[0]
        got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    assert calls.by_op == {"attention_forward": 1, "attention_backward": 1}
    want = F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=heads != heads_k
    )
    want = [want, *torch.autograd.grad(want, (q, k, v), dout)]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_would_have_to_ignore(on_cpu):
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.5"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.5)
    with pytest.raises(ValueError, match="return_debug_mask True"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, False, True)


def test_is_active_only_when_asked_for():
    assert torch_flash.NAME in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None
    attention.activate_flash_attention_impl(torch_flash.NAME)
    try:
        assert attention.current_flash_attention_impl() == torch_flash.NAME
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None


def test_removing_gives_the_op_back():
    q = torch.randn(1, 2, 8, 16)
    torch_flash.Handle("CPU").remove()
    with pytest.raises(NotImplementedError):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)


@pytest.mark.gpu
def test_on_a_gpu():
    q, k, v = (
        torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        for _ in "qkv"
    )
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    attention.activate_flash_attention_impl(torch_flash.NAME)
    try:
        with (
            attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION),
            kernel_calls() as calls,
        ):
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            got.sum().backward()
    finally:
        attention.restore_flash_attention_impl()
    assert calls.by_op == {"attention_forward": 1, "attention_backward": 1}
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
