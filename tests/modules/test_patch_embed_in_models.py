"""`mm.patch_embed` on patches and packed images, as models of transformers and timm take them."""

import pytest
import torch

import mmkernels as mm
from mmkernels.modules.resampling import resampled_positions
from tests.modules.embeddings import assert_same, randomize, with_gradients

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_of", ["linear", "conv"])
def test_siglip2(weight_of, dtype):
    """Patches in the order (y, x, C), positions resampled for each image, and padding."""
    transformers = pytest.importorskip("transformers", minversion="4.49")
    config = transformers.Siglip2VisionConfig(
        hidden_size=8, patch_size=4, num_patches=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    whole = transformers.Siglip2VisionModel(config)
    model = randomize(getattr(whole, "vision_model", whole).embeddings).to(dtype)
    x = torch.randn(3, 12, 48, dtype=dtype)
    shapes = torch.tensor([[3, 4], [2, 5], [4, 2]])
    leaves = dict(model.named_parameters())
    want = with_gradients(model(x, shapes), leaves)

    weight, bias = model.patch_embedding.weight, model.patch_embedding.bias
    positions = []
    for grid in map(tuple, shapes.tolist()):
        table = model.position_embedding.weight[None]
        made = resampled_positions(table, (4, 4), grid, 0, "bilinear", True)
        rest = made[:, :1].expand(-1, 12 - made.shape[1], -1)
        positions.append(torch.cat((made, rest), 1))
    options = {"pos_embed": torch.cat(positions)}
    if weight_of == "conv":
        weight = weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
        options["data_format"] = "channels_last"
    assert_same(with_gradients(mm.patch_embed(x, weight, bias, **options), leaves), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qwen2_vl(dtype):
    """Rows of patches in the order (C, T, y, x), and a weight of Conv3d."""
    qwen2_vl = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    model = randomize(qwen2_vl.PatchEmbed(4, 2, 3, 8)).to(dtype)
    x = torch.randn(10, 3 * 2 * 4 * 4, dtype=dtype)
    leaves = dict(model.named_parameters())
    want = with_gradients(model(x), leaves)
    assert_same(with_gradients(mm.patch_embed(x, model.proj.weight), leaves), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixtral(dtype):
    """Images of mixed size, packed."""
    transformers = pytest.importorskip("transformers", minversion="4.48")
    config = transformers.PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=24, patch_size=4,
    )  # fmt: skip
    model = randomize(transformers.PixtralVisionModel(config)).to(dtype)
    sizes = [(12, 16), (8, 8), (20, 4)]
    images = [torch.randn(3, *size, dtype=dtype) for size in sizes]
    padded = torch.zeros(3, 3, 20, 16, dtype=dtype)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    packed = []
    model.ln_pre.register_forward_pre_hook(lambda module, args: packed.append(args[0]))
    model(padded, torch.tensor(sizes))
    leaves = {"weight": model.patch_conv.weight}
    want = with_gradients(packed[0], leaves)
    tokens, cu_seqlens = mm.patch_embed_varlen(images, model.patch_conv.weight)
    assert cu_seqlens.tolist() == [0, 12, 16, 21]
    assert_same(with_gradients(tokens[None], leaves), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_naflex(dtype):
    """timm's: patches in the order (y, x, C)."""
    naflexvit = pytest.importorskip("timm.models.naflexvit")
    model = naflexvit.NaFlexEmbeds(
        patch_size=4, embed_dim=8, pos_embed="none", proj_type="linear", reg_tokens=2
    )
    randomize(model).to(dtype)
    x = torch.randn(2, 12, 48, dtype=dtype)
    out = model(x, patch_coord=torch.zeros(2, 12, 2, dtype=torch.int64))
    leaves = dict(model.named_parameters())
    want = with_gradients(out[0] if isinstance(out, tuple) else out, leaves)
    prefix = torch.cat((model.cls_token, model.reg_token), 1)
    got = mm.patch_embed(x, model.proj.weight, model.proj.bias, prefix_tokens=prefix)
    assert_same(with_gradients(got, leaves), want)
