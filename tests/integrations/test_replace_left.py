"""What `mm.replace` must leave as it is, with the reason, and bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmkernels as mm
from tests.integrations.counting import kernel_calls
from tests.integrations.libraries import kernels_of
from tests.integrations.subjects import Attend, hf_vit, inputs, llama, mixed, output, timm_vit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def assert_left(model, x, *reasons, swapped=0):
    """So many entries are swapped; every other has one of the reasons, and no kernel runs in it."""
    with torch.no_grad():
        before = output(model, x)
        report = mm.replace(model)
        assert len(report.swapped) == swapped, report
        assert report.left
        assert all(any(why in entry.reason for why in reasons) for entry in report.left), report
        assert all(any(why in entry.reason for entry in report.left) for why in reasons), report
        with kernel_calls() as calls:
            got = output(model, x)
    assert calls.attention + calls.patch_embed == swapped
    if swapped:
        torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(got, before)
    return report


class ByHand(nn.Module):
    """Softmax of products, written down."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class Routed(nn.Module):
    """No attention: experts are chosen by a softmax."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)

    def forward(self, x):
        weight, _ = self.gate(x).softmax(-1).topk(2)
        return x @ torch.eye(16) * weight.sum(-1, keepdim=True)


class Gate(nn.Module):
    """No attention: a softmax without a product."""

    def forward(self, x):
        return x * x.softmax(-1)


X = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16)


def test_by_hand():
    assert_left(nn.Sequential(ByHand(), Attend()), X, "computes softmax(q k^T) v itself", swapped=1)


@pytest.mark.parametrize("module", [Routed(), Gate(), nn.LSTM(16, 16)], ids=lambda m: m._get_name())
def test_no_attention(module):
    assert mm.replace(nn.Sequential(module)).entries == ()


def test_scripted_part():
    model = nn.Sequential(torch.jit.script(ScriptableAttend()), Attend())
    report = assert_left(model, X, "compiled by TorchScript", swapped=1)
    assert [entry.name for entry in report.left] == ["0"]


class ScriptableAttend(nn.Module):
    """What TorchScript can compile."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_traced_by_fx():
    model = nn.Sequential(torch.fx.symbolic_trace(ScriptableAttend()), Attend())
    assert_left(model, X, "traced by torch.fx", swapped=1)


