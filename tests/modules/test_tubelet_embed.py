"""`mm.modules.TubeletEmbed`: Conv3d on video, VideoMAE's and V-JEPA 2's patch embedding."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmkernels.modules import TubeletEmbed, projection
from tests.modules.embeddings import assert_same, randomize, results, with_gradients

SMALL = {
    "img_size": (8, 10), "patch_size": (4, 5), "num_frames": 6, "tubelet_size": 3, "embed_dim": 8,
}  # fmt: skip
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def make(**options):
    return randomize(TubeletEmbed(**SMALL | options))


def convolved(module, x):
    """The same by torch."""
    proj = module.proj
    out = nn.functional.conv3d(x, proj.weight, proj.bias, proj.stride)
    return module.norm(out.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_first", "frames_first", "channels_last"])
@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
@pytest.mark.parametrize("bias", [False, True])
def test_is_a_convolution(bias, norm_layer, layout, dtype):
    module = make(bias=bias, norm_layer=norm_layer).to(dtype)
    x = torch.randn(2, 3, 6, 8, 10, dtype=dtype)
    if layout == "frames_first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    want = with_gradients(convolved(module, x), dict(module.named_parameters()))
    assert_same(results(module, x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videomae(dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=8, patch_size=4, num_frames=6, tubelet_size=2, hidden_size=8,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    )  # fmt: skip
    theirs = transformers.VideoMAEModel(config).embeddings.patch_embeddings
    randomize(theirs).to(dtype)
    ours = TubeletEmbed(8, 4, 6, 2, embed_dim=8, dtype=dtype)
    ours.proj.load_state_dict(theirs.projection.state_dict())
    assert ours.num_patches == theirs.num_patches
    x = torch.randn(2, 6, 3, 8, 8, dtype=dtype)
    want = with_gradients(theirs(x), dict(theirs.projection.named_parameters()))
    got = with_gradients(ours(x.transpose(1, 2)), dict(ours.proj.named_parameters()))
    assert_same(got, want)


def test_any_size():
    module = make(img_size=None)
    assert module.grid_size is module.num_patches is None
    assert module(torch.randn(1, 3, 7, 13, 10)).shape == (1, 2 * 3 * 2, 8)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_bytes(hooked):
    module, plain = make(pixel_mean=MEAN, pixel_std=STD), make()
    plain.load_state_dict(module.state_dict())
    x = torch.randint(0, 256, (2, 3, 6, 8, 10), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (MEAN, STD))
    calls = []
    if hooked:
        module.proj.register_forward_hook(lambda *_: calls.append(0))
    assert_same(results(module, x), results(plain, (x / 255 - mean) / std))
    assert len(calls) == hooked


def test_a_plain_projection_is_not_called(monkeypatch):
    module = make()
    monkeypatch.setattr(projection, "prepared", None)  # which calling it would need
    assert module(torch.randn(2, 3, 6, 8, 10)).isfinite().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    module, x = make(pixel_mean=MEAN, norm_layer=nn.LayerNorm), torch.randn(2, 3, 6, 8, 10)
    assert_same(results(copied(module), x), results(module, x))


def test_compiles_without_a_graph_break():
    module, x = make(), torch.randn(2, 3, 6, 8, 10)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaves = dict(module.named_parameters())
    assert_same(with_gradients(compiled(x), leaves), results(module, x))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 6, 8, 10), ValueError, r"\(B, C, T, H, W\); one .* x\[None\]"),
        (torch.zeros(2, 3, 5, 8, 10), ValueError, r"5 frames of \(8, 10\).*num_frames=6"),
        (torch.zeros(2, 3, 6, 10, 8), ValueError, r"img_size=\(8, 10\).*img_size=None"),
        (torch.zeros(2, 4, 6, 8, 10), ValueError, "4 channels.* weight"),
        (torch.zeros(2, 3, 6, 8, 10, dtype=torch.int32), TypeError, "int32.*uint8"),
        ("video", TypeError, "str; it must be a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_videos(x, error, message):
    with pytest.raises(error, match=message):
        make()(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tubelet_size": 0}, "tubelet_size is 0"),
        ({"num_frames": -1}, "num_frames is -1"),
        ({"patch_size": (1, 2, 3)}, "patch_size is"),
        ({"pixel_std": (0, 1, 1)}, "TubeletEmbed: pixel_std is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
