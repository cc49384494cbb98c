"""`sdpa_override` reroutes torch's scaled_dot_product_attention, inside its block only."""

import pytest
import torch
import torch.nn.functional as F

from mmkernels.integrations.sdpa import sdpa_override
from tests.integrations.counting import kernel_calls


@pytest.fixture
def calls():
    """What ran on mmkernels."""
    with kernel_calls() as seen:
        yield seen


def inputs(heads_k=4, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7, 16), (2, heads_k, 9, 16), (2, heads_k, 9, 16)
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.5},
        {"attn_mask": torch.ones(7, 9, dtype=torch.bool).tril(3)},
        {"attn_mask": torch.linspace(-1, 1, 63).view(7, 9)},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "bool-mask", "float-mask", "gqa"],
)
def test_same_result(options, calls):
    q, k, v = inputs(heads_k=2 if "enable_gqa" in options else 4)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_override():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert calls.attention == 1
    torch.testing.assert_close(out, wanted)


def test_ends_with_its_block(calls):
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="inside"), sdpa_override():
        raise RuntimeError("inside")
    F.scaled_dot_product_attention(q, k, v)
    assert not calls.by_op


def test_name_imported_beforehand(calls):
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_override():
        scaled_dot_product_attention(*inputs())
    assert calls.attention == 1


def test_backend_by_name():
    q, k, v = inputs()
    with sdpa_override(backend="reference"):
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(ValueError, match="no-such"):
        sdpa_override(backend="no-such")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_modules_of_torch(calls, training, grad):
    """In eval mode and without gradients, too, where they would take a fused path of their own."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.train(training)
    x = torch.randn(2, 5, 32)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        wanted = layer(x, src_key_padding_mask=hidden)
        with sdpa_override():
            out = layer(x, src_key_padding_mask=hidden)
    assert calls.attention == 1
    torch.testing.assert_close(out[~hidden], wanted[~hidden], rtol=1e-4, atol=1e-5)


def timm_model():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)


def torchvision_model():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 64, 96, num_classes=10)
    torch.nn.init.normal_(model.heads.head.weight)
    return model


@pytest.mark.parametrize("factory", [timm_model, torchvision_model])
def test_vision_model(factory, calls):
    model = factory().eval()
    (first, *_) = model.parameters()
    images = torch.randn(2, 3, 32, 32)
    wanted = model(images)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), first)
    with sdpa_override():
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits.square().sum(), first)
    assert calls.attention == 2
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


def test_compiled_without_a_graph_break(calls):
    model, images = timm_model().eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        wanted = model(images)
        with sdpa_override():
            logits = compiled(images)
        assert calls.attention == 2
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images), wanted)
    assert calls.attention == 2
