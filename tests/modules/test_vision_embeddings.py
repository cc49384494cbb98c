"""`mm.modules.VisionEmbeddings`: timm's front of a transformer in one call of the operator."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mmkernels as mm
from mmkernels.modules import VisionEmbeddings, projection
from tests.modules.embeddings import assert_same, outcome, randomize, results, with_gradients

SMALL = {"img_size": (12, 8), "patch_size": 4, "embed_dim": 6}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
TIMM = {
    "plain": {},
    "class_token_only": {"class_token": False},
    "registers": {"reg_tokens": 3},
    "registers_only": {"class_token": False, "reg_tokens": 3},
    "position_on_patches": {"no_embed_class": True},
    "position_on_patches_registers": {"no_embed_class": True, "reg_tokens": 3},
    "no_position": {"pos_embed": "none", "reg_tokens": 3},
    "no_position_no_token": {"pos_embed": "", "class_token": False},
    "dynamic": {"dynamic_img_size": True, "reg_tokens": 2},
    "dynamic_on_patches": {"dynamic_img_size": True, "no_embed_class": True},
    "dynamic_padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "dynamic_no_position": {"dynamic_img_size": True, "pos_embed": "none"},
}


def make(**options):
    return randomize(VisionEmbeddings(**SMALL | options))


def count_calls(module, calls):
    module.register_forward_hook(lambda *_: calls.append("forward"))


@pytest.mark.parametrize("pre_norm", [False, True], ids=["", "pre_norm"])
@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
def test_is_the_front_of_timms(options, pre_norm):
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    theirs = vit(
        **SMALL | options, pre_norm=pre_norm, depth=1, num_heads=1, num_classes=0,
        global_pool="", final_norm=False,
    )  # fmt: skip
    randomize(theirs)
    theirs.blocks = nn.Sequential()
    norm_layer = (lambda *a, **k: nn.LayerNorm(*a, **k, eps=1e-6)) if pre_norm else None
    ours = make(**options, norm_layer=norm_layer, bias=not pre_norm)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    sizes = [(12, 8)]
    if "dynamic_img_size" in options:
        sizes += [(8, 20), (9, 13)] if "dynamic_img_pad" in options else [(8, 20)]
    for size in sizes:
        x = torch.randn(2, 3, *size)
        assert_same(results(ours, x), results(theirs, x))
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs(x), atol=1e-5, rtol=1e-5)
    if "dynamic_img_pad" not in options:
        x = torch.randn(2, 3, 9, 13)
        assert outcome(ours, x) == outcome(theirs, x) and "Input height (9)" in outcome(ours, x)


def test_same_initial_values_as_timm():
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    theirs = vit(reg_tokens=4, depth=0, embed_dim=96)
    ours = VisionEmbeddings(reg_tokens=4, embed_dim=96, mask_token=True)
    for name, parameter in ours.named_parameters():
        if name == "mask_token":
            assert not parameter.any()
            continue
        want = theirs.get_parameter(name)
        torch.testing.assert_close(parameter.std(), want.std(), rtol=0.2, atol=0)
        assert parameter.shape == want.shape


def test_set_input_size_as_timm():
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    theirs = randomize(vit(**SMALL, depth=0, num_classes=0, reg_tokens=1))
    ours = make(reg_tokens=1)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    for options in ({"img_size": (16, 24)}, {"patch_size": 8}, {"img_size": 24, "patch_size": 6}):
        theirs.set_input_size(**options)
        ours.set_input_size(**options)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, theirs.get_parameter(name), atol=1e-5, rtol=1e-5)
    assert ours(torch.randn(1, 3, 24, 24)).shape == (1, 2 + 16, 6)


def test_one_call_writes_the_result(monkeypatch):
    outs = []

    def patch_embed(*arguments, **options):
        outs.append(mm.patch_embed(*arguments, **options))
        return outs[-1]

    monkeypatch.setattr(projection, "patch_embed", patch_embed)
    out = make(reg_tokens=2, mask_token=True)(torch.randn(2, 3, 12, 8), torch.rand(2, 6) < 0.5)
    assert len(outs) == 1 and out is outs[0]


@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM)
@pytest.mark.parametrize("where", ["patch_embed", "patch_embed.proj", "patch_embed.norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_hooks_are_called_and_change_nothing_else(options, where, masked):
    module, calls = make(**options, mask_token=masked), []
    arguments = [torch.randn(2, 3, 12, 8)] + [torch.rand(2, 6) < 0.5] * masked
    want = results(module, *arguments)
    count_calls(module.get_submodule(where), calls)
    assert_same(results(module, *arguments), want)
    assert calls == ["forward"] * len(calls) and calls


def test_a_hook_on_the_patches_acts_before_the_position():
    module, x = make(), torch.randn(2, 3, 12, 8)
    module.patch_embed.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    want = torch.cat((module.cls_token, torch.zeros(1, 6, 6)), 1) + module.pos_embed
    torch.testing.assert_close(module(x), want.expand(2, -1, -1))


@pytest.mark.parametrize("shape", [(2, 6), (1, 6), (6,)])
def test_masked_patches(shape):
    module, x, mask = make(mask_token=True), torch.randn(2, 3, 12, 8), torch.rand(shape) < 0.5
    patches = module.patch_embed(x)
    patches = torch.where(mask[..., None], module.mask_token, patches)
    want = torch.cat((module.cls_token.expand(2, -1, -1), patches), 1) + module.pos_embed
    leaves = dict(module.named_parameters())
    assert_same(with_gradients(module(x, mask), leaves), with_gradients(want, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(12, 8), (16, 20), (10, 7)])
def test_bytes(size, dtype):
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, "reg_tokens": 1}
    module = make(**options, pixel_mean=MEAN, pixel_std=STD)
    plain = make(**options)
    plain.load_state_dict(module.state_dict(), strict=True)
    x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (MEAN, STD))
    want = results(plain, (x / 255 - mean) / std)
    got = results(module.to(dtype), x)
    assert_same({name: value.float() for name, value in got.items()}, want, dtype)


def test_dropout_only_in_training():
    module, x = make(pos_drop_rate=0.5), torch.randn(2, 3, 12, 8)
    assert (module(x) == 0).float().mean() > 0.3
    assert (module.eval()(x) != 0).all()


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_autocast(hooked):
    module, x = make(reg_tokens=1), torch.randn(2, 3, 12, 8)
    if hooked:
        module.patch_embed.proj.register_forward_hook(lambda *_: None)
    want = results(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    got = with_gradients(out, dict(module.named_parameters()))
    assert_same(got | {"out": got["out"].float()}, want, torch.bfloat16)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how):
    module = make(reg_tokens=1, dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 8, 16)
    with torch.no_grad():
        want = module(x)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert len(other.positions) == 0 and len(module.positions) == 1
    with torch.no_grad():
        module.pos_embed.zero_()
        torch.testing.assert_close(other(x), want)


@pytest.mark.parametrize("size", [(12, 8), (8, 16)], ids=["its_grid", "resampled"])
def test_compiles_without_a_graph_break(size):
    module = make(reg_tokens=1, dynamic_img_size=True, mask_token=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    tokens = size[0] * size[1] // 16
    x, mask = torch.randn(2, 3, *size), torch.rand(2, tokens) < 0.5
    assert_same(results(compiled, x, mask), renamed(results(module, x, mask)))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), module.eval()(x))
    torch.compiler.reset()


def renamed(found):
    return {k if k == "out" else f"_orig_mod.{k}": v for k, v in found.items()}


def test_tracing_keeps_nothing():
    module, x = make(dynamic_img_size=True).eval(), torch.randn(2, 3, 8, 16)
    with torch.no_grad():
        torch.compile(module, backend="eager", fullgraph=True)(x)
    assert len(module.positions) == 0
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pos_embed": "sincos"}, r"pos_embed is 'sincos'.*learn"),
        ({"interpolation": "nearest"}, r"interpolation is 'nearest'.*bicubic, bilinear"),
        ({"img_size": None}, r"img_size is None.*dynamic_img_size=True.*pos_embed=None"),
        ({"pixel_std": 0.0}, r"pixel_std is 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_bad_input(hooked):
    module, x = make(mask_token=True), torch.zeros(2, 3, 12, 8)
    if hooked:
        count_calls(module.patch_embed, [])
    with pytest.raises(ValueError, match=r"\(3, 12, 8\).*\(B, C, H, W\).*x\[None\]"):
        module(x[0])
    with pytest.raises(TypeError, match=r"bool_masked_pos is torch.float32.*bool"):
        module(x, torch.zeros(2, 6))
    with pytest.raises(TypeError, match=r"bool_masked_pos is list"):
        module(x, [True])
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        module(x, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"no mask token.*mask_token=True"):
        make()(x, torch.zeros(2, 6, dtype=torch.bool))
