"""Models of transformers whose configs, masks or arguments mislead."""

import pytest
import torch
from torch import nn

import mmkernels as mm
from tests.integrations.counting import kernel_calls

transformers = pytest.importorskip("transformers", minversion="4.57")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(config=None):
    torch.manual_seed(0)
    return transformers.LlamaModel(config or transformers.LlamaConfig(**SIZES)).eval()


def enlarge(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def clap_text():
    return transformers.ClapTextModel(transformers.ClapTextConfig(**SIZES))


def splinter():
    return transformers.SplinterModel(transformers.SplinterConfig(**SIZES))


def nllb_moe():
    config = transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=2,
        encoder_sparse_step=0, decoder_sparse_step=0, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.NllbMoeModel(config)


def chinese_clip_vision():
    config = transformers.ChineseCLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    return transformers.ChineseCLIPVisionModel(config)


@pytest.mark.parametrize("build", [clap_text, splinter, nllb_moe, chinese_clip_vision])
@pytest.mark.parametrize("given", ["no mask", "a mask of ones"])
def test_causality_is_that_of_eager_attention(build, given):
    """What their layers say of is_causal is not: some say nothing, some the opposite."""
    torch.manual_seed(0)
    model = enlarge(build())
    model.config._attn_implementation = "eager"
    if build is chinese_clip_vision:
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        inputs = {"input_ids": TOKENS}
        if given == "a mask of ones":
            inputs["attention_mask"] = torch.ones_like(TOKENS)
    if build is nllb_moe:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        mm.replace(model)
        got = model(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_arguments_for_the_head_pass_through():
    """Some models hand everything on that they are given."""
    model = llama()
    mm.replace(model)
    with torch.no_grad(), kernel_calls() as calls:
        model(TOKENS, logits_to_keep=0)
    assert calls.attention == 2


class Sparse(nn.Module):
    """An attention layer that says which keys it wants."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x, attention_mask=None):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        q = x[:, None]
        return function(self, q, q, q, attention_mask, indices=torch.zeros(1))[0]


def test_arguments_that_are_not_served_leave_the_model():
    model = llama()
    model.layers[0].self_attn = Sparse(model.config)
    report = mm.replace(model)
    assert not report.swapped
    assert all("passes indices to its attention" in entry.reason for entry in report.left)
    assert model.config._attn_implementation == "sdpa"


class WithoutConfig(nn.Module):
    def forward(self, x):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, x, x, x, None)[0]


def test_interface_without_a_config():
    (left,) = mm.replace(nn.Sequential(WithoutConfig())).left
    assert "no config" in left.reason


def test_part_of_a_model_is_left():
    """Its config is that of its neighbours, too."""
    model = llama()
    (left,) = mm.replace(model.layers[0]).left
    assert "pass that model" in left.reason
    with torch.no_grad(), kernel_calls() as calls:
        model(TOKENS)
    assert calls.by_op == {}


@pytest.mark.parametrize("again", [False, True])
def test_what_was_set_since_is_kept(again):
    model = llama()
    assert model.config._attn_implementation == "sdpa"
    mm.replace(model)
    model.config._attn_implementation = "eager"
    if again:
        mm.replace(model)
        assert model.config._attn_implementation == "mmkernels"
    mm.restore(model)
    assert model.config._attn_implementation == "eager"


def test_another_flash_attention_set_since_is_kept():
    model = llama()
    mm.replace(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    mm.restore(model)
    assert model.config._attn_implementation == "flash_attention_2"
