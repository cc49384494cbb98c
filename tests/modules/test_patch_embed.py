"""`mm.modules.PatchEmbed` beyond timm: bytes, hooks and wrappers, copies, compilation, autocast."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mmkernels as mm
from mmkernels.modules import PatchEmbed, PatchEmbedWithSize, projection
from tests.modules.embeddings import assert_same, randomize, results, with_gradients

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SMALL = {"img_size": (12, 15), "patch_size": (4, 5), "embed_dim": 6}


def make(**options):
    return randomize(PatchEmbed(**SMALL | options))


def make_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def normalized(x, mean=MEAN, std=STD):
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    return (x / 255 - mean) / std


class Lora(nn.Module):
    """A wrapper as PEFT's, with the wrapped convolution's attributes."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(3, 2, base.kernel_size, base.stride, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


class Standardized(nn.Conv2d):
    """Weight standardisation, as timm's StdConv2d."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride)


def count_calls(module, calls):
    module.register_forward_hook(lambda *_: calls.append("forward"))


def own_forward(module, calls):
    forward = module.forward

    def replaced(x):
        calls.append("own")
        return forward(x)

    module.forward = replaced


HOOKS = {
    "forward": count_calls,
    "pre": lambda module, calls: module.register_forward_pre_hook(lambda *_: calls.append(0)),
    "backward": lambda module, calls: module.register_full_backward_hook(
        lambda *_: calls.append(0)
    ),
    "backward_pre": lambda module, calls: module.register_full_backward_pre_hook(
        lambda *_: calls.append(0)
    ),
    "own_forward": own_forward,
}


@pytest.fixture
def operator_calls(monkeypatch):
    """The keyword arguments of every call of the operator that a module makes."""
    calls = []

    def patch_embed(*arguments, **options):
        calls.append(options)
        return mm.patch_embed(*arguments, **options)

    monkeypatch.setattr(projection, "patch_embed", patch_embed)
    return calls


def test_a_plain_projection_is_not_called(operator_calls):
    embed = make(backend="reference")
    embed(torch.randn(2, 3, 12, 15))
    assert [call["backend"] for call in operator_calls] == ["reference"]


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_of_the_projection_are_called(hook, operator_calls):
    embed, calls = make(), []
    x = torch.randn(2, 3, 12, 15, requires_grad=True)  # or torch warns of the backward hook
    want = results(embed, x)
    operator_calls.clear()
    hook(embed.proj, calls)
    assert_same(results(embed, x), want)
    embed(x).sum().backward()
    assert calls and not operator_calls


def test_a_hook_changes_the_result():
    embed, x = make(), torch.randn(2, 3, 12, 15)
    want = embed(x)
    handle = embed.proj.register_forward_hook(lambda module, inputs, out: 3 * out)
    torch.testing.assert_close(embed(x), 3 * want)
    handle.remove()
    torch.testing.assert_close(embed(x), want)


@pytest.mark.parametrize("options", [{}, {"output_fmt": "NHWC"}, {"dynamic_img_pad": True}])
def test_a_wrapper_is_called(options, operator_calls):
    options = options | {"pixel_mean": MEAN, "pixel_std": STD, "strict_img_size": False}
    embed, x = make(**options), make_bytes(2, 3, 12, 15)
    plain = embed(x)
    embed.proj = Lora(embed.proj)
    nn.init.zeros_(embed.proj.up.weight)
    operator_calls.clear()
    torch.testing.assert_close(embed(x), plain, atol=1e-5, rtol=1e-5)
    nn.init.ones_(embed.proj.up.weight)
    assert (embed(x) - plain).abs().max() > 0.1
    assert not operator_calls


def test_a_parametrisation_acts():
    embed, x = make(bias=False), torch.randn(2, 3, 12, 15)
    want = 2 * embed(x)
    nn.utils.parametrize.register_parametrization(embed.proj, "weight", Doubled())
    torch.testing.assert_close(embed(x), want)


@pytest.mark.parametrize(
    "proj",
    [
        lambda: nn.Conv2d(3, 6, (4, 5), (4, 5), padding=(0, 1)),
        lambda: nn.Conv2d(3, 6, (2, 3), (4, 5), dilation=2),
        lambda: nn.Conv2d(3, 6, (4, 5), (2, 5)),
        lambda: nn.Conv2d(3, 6, (2, 2), padding="valid"),
        lambda: nn.Conv2d(3, 6, (3, 3), padding="same"),
        lambda: nn.Conv2d(3, 6, (4, 5), (4, 5), groups=3),
        lambda: Standardized(3, 6, (4, 5), (4, 5)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.GELU(), nn.Conv2d(4, 6, 2, 2)),
    ],
    ids=["padding", "dilation", "overlap", "valid", "same", "groups", "subclass", "stem"],
)
@pytest.mark.parametrize("pad", [False, True], ids=["", "pad"])
def test_another_projection(proj, pad):
    embed = make(strict_img_size=False, dynamic_img_pad=pad, output_fmt="NCHW")
    embed.proj = randomize(proj())
    x = torch.randn(2, 3, *((13, 16) if pad else (12, 15)))
    out = embed.proj(nn.functional.pad(x, (0, 4, 0, 3)) if pad else x)
    want = with_gradients(out, dict(embed.named_parameters()))
    assert_same(results(embed, x), want)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("size", [(12, 15), (10, 13)])
@pytest.mark.parametrize("statistics", [(None, None), (MEAN, None), (0.5, 0.5), (MEAN, STD)])
def test_bytes(statistics, size, hooked):
    mean, std = statistics
    embed = make(
        pixel_mean=mean, pixel_std=std, dynamic_img_pad=True, strict_img_size=False
    )  # fmt: skip
    plain = make(dynamic_img_pad=True, strict_img_size=False)
    plain.load_state_dict(embed.state_dict(), strict=True)
    if hooked:
        count_calls(embed.proj, [])
    x = make_bytes(2, 3, *size)
    mean, std = (
        numbers if isinstance(numbers, tuple) else (numbers,) * 3
        for numbers in (mean or 0.0, std or 1.0)
    )
    want = results(plain, normalized(x, mean, std))  # which timm's padding then fills with zeros
    assert_same(results(embed, x), want)
    assert_same(results(embed, x.float() / 255), want)


@pytest.mark.parametrize("stride", [(2, 3), 2])
def test_a_stride_set_later(stride):
    """As done to get dense features of a trained model."""
    embed, x = make(output_fmt="NCHW"), torch.randn(2, 3, 12, 15)
    embed.proj.stride = stride
    want = with_gradients(embed.proj(x), {"weight": embed.proj.weight})
    assert_same(with_gradients(embed(x), {"weight": embed.proj.weight}), want)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_pixels_are_cast_to_the_weight(hooked):
    embed = make().double()
    if hooked:
        count_calls(embed.proj, [])
    x = torch.randn(2, 3, 12, 15)
    assert embed(x).dtype == torch.float64
    torch.testing.assert_close(embed(x), embed(x.double()))


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8])
def test_autocast(pixels, hooked):
    embed = make()
    if hooked:
        count_calls(embed.proj, [])
    x = make_bytes(2, 3, 12, 15) if pixels == torch.uint8 else torch.randn(2, 3, 12, 15)
    want = results(embed, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed(x)
    assert out.dtype == torch.bfloat16
    got = with_gradients(out, dict(embed.named_parameters()))
    assert_same(got | {"out": got["out"].float()}, want, torch.bfloat16)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how):
    embed = make(norm_layer=nn.LayerNorm, pixel_mean=MEAN, pixel_std=STD, backend="reference")
    if how == "deepcopy":
        other = copy.deepcopy(embed)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(embed))
    else:
        file = io.BytesIO()
        torch.save(embed, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = make_bytes(2, 3, 12, 15)
    assert_same(results(other, x), results(embed, x))
    assert other.extra_repr() == embed.extra_repr()
    assert other.proj.weight is not embed.proj.weight


@pytest.mark.parametrize("backend, dynamic", [("eager", False), ("aot_eager", None)])
@pytest.mark.parametrize("kind", [PatchEmbed, PatchEmbedWithSize])
def test_compiles_without_a_graph_break(kind, backend, dynamic):
    embed = randomize(kind(None, 4, embed_dim=6, pixel_mean=MEAN, pixel_std=STD))
    compiled = torch.compile(embed, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in [(12, 16), (8, 20)]:
        x = make_bytes(2, 3, *size)
        got, want = compiled(x), embed(x)
        if kind is PatchEmbedWithSize:
            assert got[1] == want[1]
            got, want = got[0], want[0]
        leaves = dict(embed.named_parameters())
        assert_same(*(with_gradients(out, leaves) for out in (got, want)))
    torch.compiler.reset()


def test_exports():
    embed, x = make(), torch.randn(2, 3, 12, 15)
    torch.testing.assert_close(torch.export.export(embed, (x,)).module()(x), embed(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_fmt": "HWC"}, "output_fmt is 'HWC'.*NCHW"),
        ({"patch_size": 0}, "patch_size is 0.*positive"),
        ({"patch_size": (2, 3, 4)}, r"patch_size is \(2, 3, 4\).*2 of them"),
        ({"img_size": 7.5}, "img_size is 7.5"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "PatchEmbed: pixel_std is .* above 0"),
        ({"pixel_mean": (1.0, 0.0)}, "PatchEmbed: pixel_mean is .* 3 channels"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbed(**SMALL | options)


@pytest.mark.parametrize("kind", [PatchEmbed, PatchEmbedWithSize])
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(3, 12, 15), ValueError, r"\(3, 12, 15\); .* \(B, C, H, W\).*x\[None\]"),
        (torch.zeros(1, 9, 60), ValueError, r"must be \(B, C, H, W\)"),
        (torch.zeros(1, 12, 15, 3), (ValueError, AssertionError), "channels|match|divisible"),
        (torch.zeros(1, 4, 12, 15), ValueError, "4 channels.* weight"),
        (torch.zeros(1, 3, 12, 15, dtype=torch.int64), TypeError, "int64.*uint8"),
        (torch.zeros(1, 3, 12, 15, device="meta"), ValueError, "meta.*cpu"),
        ([torch.zeros(3, 12, 15)], TypeError, "list.*patch_embed_varlen"),
    ],
)
def test_bad_images(kind, x, error, message):
    with pytest.raises(error, match=message):
        kind(**SMALL)(x)


def test_an_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="patch must fit"):
        PatchEmbed(None, 4)(torch.zeros(1, 3, 3, 8))


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'fast'"):
        make(backend="fast")(torch.zeros(1, 3, 12, 15))


def test_a_wrapped_weight_is_not_resampled():
    embed = make()
    embed.proj = Lora(embed.proj)
    with pytest.raises(TypeError, match=r"proj is Lora.*before proj is wrapped"):
        embed.set_input_size(patch_size=8)
    embed.set_input_size(img_size=24)
    assert embed.grid_size == (6, 4)
