"""Configurations: they go to JSON and back, and those that make no model are refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mmkernels.models.config import (
    MEL_PATCH,
    CodecConfig,
    DecoderConfig,
    EmbedderConfig,
    ModelConfig,
    smol,
    tiny,
)


@pytest.mark.parametrize("config", [tiny(2000), smol()], ids=lambda config: config.name)
def test_json_and_back(config: ModelConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(values) == config


def test_codes_and_marks_fit_into_the_tiny_decoder() -> None:
    config = tiny(2000)
    assert config.image_codec and config.audio_codec
    codes = config.image_codec.num_codes + config.audio_codec.num_codes
    assert config.decoder.vocab_size == 2000 + 4 + codes
    assert config.image_codec.num_codes == 8 * 5 * 5 * 5


def test_adapters_only_where_the_decoder_was_trained_by_others() -> None:
    assert smol().lora_rank and not tiny(100).lora_rank
    assert smol().image_codec is None and smol().audio_codec is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6.*multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim is 15.*even"),
    ],
)
def test_sizes_that_make_no_decoder(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"DecoderConfig: {said}"):
        replace(DecoderConfig(vocab_size=10), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_chans": 0}, "in_chans is 0"),
        ({"patch_size": (8, 0)}, r"patch_size is \(8, 0\)"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size is 100.*num_heads, which is 3"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size is 30.*multiple of 4"),
        ({"mean": 0.5}, "mean is 0.5 and std None"),
        ({"mean": 0.5, "std": 0.0}, "std 0.0"),
    ],
)
def test_sizes_that_make_no_embedder(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"EmbedderConfig: .*{said}"):
        replace(EmbedderConfig(3, (8, 8)), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"levels": ()}, r"levels are \(\)"),
        ({"levels": (8, 1)}, r"levels are \(8, 1\)"),
        ({"patch_size": (0, 4)}, r"patch_size is \(0, 4\)"),
        ({"num_layers": -1}, "num_layers -1"),
    ],
)
def test_sizes_that_make_no_codec(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"CodecConfig: .*{said}"):
        replace(CodecConfig(1, MEL_PATCH), **changes)


def without(key: str) -> dict[str, Any]:
    values = tiny(100).to_dict()
    del values[key]
    return values


def changed(key: str, value: Any) -> dict[str, Any]:
    return {**tiny(100).to_dict(), key: value}


@pytest.mark.parametrize(
    "values",
    [
        {},
        without("decoder"),
        without("image"),
        changed("unknown", 1),
        changed("decoder", None),
        changed("decoder", 3),
        changed("audio", None),
        changed("image_codec", {"in_chans": 3}),
        changed("decoder", {"vocab_size": "many"}),
        [],
        None,
    ],
)
def test_what_is_no_configuration(values: Any) -> None:
    with pytest.raises(ValueError, match="ModelConfig"):
        ModelConfig.from_dict(values)


def test_from_dict_leaves_its_argument_alone() -> None:
    values = json.loads(json.dumps(tiny(100).to_dict()))
    before = json.dumps(values)
    ModelConfig.from_dict(values)
    assert json.dumps(values) == before
