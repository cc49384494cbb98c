"""`VisionEmbeddings` is the front of models of torchvision, transformers and open_clip.

Their parameters go into ours under timm's names; outputs and every gradient must agree.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmkernels.modules import VisionEmbeddings
from tests.modules.embeddings import assert_same, randomize, with_gradients

SIZES = {"image_size": 12, "patch_size": 4, "hidden_size": 8}
TINY = SIZES | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CONV = "patch_embed.proj"


class Front(NamedTuple):
    """Another library's module, and what makes ours of it.

    Attributes:
        theirs: the module that owns the parameters.
        run: (images, masked positions) -> tokens.
        names: their name of a parameter -> ours.
        options: of VisionEmbeddings.
    """

    theirs: nn.Module
    run: Callable
    names: dict[str, str]
    options: dict


def caught(model, module, *, output=False):
    """A function that runs the model and gives what its `module` took, or gave."""

    def run(*inputs):
        found = []
        if output:
            handle = module.register_forward_hook(lambda _, args, out: found.append(out))
        else:
            handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            model(*inputs)
        finally:
            handle.remove()
        return found[0]

    return run


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(12, 4, 1, 2, 8, 8, num_classes=3)
    names = {
        "conv_proj.weight": f"{CONV}.weight",
        "conv_proj.bias": f"{CONV}.bias",
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
    }
    run = caught(model, model.encoder.dropout, output=True)
    return Front(model, lambda x, mask: run(x), names, {})


def open_clip():
    transformer = pytest.importorskip("open_clip.transformer")
    model = transformer.VisionTransformer(12, 4, 8, layers=1, heads=2, mlp_ratio=1.0, output_dim=8)
    names = {
        "conv1.weight": f"{CONV}.weight",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "ln_pre.weight": "norm_pre.weight",
        "ln_pre.bias": "norm_pre.bias",
    }
    run = caught(model, model.ln_pre, output=True)
    options = {"bias": False, "norm_layer": nn.LayerNorm}
    return Front(model, lambda x, mask: run(x), names, options)


def vit():
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTModel(transformers.ViTConfig(**TINY), use_mask_token=True).embeddings
    names = {
        "patch_embeddings.projection.weight": f"{CONV}.weight",
        "patch_embeddings.projection.bias": f"{CONV}.bias",
        "cls_token": "cls_token",
        "position_embeddings": "pos_embed",
        "mask_token": "mask_token",
    }
    return Front(
        model,
        lambda x, mask: model(x, mask, interpolate_pos_encoding=x.shape[2:] != (12, 12)),
        names,
        {"antialias": False, "mask_token": True},
    )


def clip():
    transformers = pytest.importorskip("transformers")
    whole = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY))
    model = getattr(whole, "vision_model", whole)
    names = {
        "embeddings.patch_embedding.weight": f"{CONV}.weight",
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "pre_layrnorm.weight": "norm_pre.weight",
        "pre_layrnorm.bias": "norm_pre.bias",
    }
    return Front(
        model,
        lambda x, mask: model.pre_layrnorm(
            model.embeddings(x, interpolate_pos_encoding=x.shape[2:] != (12, 12))
        ),
        names,
        {"antialias": False, "bias": False, "norm_layer": nn.LayerNorm},
    )


def siglip():
    transformers = pytest.importorskip("transformers")
    whole = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY))
    model = getattr(whole, "vision_model", whole).embeddings
    names = {
        "patch_embedding.weight": f"{CONV}.weight",
        "patch_embedding.bias": f"{CONV}.bias",
        "position_embedding.weight": "pos_embed",
    }
    return Front(
        model,
        lambda x, mask: model(x, interpolate_pos_encoding=x.shape[2:] != (12, 12)),
        names,
        {"antialias": False, "class_token": False},
    )


def dinov2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**TINY, use_mask_token=True)
    model = transformers.Dinov2Model(config).embeddings
    names = {
        "patch_embeddings.projection.weight": f"{CONV}.weight",
        "patch_embeddings.projection.bias": f"{CONV}.bias",
        "cls_token": "cls_token",
        "position_embeddings": "pos_embed",
        "mask_token": "mask_token",
    }
    return Front(model, model, names, {"antialias": False, "mask_token": True})


def dinov3():
    transformers = pytest.importorskip("transformers", minversion="4.56")
    config = transformers.DINOv3ViTConfig(**TINY, num_register_tokens=4)
    model = transformers.DINOv3ViTModel(config).embeddings
    names = {
        "patch_embeddings.weight": f"{CONV}.weight",
        "patch_embeddings.bias": f"{CONV}.bias",
        "cls_token": "cls_token",
        "register_tokens": "reg_token",
        "mask_token": "mask_token",
    }
    return Front(model, model, names, {"reg_tokens": 4, "pos_embed": None, "mask_token": True})


FRONTS = [torchvision_vit, open_clip, vit, clip, siglip, dinov2, dinov3]
ANY_SIZE = [vit, clip, siglip, dinov2, dinov3]
MASKED = [vit, dinov2, dinov3]


def make(front, **options):
    """Theirs, with parameters of order one, and ours with the same."""
    made = front()
    randomize(made.theirs)
    ours = VisionEmbeddings(12, 4, 3, 8, **made.options, **options)
    theirs = dict(made.theirs.named_parameters())
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    state = {new: theirs[old].detach().view(shapes[new]) for old, new in made.names.items()}
    ours.load_state_dict(state, strict=True)
    return made, ours


def compare(front, ours, size, mask=None, dtype=torch.float32):
    x = torch.randn(2, 3, *size, dtype=dtype)
    front.theirs.to(dtype)
    ours.to(dtype)
    names = {
        old: new for old, new in front.names.items() if new != "mask_token" or mask is not None
    }
    theirs = dict(front.theirs.named_parameters())
    mine = dict(ours.named_parameters())
    want = with_gradients(front.run(x, mask), {new: theirs[old] for old, new in names.items()})
    got = with_gradients(ours(x, mask), {new: mine[new] for new in names.values()})
    want = {name: value.view(got[name].shape) for name, value in want.items()}
    assert_same(got, want)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x, mask), got["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("front", FRONTS)
def test_at_its_size(front, dtype):
    compare(*make(front), (12, 12), dtype=dtype)


@pytest.mark.parametrize("size", [(20, 8), (8, 8), (24, 36)])
@pytest.mark.parametrize("front", ANY_SIZE)
def test_at_other_sizes(front, size):
    compare(*make(front, dynamic_img_size=True), size)


@pytest.mark.parametrize("size", [(12, 12), (20, 8)])
@pytest.mark.parametrize("front", MASKED)
def test_with_masked_patches(front, size):
    mask = torch.rand(2, size[0] * size[1] // 16) < 0.5
    compare(*make(front, dynamic_img_size=True), size, mask)
