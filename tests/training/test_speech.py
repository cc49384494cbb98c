"""`training.speech`: whose voices are trained on, what a bank holds, and what `augment` keeps."""

import math
import os
import subprocess
import sys

import pytest
import torch

from mmkernels.models import audio
from mmkernels.models.audio import SAMPLE_RATE, log_mel, trim, write_wav
from mmkernels.training import speech
from mmkernels.training.speech import FRAMES, Clip, SpeechBank, augment


def sound(digit=0, seconds=0.4):
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return 0.3 * torch.sin(2 * math.pi * (200 + 150 * digit) * time)


def batch(count=32):
    lengths = [20 + 4 * (i % 15) for i in range(count)]
    return SpeechBank.of(Clip(sound(i % 10, n / 100 - 0.02), i % 10, "a", "b")
                         for i, n in enumerate(lengths))  # fmt: skip


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for speaker in ("george", "lucas", "theo"):
        for digit in (0, 7):
            for number in (0, 4, 5, 49):
                data = write_wav(sound(digit))
                (folder / f"{digit}_{speaker}_{number}.wav").write_bytes(data)
    return tmp_path


@pytest.fixture
def synthetic(monkeypatch):
    """One short sound for each voice that is asked for."""

    def clips(voices, settings, seed=0):
        return [Clip(sound(3), 3, voice, "espeak") for voice in voices]

    monkeypatch.setattr(speech, "espeak_clips", clips)
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: name == "espeakng_loader")


@pytest.mark.parametrize("quick", [False, True])
def test_voices_are_held_out_whole(recordings, synthetic, quick):
    banks = speech.load(recordings, quick=quick)
    assert set(banks) == {"train", "voices", "real_test", "real_speaker"}
    train, held_out = set(banks["train"].voices), set(banks["voices"].voices)
    assert not train & held_out
    variants = [{voice.partition("+")[2] for voice in of} for of in (train, held_out)]
    assert not (variants[0] & variants[1]) - {""}
    accents = [{voice.partition("+")[0] for voice in of} for of in (train, held_out)]
    assert {"en-gb-scotland", "en-gb-x-gbcwmd"} <= accents[1] - accents[0]
    assert set(banks["real_speaker"].voices) == {"george"}
    assert set(banks["real_test"].voices) == {"lucas", "theo"} <= train


def test_the_official_test_is_not_trained_on(recordings, synthetic):
    banks = speech.load(recordings)
    assert banks["train"].sources.count("fsdd") == 2 * 2 * 2  # of numbers 5 and 49
    assert len(banks["real_test"].digits) == 2 * 2 * 2
    assert len(banks["real_speaker"].digits) == 2 * 4


def test_without_recordings_there_are_synthetic_voices(tmp_path, synthetic):
    assert set(speech.load(tmp_path)) == set(speech.load()) == {"train", "voices"}


def test_reads_names_of_recordings(recordings):
    clips = speech.fsdd_clips(recordings)
    assert len(clips) == 24
    assert {(clip.digit, clip.voice, clip.number) for clip in clips} == {
        (digit, voice, number)
        for digit in (0, 7)
        for voice in ("george", "lucas", "theo")
        for number in (0, 4, 5, 49)
    }
    assert len(clips[0].waveform) == len(sound())


@pytest.mark.parametrize("name", ["10_theo_0", "theo_0", "7_theo", "7_theo_x", "notes"])
def test_refuses_another_name(recordings, name):
    (recordings / "fsdd" / "recordings" / f"{name}.wav").write_bytes(write_wav(sound()))
    with pytest.raises(ValueError, match=f"{name}.wav is not named"):
        speech.fsdd_clips(recordings)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install espeakng-loader"):
        speech.load()


def test_the_fallback_holds_nothing_out(monkeypatch):
    pytest.importorskip("captcha")
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: name == "captcha")
    banks = speech.load()
    assert set(banks) == {"train"}
    assert sorted(banks["train"].digits.tolist()) == list(range(10))


def test_a_bank_is_filled_with_silence():
    clips = [Clip(sound(1, 0.3), 1, "a", "x"), Clip(sound(2, 0.7), 2, "b", "y")]
    bank = SpeechBank.of(clips)
    assert bank.mels.shape == (2, FRAMES, 40)
    for mel, length, clip in zip(bank.mels, bank.lengths.tolist(), clips, strict=True):
        heard = log_mel(trim(clip.waveform))
        assert length % 4 == 0 and 0 <= length - len(heard) < 4
        assert torch.equal(mel[: len(heard)], heard)
        assert torch.equal(mel[len(heard) :], audio.silence(FRAMES - len(heard)))
    assert (bank.digits.tolist(), bank.voices, bank.sources) == ([1, 2], ["a", "b"], ["x", "y"])