def test_traced_by_fx_from_outside():
    """A model that was traced whole calls its convolution as a module: that one can change."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    assert len(mm.replace(model).swapped) == 1
    torch.testing.assert_close(model(x), wanted)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("name", ["patches", "multihead.out_proj", "attend.qkv"])
def test_parametrized(name):
    model = mixed()
    module = model.get_submodule(name)
    nn.utils.parametrize.register_parametrization(module, "weight", Halved())
    # Where the module itself does the work; a parametrized layer inside of it does not matter.
    if name == "patches":
        assert_left(model, inputs(model), "it is parametrized", swapped=3)
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    else:
        wanted = model(inputs(model))
        assert len(mm.replace(model).swapped) == 4
        torch.testing.assert_close(model(inputs(model)), wanted, rtol=1e-4, atol=1e-5)
    assert mm.replace(model).left == ()


def test_parametrized_multihead():
    model = mixed()
    nn.utils.parametrize.register_parametrization(model.multihead, "in_proj_weight", Halved())
    assert_left(model, inputs(model), "it is parametrized", swapped=3)


def test_parametrized_after_it_was_replaced():
    """Refused or right, not silently wrong."""
    model = mixed()
    wanted = mixed()
    wanted.load_state_dict(model.state_dict())
    mm.replace(model)
    for one in (model, wanted):
        nn.utils.parametrize.register_parametrization(one.patches, "weight", Halved())
    x = inputs(model)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-5)
    for one in (model, wanted):
        nn.utils.parametrize.remove_parametrizations(one.patches, "weight")
    mm.restore(model)
    assert type(model.patches) is nn.Conv2d
    assert torch.equal(model(x), wanted(x))


def test_restore_under_a_parametrization():
    model, twin = mixed(), mixed()
    twin.load_state_dict(model.state_dict())
    mm.replace(model)
    for one in (model, twin):
        nn.utils.parametrize.register_parametrization(one.patches, "weight", Halved())
    mm.restore(model)
    assert torch.equal(model(inputs(model)), twin(inputs(twin)))


def test_spectral_and_weight_norm():
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm):
        model = nn.Sequential(norm(nn.Conv2d(3, 8, 4, 4))).eval()
        assert_left(model, torch.randn(2, 3, 8, 8), "it is parametrized")


def test_weight_norm_of_old():
    """A hook makes the weight a plain tensor before each call: served as any other."""
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 8, 4, 4))
    x = torch.randn(2, 3, 8, 8)
    wanted = conv(x)
    mm.replace(conv)
    with torch.no_grad():
        conv.weight_g.mul_(2)
    bias = conv.bias.view(8, 1, 1)
    torch.testing.assert_close(conv(x), 2 * (wanted - bias) + bias)


def test_bound_forward():
    model = mixed()
    inner = model.attend.forward
    model.attend.forward = lambda x: inner(x)
    assert_left(model, inputs(model), "has bound another forward", swapped=3)


@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_hooks_of_accelerate(name):
    hooks = pytest.importorskip("accelerate.hooks")
    model = mixed()
    module = model.get_submodule(name)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert_left(model, inputs(model), "hooks of accelerate", swapped=3)
    hooks.remove_hook_from_module(module)
    del module.forward  # which is the class's again, but bound
    assert mm.replace(model).left == ()


@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_hooks_of_accelerate_on_a_replaced_module(name):
    hooks = pytest.importorskip("accelerate.hooks")
    model = mixed()
    x = inputs(model)
    wanted = model(x)
    mm.replace(model)
    hooks.add_hook_to_module(model.get_submodule(name), hooks.ModelHook())
    with kernel_calls() as calls:
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert (calls.attention, calls.patch_embed) == (3, 1)


@pytest.mark.parametrize("removed", [False, True], ids=["", "removed"])
@pytest.mark.parametrize("name", ["patches", "attend", "multihead"])
def test_restore_under_a_hook_of_accelerate(name, removed):
    hooks = pytest.importorskip("accelerate.hooks")
    model = mixed()
    x = inputs(model)
    wanted = model(x)
    mm.replace(model)
    hooks.add_hook_to_module(model.get_submodule(name), hooks.ModelHook())
    if removed:
        hooks.remove_hook_from_module(model.get_submodule(name))
    mm.restore(model)
    assert torch.equal(model(x), wanted)


def test_fused_attn_off():
    model = timm_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    report = assert_left(model, inputs(model), "fused_attn is False", swapped=1)
    assert [entry.kind for entry in report.swapped] == ["patch embedding"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized():
    """The layers around attention change, and with them the class of a multi-head attention."""
    ao = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantized linear layers")
    model = mixed()
    try:
        model = ao.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this torch has no dynamic quantization: {error}")
    x = inputs(model)
    with torch.no_grad():
        wanted = model.attend(model.patches(x).flatten(2).mT)
        report = mm.replace(model)
        with kernels_of(model, report) as ran:
            got = model.attend(model.patches(x).flatten(2).mT)
    assert ran["patches"] == [(0, 1)]
    assert ran["attend"] == [(1, 0)]
    torch.testing.assert_close(got, wanted, rtol=1e-1, atol=2e-2)


@pytest.mark.parametrize("build", [llama, hf_vit])
def test_output_attentions_in_the_config(build):
    model = build(attn_implementation="eager")
    model.config.output_attentions = True
    report = mm.replace(model)
    attention = [entry for entry in report.entries if entry.kind == "attention"]
    assert len(attention) == 2
    assert all(not e.swapped and "output_attentions=True" in e.reason for e in attention)
    with torch.no_grad():
        assert len(model(inputs(model)).attentions) == 2


@pytest.mark.filterwarnings("ignore:.*output_attentions")  # transformers 4 warns first
@pytest.mark.parametrize("build", [llama, hf_vit])
def test_output_attentions_in_a_call(build):
    model = build()
    mm.replace(model)
    transformers = pytest.importorskip("transformers")
    if build is hf_vit and transformers.__version__ < "5":  # which does not hand it on
        with pytest.warns(UserWarning, match="output_attentions=True. is not supported"):
            assert model(inputs(model), output_attentions=True).attentions is None
        return
    with torch.no_grad(), pytest.raises(ValueError, match="output_attentions"):
        model(inputs(model), output_attentions=True)
