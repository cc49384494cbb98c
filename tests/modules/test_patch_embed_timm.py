"""`mm.modules.PatchEmbed` is timm's: results, attributes, methods and messages."""

import itertools

import pytest
import torch
from torch import nn

timm_layers = pytest.importorskip("timm.layers")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from mmkernels.modules import PatchEmbed, PatchEmbedWithSize  # noqa: E402
from tests.modules.embeddings import (  # noqa: E402
    assert_same,
    outcome,
    randomize,
    results,
    with_gradients,
)

FORMATS = {
    "tokens": ({}, nn.LayerNorm),
    "maps": ({"flatten": False}, nn.BatchNorm2d),
    "NCHW": ({"output_fmt": "NCHW"}, nn.BatchNorm2d),
    "NHWC": ({"output_fmt": "NHWC"}, nn.LayerNorm),
    "NCL": ({"output_fmt": "NCL"}, nn.BatchNorm1d),
    "NLC": ({"output_fmt": "NLC", "flatten": False}, nn.LayerNorm),
}
GEOMETRIES = {
    "square": {"img_size": 12, "patch_size": 4},
    "rectangular": {"img_size": (12, 15), "patch_size": (4, 5)},
    "with_a_rest": {"img_size": (14, 17), "patch_size": (4, 5)},
    "any_size": {"img_size": None, "patch_size": (4, 5)},
}
# Expected, whole patches, neither, smaller than a patch.
IMAGES = [(12, 12), (12, 15), (14, 17), (8, 20), (13, 18), (8, 8)]
ATTRIBUTES = (
    "patch_size", "img_size", "grid_size", "num_patches", "flatten", "output_fmt",
    "strict_img_size", "dynamic_img_pad",
)  # fmt: skip
VITS = {
    "plain": {},
    "dynamic": {"dynamic_img_size": True},
    "dynamic_padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "clip": {"pre_norm": True},
    "embed_norm": {"embed_norm_layer": nn.LayerNorm},
}


def make_pair(**options):
    theirs = randomize(timm_layers.PatchEmbed(in_chans=2, embed_dim=6, **options))
    ours = PatchEmbed(in_chans=2, embed_dim=6, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same_state(ours, theirs):
    assert_same(ours.state_dict(), theirs.state_dict())


def assert_same_attributes(ours, theirs):
    assert {name: getattr(ours, name) for name in ATTRIBUTES} == {
        name: getattr(theirs, name) for name in ATTRIBUTES
    }


def assert_same_on_images(ours, theirs):
    """Equal results or equal messages; both kinds must occur somewhere in a test."""
    kinds = set()
    for size in IMAGES:
        x = torch.randn(2, 2, *size)
        want = outcome(results, theirs, x)
        kinds.add(type(want))
        got = outcome(results, ours, x)
        if isinstance(want, str):
            assert got == want
        else:
            assert_same(got, want)
    return kinds


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("options, norm", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("normed", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    "strict, pad",
    list(itertools.product([False, True], repeat=2)),
    ids=["", "pad", "strict", "both"],
)
def test_results_and_messages(geometry, options, norm, normed, bias, strict, pad):
    theirs, ours = make_pair(
        **geometry, **options, bias=bias, norm_layer=norm if normed else None,
        strict_img_size=strict, dynamic_img_pad=pad,
    )  # fmt: skip
    assert_same_attributes(ours, theirs)
    assert_same_on_images(ours, theirs)
    assert_same_state(ours, theirs)  # batch norms count
    for size in IMAGES:
        assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size)
    assert ours.feat_ratio() == theirs.feat_ratio()
    assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)