def test_a_bank_leaves_out_what_is_too_long():
    bank = SpeechBank.of([Clip(sound(1, 1.3), 1, "a", "x"), Clip(sound(2, 1.1), 2, "b", "x")])
    assert bank.voices == ["b"]
    with pytest.raises(ValueError, match="at most 120 frames"):
        SpeechBank.of([Clip(sound(1, 1.3), 1, "a", "x")])


def test_takes_clips_of_a_bank():
    bank = batch()
    some = bank.take([3, 0])
    assert torch.equal(some.mels, bank.mels[[3, 0]])
    assert some.digits.tolist() == [3, 0]
    assert bank.take([]).mels.shape == (0, FRAMES, 40)


@pytest.mark.parametrize("count, frames", [(1, FRAMES), (32, FRAMES), (5, 60), (5, 22)])
def test_augment_gives_whole_tokens(count, frames):
    bank = batch(count)
    mels, lengths = bank.mels[:, :frames], bank.lengths.clamp(max=frames // 4 * 4)
    before = mels.clone()
    state = torch.get_rng_state()
    for seed in range(20):
        new, long = augment(mels, lengths, chance(seed))
        assert new.shape == mels.shape
        assert new.isfinite().all()
        assert (long % 4 == 0).all() and (long >= 4).all() and (long <= frames).all()
    assert torch.equal(mels, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_chance_is_the_generators():
    bank = batch()
    first, again, other = (augment(bank.mels, bank.lengths, chance(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    # Each clip has its own chance.
    same = augment(bank.mels[:1].repeat(4, 1, 1), bank.lengths[:1].repeat(4), chance())[0]
    assert (same - same.roll(1, 0)).abs().flatten(1).mean(1).min() > 0.05


def test_augment_varies_and_keeps_the_sound():
    """The end of a sound stays its end, and its loudest band moves, but not far."""
    bank = batch(30)
    heard = bank.mels[:, :20].mean(1).argmax(1)
    ratios, moves = [], []
    for seed in range(20):
        new, long = augment(bank.mels, bank.lengths, chance(seed))
        ratios.append(long / bank.lengths)
        loudest = torch.stack(
            [
                mel[: int(n * 0.8)].mean(0).argmax()
                for mel, n in zip(new, long.tolist(), strict=True)
            ]
        )
        moves.append((loudest - heard).abs())
        for mel, n in zip(new, long.tolist(), strict=True):
            if n <= FRAMES - 16:
                assert mel[: n - 8].max() > mel[n + 8 :].max()
    ratio, move = torch.cat(ratios), torch.cat(moves).float()
    assert 0.6 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.7
    assert 0.5 < move.mean() < 4


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader")
    from mmkernels.training.espeak import Espeak

    return Espeak()


def test_every_voice_exists(espeak):
    """For a variant that is none, espeak says nothing and takes the accent's own voice."""
    import pathlib

    import espeakng_loader

    folder = pathlib.Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    assert set(speech.VARIANTS) <= {path.name for path in folder.iterdir()}
    assert set(speech.HELD_OUT_VARIANTS) < set(speech.VARIANTS)
    for accent in speech.ACCENTS + speech.HELD_OUT_ACCENTS:
        assert len(espeak.say("one", accent, rate=150, pitch=50, pitch_range=50)) > 1000
    with pytest.raises(ValueError, match="no voice 'xx'"):
        espeak.say("one", "xx", rate=150, pitch=50, pitch_range=50)


def test_rate_and_pitch_are_heard(espeak):
    def say(**options):
        return espeak.say(
            "nine", "en-us", **({"rate": 150, "pitch": 50, "pitch_range": 50} | options)
        )

    assert len(say(rate=250)) < 0.8 * len(say(rate=120))

    def period(wave):
        middle = wave[len(wave) // 3 :][:800]
        power = torch.fft.rfft(middle, n=2048).abs().square()
        # Shorter ones are of the first formant.
        return int(torch.fft.irfft(power)[40:160].argmax()) + 40

    assert period(say(pitch=90)) < 0.8 * period(say(pitch=10))


@pytest.mark.usefixtures("espeak")
def test_says_every_digit_in_every_voice():
    clips = speech.espeak_clips(["en-us+f3", "en+klatt"], settings=2)
    assert [clip.digit for clip in clips] == list(range(10)) * 4
    assert {clip.voice for clip in clips} == {"en-us+f3", "en+klatt"}
    bank = SpeechBank.of(clips)
    assert len(bank.digits) == 40
    assert len({mel.numpy().tobytes() for mel in bank.mels}) == 40


@pytest.mark.usefixtures("espeak")
def test_is_the_same_in_every_process():
    code = (
        "import hashlib; from mmkernels.training.speech import espeak_clips;"
        "clips = espeak_clips(['en-us+f3', 'en+gustave'], settings=1);"
        "print(hashlib.sha256(b''.join(c.waveform.numpy().tobytes() for c in clips)).hexdigest())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] != ""
