"""`mm.modules.AudioPatchEmbed`: AST's overlapping patches, and frames of samples."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mmkernels as mm
from mmkernels.modules import AudioPatchEmbed, projection
from tests.modules.embeddings import assert_same, randomize, results, with_gradients

# patch_size, stride
GEOMETRIES = [(4, 3), ((4, 5), (3, 2)), (4, None), (3, 5)]


def make(*arguments, **options):
    return randomize(AudioPatchEmbed(*arguments, embed_dim=8, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_size, stride", GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True])
def test_is_a_convolution_of_the_spectrogram(bias, patch_size, stride, dtype):
    module = make(patch_size, stride, bias=bias, norm_layer=nn.LayerNorm).to(dtype)
    x = torch.randn(2, 21, 14, dtype=dtype)  # (B, time, mel)
    proj = module.proj
    maps = nn.functional.conv2d(x.mT[:, None], proj.weight, proj.bias, stride or patch_size)
    want = module.norm(maps.flatten(2).transpose(1, 2))
    assert_same(results(module, x), with_gradients(want, dict(module.named_parameters())))
    assert module.grid_size(21, 14) == maps.shape[2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_size, stride", [(5, None), (5, 3), (4, 6)])
@pytest.mark.parametrize("channels", [1, 2])
def test_is_a_convolution_of_frames(channels, patch_size, stride, dtype):
    module = make(patch_size, stride, channels, frames=True).to(dtype)
    x = torch.randn(2, 23, channels, dtype=dtype).mT  # interleaved channels
    proj = module.proj
    maps = nn.functional.conv1d(x, proj.weight, proj.bias, stride or patch_size)
    want = with_gradients(maps.mT, dict(module.named_parameters()))
    assert_same(results(module, x), want)
    assert module.grid_size(23) == maps.shape[2:]


def ast():
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        patch_size=4, frequency_stride=3, time_stride=2, max_length=20, num_mel_bins=14,
    )  # fmt: skip
    return randomize(transformers.ASTModel(config).embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ast(dtype):
    """The module is its patch embedding, and the operator all of its embeddings."""
    theirs = ast().to(dtype)
    conv = theirs.patch_embeddings.projection
    ours = AudioPatchEmbed(4, (3, 2), embed_dim=8, dtype=dtype)
    ours.proj.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(2, 20, 14, dtype=dtype)
    want = with_gradients(theirs.patch_embeddings(x), dict(conv.named_parameters()))
    assert_same(with_gradients(ours(x), dict(ours.proj.named_parameters())), want)

    leaves = dict(theirs.named_parameters())
    want = with_gradients(theirs(x), leaves)
    prefix = torch.cat((theirs.cls_token, theirs.distillation_token), 1)
    got = mm.patch_embed(
        x.transpose(1, 2)[:, None], conv.weight, conv.bias, stride=conv.stride,
        prefix_tokens=prefix, pos_embed=theirs.position_embeddings,
    )  # fmt: skip
    assert_same(with_gradients(got, leaves), want)


def test_the_spectrogram_is_not_copied(monkeypatch):
    given = []

    def patch_embed(pixels, *arguments, **options):
        given.append(pixels)
        return mm.patch_embed(pixels, *arguments, **options)

    monkeypatch.setattr(projection, "patch_embed", patch_embed)
    x = torch.randn(2, 20, 14)
    make(4, 3)(x)
    assert given[0].data_ptr() == x.data_ptr() and given[0].shape == (2, 1, 14, 20)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("frames", [False, True])
def test_bytes(frames, hooked):
    options = {"frames": frames, "in_chans": 2 if frames else 1}
    module = make(4, 3, **options, pixel_mean=0.4, pixel_std=0.25)
    plain = make(4, 3, **options)
    plain.load_state_dict(module.state_dict())
    x = torch.randint(0, 256, (2, 2, 20) if frames else (2, 20, 14), dtype=torch.uint8)
    calls = []
    if hooked:
        module.proj.register_forward_hook(lambda *_: calls.append(0))
    assert_same(results(module, x), results(plain, (x / 255 - 0.4) / 0.25))
    assert len(calls) == hooked


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("frames", [False, True])
def test_copies(frames, copied):
    module = make(4, 3, frames=frames, pixel_mean=0.4)
    x = torch.randn(2, 1, 20) if frames else torch.randn(2, 20, 14)
    assert_same(results(copied(module), x), results(module, x))


@pytest.mark.parametrize("frames", [False, True])
def test_compiles_without_a_graph_break(frames):
    module = make(4, 3, frames=frames)
    x = torch.randn(2, 1, 20) if frames else torch.randn(2, 20, 14)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    leaves = dict(module.named_parameters())
    assert_same(with_gradients(compiled(x), leaves), results(module, x))
    torch.compiler.reset()


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(20, 14), ValueError, r"\(20, 14\); it must be \(B, .*x\[None\]"),
        (torch.zeros(2, 1, 20, 14), ValueError, r"\(2, 1, 20, 14\); it must be \(B, "),
        (torch.zeros(2, 1, 3), ValueError, "patch must fit"),
        (torch.zeros(2, 1, 20, dtype=torch.int16), TypeError, "int16.*uint8"),
        ([0.0], TypeError, "list; it must be a torch.Tensor"),
    ],
)
def test_bad_input(frames, x, error, message):
    with pytest.raises(error, match=message):
        make(4, 3, frames=frames)(x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_chans": 2}, "in_chans is 2.*frames=True.*PatchEmbed"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": (4, 4), "frames": True}, r"patch_size is \(4, 4\)"),
        ({"stride": (1, 2, 3)}, r"stride is \(1, 2, 3\)"),
        ({"pixel_std": -1.0}, "AudioPatchEmbed: pixel_std is -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
