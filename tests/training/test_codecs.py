"""Codecs learn drawings and recordings, the same from the same seed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmkernels.models.audio import silence
from mmkernels.models.config import CodecConfig
from mmkernels.models.generators import AudioCodec, Codec, ImageCodec
from mmkernels.training.codecs import train_audio_codec, train_image_codec
from mmkernels.training.digits import Digits, drawing
from mmkernels.training.speech import SpeechBank

Run = Callable[..., Iterator[tuple[int, float]]]


def strokes() -> Digits:
    """Eight "digits": a row or a column each."""
    images = torch.zeros(8, 8, 8)
    for number in range(4):
        images[number, 2 * number + 1] = 1
        images[4 + number, :, 2 * number] = 1
    return Digits(images, torch.zeros(8, dtype=torch.int64), torch.arange(8))


def tones() -> SpeechBank:
    """Eight "recordings" of lengths from 16 to 44 frames: the lowest 5, 10, … 40 bands."""
    mels = silence(60).repeat(8, 1, 1)
    lengths = torch.arange(16, 48, 4)
    for number in range(8):
        mels[number, : lengths[number], : 5 * number + 5] = 1.0
    return SpeechBank(mels, lengths, torch.zeros(8, dtype=torch.int64), ["v"] * 8, ["s"] * 8)


def image_codec() -> tuple[Run, Codec, Any]:
    torch.manual_seed(0)
    codec = ImageCodec(CodecConfig(3, (8, 8), (5, 5, 5), hidden_size=32, num_layers=1))
    return train_image_codec, codec, strokes()


def audio_codec() -> tuple[Run, Codec, Any]:
    torch.manual_seed(0)
    codec = AudioCodec(CodecConfig(1, (40, 4), (5, 5, 5), hidden_size=32, num_layers=1))
    return train_audio_codec, codec, tones()


BOTH = [image_codec, audio_codec]


def test_drawings_are_learned() -> None:
    train, codec, images = image_codec()
    steps = list(train(codec, images, steps=300, seed=0, batch=16))
    assert [step for step, _ in steps] == list(range(300))
    shown = drawing(images.images, torch.full((8,), 6))
    back = codec.decode(codec.encode(shown))
    blank = shown.float().mean()
    assert (back.float() - shown).abs().mean() < 0.4 * (blank - shown.float()).abs().mean()


def test_recordings_are_learned() -> None:
    train, codec, bank = audio_codec()
    list(train(codec, bank, steps=1000, seed=0, batch=16))
    for mel, length in zip(bank.mels, bank.lengths.tolist(), strict=True):
        back = codec.decode(codec.encode(mel[None, :length]))[0]
        loud = back.mean(0) > float(silence(1).max() + 1.0) / 2
        assert torch.equal(loud, mel[0] == 1.0)


@pytest.mark.parametrize("make", BOTH)
def test_a_seed_gives_the_same_codec(make: Callable[[], tuple[Run, Codec, Any]]) -> None:
    def trained(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        train, codec, data = make()
        losses = [loss for _, loss in train(codec, data, steps=4, seed=seed, batch=4)]
        return losses, codec.state_dict()

    (losses, weights), (again, weights_again) = trained(1), trained(1)
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert trained(2)[0] != losses


@pytest.mark.parametrize("make", BOTH)
def test_labels_are_not_looked_at(make: Callable[[], tuple[Run, Codec, Any]]) -> None:
    losses = []
    for label in (0, 7):
        train, codec, data = make()
        name = "labels" if isinstance(data, Digits) else "digits"
        setattr(data, name, torch.full((8,), label))
        losses.append([loss for _, loss in train(codec, data, steps=3, seed=0, batch=4)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("make", BOTH)
def test_global_chance_is_left_alone(make: Callable[[], tuple[Run, Codec, Any]]) -> None:
    train, codec, data = make()
    before = torch.get_rng_state()
    list(train(codec, data, steps=2, seed=0, batch=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not codec.training
