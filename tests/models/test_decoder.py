"""The decoder against transformers' Llama and Qwen3 with the same weights, and its parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels.models.config import DecoderConfig
from mmkernels.models.decoder import AdaptedLinear, Decoder, RMSNorm, initialise, rotate
from mmkernels.models.kernels import EAGER, MMKERNELS, Kernels

CONFIG = DecoderConfig(
    vocab_size=71,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=5000.0,
    rms_norm_eps=1e-3,
    max_position_embeddings=128,
)


def theirs(config: DecoderConfig) -> torch.nn.Module:
    """transformers' model of those sizes, of random weights and norms."""
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in vars(config).items() if key != "qk_norm"}
    family = "Qwen3" if config.qk_norm else "Llama"
    made = getattr(transformers, f"{family}Config")(
        **sizes, tie_word_embeddings=True, attention_bias=False, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if "norm" in name
                else torch.randn_like(parameter) * 0.2
            )
    return model


def logits(decoder: Decoder, ids: Tensor, positions: Tensor, kernels: Kernels) -> Tensor:
    mask = mm.masks.causal(ids.shape[1])
    x = decoder.embed_tokens(ids)
    rotary = decoder.rotary(positions)
    for layer in decoder.layers:
        x = layer(x, rotary, lambda q, k, v: kernels.attention(q, k, v, mask))
    return decoder.logits(decoder.norm(x))


@pytest.mark.parametrize("kernels", [MMKERNELS, EAGER], ids=["kernels", "eager"])
@pytest.mark.parametrize("positions", ["from 0", "from 40", "with gaps"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@torch.no_grad()
def test_same_logits_as_transformers(qk_norm: bool, positions: str, kernels: Kernels) -> None:
    config = replace(CONFIG, qk_norm=qk_norm)
    their = theirs(config)
    decoder = Decoder(config)
    decoder.load_state_dict(their.model.state_dict())
    ids = torch.randint(config.vocab_size, (2, 23))
    places = {
        "from 0": torch.arange(23),
        "from 40": torch.arange(23) + 40,
        "with gaps": torch.arange(23) * 5,
    }[positions].expand(2, -1)
    # All keys are allowed by a mask of ones: without one, gaps would be taken for documents.
    want = their(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits
    got = logits(decoder, ids, places, kernels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert want.std() > 0.5  # else the bound says little


def test_rotation_turns_pairs_by_the_position() -> None:
    decoder = Decoder(CONFIG)
    x = torch.randn(1, 4, 2, 16, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 7, 100]])
    cos, sin = decoder.rotary(positions)
    got = rotate(x, cos, sin)
    frequency = CONFIG.rope_theta ** (-torch.arange(8, dtype=torch.float64) / 8)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(
        torch.ones(1, 4, 1, 8, dtype=torch.float64), positions[..., None, None] * frequency
    )
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-4)
    assert torch.equal(got[:, 0], x[:, 0])


def test_scores_depend_on_distances_alone() -> None:
    decoder = Decoder(CONFIG)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i: int, j: int) -> Tensor:
        at = [decoder.rotary(torch.tensor([[n]])) for n in (i, j)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    assert (score(3, 1) - score(1, 3)).abs() > 1e-2


def test_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64, 1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(5, 64) * 300
    want = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x).double(), want, rtol=1e-5, atol=1e-6)
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, rtol=3e-2, atol=1e-3)


def test_an_adapter_adds_where_its_gate_is_open() -> None:
    layer = AdaptedLinear(8, 6, 2)
    x = torch.randn(2, 3, 8)
    plain = layer(x)
    layer.gate = torch.tensor([[[True]], [[False]]])
    assert torch.equal(layer(x), plain)  # a new adapter adds nothing
    with torch.no_grad():
        layer.lora_b.normal_()
    got = layer(x)
    assert torch.equal(got[1], plain[1])
    torch.testing.assert_close(got[0], plain[0] + x[0] @ layer.lora_a.T @ layer.lora_b.T)


def test_deeper_models_write_less_to_the_residual_stream() -> None:
    decoder = Decoder(replace(CONFIG, hidden_size=96, intermediate_size=192))
    initialise(decoder, 8)
    for layer in decoder.layers:
        for name, fan_in, writes in (
            ("self_attn.q_proj", 96, False),
            ("self_attn.o_proj", 96, True),
            ("mlp.up_proj", 96, False),
            ("mlp.down_proj", 192, True),
        ):
            std = float(layer.get_submodule(name).weight.detach().std())
            want = fan_in**-0.5 * (16**-0.5 if writes else 1)
            assert std == pytest.approx(want, rel=0.1), name
    assert float(decoder.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