def test_messages_are_among_what_was_compared():
    theirs, ours = make_pair(**GEOMETRIES["rectangular"], strict_img_size=False)
    assert assert_same_on_images(ours, theirs) == {str, dict}
    theirs, ours = make_pair(**GEOMETRIES["rectangular"])
    assert assert_same_on_images(ours, theirs) == {str, dict}


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_the_same_seed_initialises_alike(bias):
    torch.manual_seed(3)
    theirs = timm_layers.PatchEmbed(16, 4, 3, 8, nn.LayerNorm, bias=bias)
    torch.manual_seed(3)
    ours = PatchEmbed(16, 4, 3, 8, nn.LayerNorm, bias=bias)
    assert_same_state(ours, theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(randomize(ours).state_dict(), strict=True)
    x = torch.randn(1, 3, 16, 16)
    assert_same(results(ours, x), results(theirs, x))


def test_options_by_position():
    options = (16, 4, 3, 8, None, False, "NHWC", False, False, True, "meta", torch.bfloat16)
    theirs, ours = timm_layers.PatchEmbed(*options), PatchEmbed(*options)
    assert_same_attributes(ours, theirs)
    assert ours.proj.weight.is_meta and ours.proj.weight.dtype == torch.bfloat16
    assert ours.proj.bias is None
    sized = (16, 4, 3, 8, None, False, "NHWC", False, "meta", torch.bfloat16)
    theirs, ours = timm_layers.PatchEmbedWithSize(*sized), PatchEmbedWithSize(*sized)
    assert_same_attributes(ours, theirs)
    assert ours.proj.weight.is_meta and ours.proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "calls",
    [
        [{"img_size": 16}],
        [{"img_size": (20, 8)}],
        [{"patch_size": 4}],
        [{"patch_size": (3, 5)}],
        [{"img_size": (18, 25), "patch_size": (6, 5)}],
        [{"patch_size": 8}, {"img_size": 24}, {"patch_size": 4}],
        [{}],
    ],
)
@pytest.mark.parametrize("img_size", [12, None])
@pytest.mark.filterwarnings("ignore:.*resiz.*")
def test_set_input_size(calls, img_size):
    theirs, ours = make_pair(img_size=img_size, patch_size=4)
    for module in (theirs, ours):
        module.proj.bias.requires_grad_(False)
        for call in calls:
            module.set_input_size(**call)
    assert_same_attributes(ours, theirs)
    assert_same_state(ours, theirs)
    assert ours.proj.kernel_size == theirs.proj.kernel_size
    assert ours.proj.stride == theirs.proj.stride
    assert ours.proj.weight.requires_grad and not ours.proj.bias.requires_grad
    x = torch.randn(2, 2, *(theirs.img_size or (16, 16)))
    leaves = [{"weight": module.proj.weight} for module in (ours, theirs)]
    assert_same(
        *(with_gradients(m(x), leaf) for m, leaf in zip((ours, theirs), leaves, strict=True))
    )


@pytest.mark.parametrize("options, norm", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_with_size(options, norm, geometry):
    options = {"in_chans": 2, "embed_dim": 6, "norm_layer": norm} | geometry | options
    theirs = randomize(timm_layers.PatchEmbedWithSize(**options))
    ours = PatchEmbedWithSize(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_attributes(ours, theirs)
    for size in IMAGES:
        x = torch.randn(2, 2, *size)
        want, got = outcome(theirs, x), outcome(ours, x)
        if isinstance(want, str):
            assert got == want
            continue
        assert got[1] == want[1] and type(got[1]) is type(want[1])
        parameters = (dict(module.named_parameters()) for module in (ours, theirs))
        assert_same(*map(with_gradients, (got[0], want[0]), parameters))


@pytest.mark.parametrize("how", ["swapped", "embed_layer", "class_changed"])
@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_in_a_vision_transformer(options, how):
    options = options | {
        "img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2,
        "num_classes": 5,
    }  # fmt: skip
    theirs = randomize(VisionTransformer(**options))
    ours = VisionTransformer(**options, embed_layer=PatchEmbed)
    if how != "embed_layer":
        made, ours = ours.patch_embed, VisionTransformer(**options)
        if how == "swapped":
            ours.patch_embed = made
        else:
            ours.patch_embed.__class__ = PatchEmbed
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert type(ours.patch_embed) is PatchEmbed
    sizes = [(16, 16)]
    if "dynamic_img_size" in options:
        sizes += [(12, 20), (14, 17)] if "dynamic_img_pad" in options else [(12, 20)]
    for size in sizes:
        x = torch.randn(2, 3, *size)
        assert_same(results(ours, x), results(theirs, x))


def test_in_a_vision_transformer_of_another_size():
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    theirs = randomize(VisionTransformer(**options))
    ours = VisionTransformer(**options, embed_layer=PatchEmbed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (theirs, ours):
        model.set_input_size(img_size=(24, 36), patch_size=6)
    x = torch.randn(2, 3, 24, 36)
    assert_same(results(ours, x), results(theirs, x))


def test_in_bfloat16():
    theirs, ours = (m.bfloat16() for m in make_pair(img_size=12, patch_size=4))
    x = torch.randn(2, 2, 12, 12, dtype=torch.bfloat16)
    assert_same(results(ours, x), results(theirs, x))


def test_gradient_of_the_images():
    theirs, ours = make_pair(img_size=(12, 15), patch_size=(4, 5))
    x = torch.randn(2, 2, 12, 15, requires_grad=True)
    assert_same(*(with_gradients(module(x), {"x": x}) for module in (ours, theirs)))
