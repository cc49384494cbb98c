"""A model, recordings and a recipe small enough to be trained in a test."""

import functools
from typing import Any

import torch

from mmkernels.models import config
from mmkernels.models.config import (
    MEL_PATCH,
    CodecConfig,
    DecoderConfig,
    EmbedderConfig,
    ModelConfig,
)
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer
from mmkernels.training import digits, phrases, recipes, run, speech, text
from mmkernels.training.digits import Digits
from mmkernels.training.examples import Material
from mmkernels.training.recipes import Recipe
from mmkernels.training.speech import FRAMES, SpeechBank

TEXT = " ".join(f"{q} {a}" for q, a in phrases.talk()[::7])
RECIPE = Recipe(
    "tiny",
    codec_steps=2,
    judge_steps=3,
    pretrain_steps=3,
    look_steps=2,
    finetune_steps=4,
    pretrain_documents=5,
    finetune_questions=10,
    evaluated=4,
    vocabulary=400,
)


def model_config(text_size: int, codecs: bool = True) -> ModelConfig:
    image_codec = CodecConfig(3, (8, 8), levels=(4, 4), hidden_size=16, num_layers=1)
    audio_codec = CodecConfig(1, MEL_PATCH, levels=(4, 4), hidden_size=16, num_layers=1)
    return ModelConfig(
        name="small",
        decoder=DecoderConfig(
            vocab_size=text_size + (4 + 16 + 16) * codecs,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=16,
        ),
        image=EmbedderConfig(3, (8, 8), hidden_size=32, num_layers=1, num_heads=2),
        audio=EmbedderConfig(1, MEL_PATCH, hidden_size=32, num_layers=1, num_heads=2),
        image_codec=image_codec if codecs else None,
        audio_codec=audio_codec if codecs else None,
    )


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 3, RECIPE.vocabulary)


def model(codecs: bool = True) -> MultimodalModel:
    """A new one, always with the same weights."""
    torch.manual_seed(0)
    return MultimodalModel(model_config(len(tokenizer()), codecs), tokenizer()).eval()


@functools.cache
def images() -> dict[str, Digits]:
    return digits.split()


def bank(voices: tuple[str, ...], source: str = "espeak", seed: int = 0) -> SpeechBank:
    """Every digit once in every voice: a stripe of its own, and noise."""
    generator = torch.Generator().manual_seed(seed)
    count = 10 * len(voices)
    said = torch.arange(10).repeat(len(voices))
    mels = torch.randn(count, FRAMES, 40, generator=generator) * 0.3 - 1
    mels[torch.arange(count), :, said * 4] += 3
    lengths = torch.randint(6, 15, (count,), generator=generator) * 4
    spoken = [voice for voice in voices for _ in range(10)]
    return SpeechBank(mels, lengths, said, spoken, [source] * count)


def banks() -> dict[str, SpeechBank]:
    return {"train": bank(("ann", "bob", "cid")), "voices": bank(("dora", "emil"), seed=1)}


@functools.cache
def material(train: bool = True) -> Material:
    """Of the split and the recordings to train on, or to test on."""
    if train:
        return run.material(model(), images()["train"], banks()["train"])
    return Material(images()["test"], banks()["voices"], phrases.talk(), False)


def install(patch: Any, recipe: Recipe = RECIPE) -> None:
    """Makes `python -m mmkernels train --quick` train the small model by the recipe.

    Args:
        patch: pytest's monkeypatch.
        recipe: what QUICK["tiny"] becomes.
    """
    patch.setitem(recipes.QUICK, "tiny", recipe)
    patch.setattr(config, "tiny", model_config)
    patch.setattr(speech, "load", lambda data=None, quick=False: banks())
    patch.setattr(text, "corpus", lambda data=None: {"topics": TEXT})
    patch.setattr(run, "_ceiling", lambda dtype, device: 1e9)
