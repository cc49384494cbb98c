"""`mm.replace` and PEFT: adapters on what was swapped, and in models that were."""

import copy

import pytest
import torch

import mmkernels as mm
from tests.integrations.counting import kernel_calls
from tests.integrations.subjects import (
    assert_close,
    assert_same_gradients,
    gradients,
    inputs,
    llama,
    mixed,
    output,
    timm_vit,
)

peft = pytest.importorskip("peft")

# name: makes the model, what gets adapters, what is trained whole, and attentions and patch
# embeddings in a forward. The adapter of a patch convolution has another one.
MODELS = {
    "Llama": (llama, ["q_proj", "v_proj"], None, (2, 0)),
    "Llama, head trained": (llama, ["q_proj", "v_proj"], ["lm_head"], (2, 0)),
    "timm ViT": (timm_vit, ["qkv"], None, (2, 1)),
    "timm ViT, patches": (timm_vit, ["qkv", "patch_embed.proj"], ["head"], (2, 2)),
    "timm ViT, patches trained": (timm_vit, ["qkv"], ["patch_embed.proj"], (2, 1)),
    "torch, multi-head": (mixed, ["multihead", "attend.qkv"], None, (3, 1)),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def adapted(model, name):
    """With adapters that already do something."""
    _, targets, whole, _ = MODELS[name]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=whole)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return model


@EVERY
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(name, when):
    build, _, whole, kernels = MODELS[name]
    model = build()
    x = inputs(model)
    theirs = adapted(copy.deepcopy(model), name)
    if when == "before":
        mm.replace(model)
        ours = adapted(model, name)
    else:
        ours = adapted(model, name)
        report = mm.replace(ours)
        # Of what is trained whole there are two, of which one runs.
        assert len(report.swapped) == sum(kernels) + (whole == ["patch_embed.proj"]), report
        assert report.left == ()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    with kernel_calls() as calls:
        got = gradients(ours, x)
    assert calls.attention == kernels[0]
    if when == "after":
        assert calls.patch_embed == kernels[1]
    else:  # PEFT makes adapters of the class that it finds
        assert calls.patch_embed >= min(kernels[1], 1)
    assert any("lora_A" in key for key in got)
    assert_same_gradients(got, gradients(theirs, x))
    with torch.no_grad():
        assert_close(output(ours, x), output(theirs, x))


@EVERY
def test_merged(name):
    """The adapters go into the weights, the wrappers away, and the model stays replaced."""
    build, *_, kernels = MODELS[name]
    model = build()
    x = inputs(model)
    theirs = adapted(copy.deepcopy(model), name)
    ours = copy.deepcopy(theirs)
    mm.replace(ours)
    with torch.no_grad():
        wanted = output(theirs, x)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert_close(output(ours, x), output(theirs, x))
        merged = ours.merge_and_unload()
        with kernel_calls() as calls:
            assert_close(output(merged, x), wanted)
        assert calls.attention == kernels[0]
        assert calls.patch_embed == min(kernels[1], 1)
        mm.restore(merged)
        with kernel_calls() as calls:
            assert_close(output(merged, x), wanted)
        assert calls.by_op == {}


@EVERY
def test_restore_under_adapters(name):
    build, *_ = MODELS[name]
    model = build()
    x = inputs(model)
    ours = adapted(model, name)
    with torch.no_grad():
        wanted = output(ours, x)
        with mm.replaced(ours):
            assert_close(output(ours, x), wanted)
        with kernel_calls() as calls:
            assert torch.equal(output(ours, x), wanted)
    assert calls.by_op == {}
