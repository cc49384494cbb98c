"""`models.audio`: WAV files, good and broken; log-mels, and sound from them."""

import math
import struct

import pytest
import torch

from mmkernels.models import audio
from mmkernels.models.audio import SAMPLE_RATE, griffin_lim, log_mel, read_wav, trim, write_wav

PCM, FLOAT, A_LAW, EXTENSIBLE = 1, 3, 6, 0xFFFE


def tone(hertz, seconds=0.5, rate=SAMPLE_RATE, loud=0.5):
    return loud * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def vowel(seconds=0.4, pitch=120, formants=(600, 1200, 2500)):
    """Harmonics with peaks where a mouth has them, swelling and fading."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = torch.zeros_like(time)
    for harmonic in range(1, int(3800 / pitch)):
        hertz = harmonic * pitch
        loud = sum(1 / (1 + ((hertz - f) / 150) ** 2) for f in formants)
        wave += loud * torch.sin(2 * math.pi * hertz * time + harmonic**2)
    return 0.1 * wave * torch.sin(math.pi * time / seconds)


def encoded(samples, kind, bits):
    """Samples in [-1, 1] as a WAV file holds them."""
    if kind == FLOAT:
        return samples.numpy().tobytes()
    if bits == 8:
        return (samples * 127 + 128).round().to(torch.uint8).numpy().tobytes()
    whole = (samples.double() * (2 ** (bits - 1) - 1)).round().to(torch.int32)
    size = bits // 8
    return b"".join(struct.pack("<i", value)[:size] for value in whole.tolist())


def wav(
    samples=b"\0\0" * 100, kind=PCM, bits=16, channels=1, rate=SAMPLE_RATE, claim=None, extra=b""
):
    frame = channels * bits // 8
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * frame, frame, bits) + extra
    claim = len(samples) if claim is None else claim
    body = b"fmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", claim) + samples
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind, bits", [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32)])
def test_reads_every_encoding(kind, bits, channels):
    want = tone(440)
    data = encoded(want.repeat_interleave(channels), kind, bits)
    torch.testing.assert_close(read_wav(wav(data, kind, bits, channels)), want, atol=0.01, rtol=0)


@pytest.mark.parametrize("kind, bits", [(PCM, 16), (FLOAT, 32)])
def test_reads_the_extensible_format(kind, bits):
    guid = struct.pack("<H", kind) + bytes(14)
    extra = struct.pack("<HHI", 22, bits, 0) + guid
    data = wav(encoded(tone(440), kind, bits), EXTENSIBLE, bits, extra=extra)
    torch.testing.assert_close(read_wav(data), tone(440), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 16000, 22050, 44100, 44101, 48000, 192000])
def test_reads_every_rate(rate):
    read = read_wav(wav(encoded(tone(440, rate=rate), FLOAT, 32), FLOAT, 32, rate=rate))
    inner = slice(400, -400)  # the ends ring
    torch.testing.assert_close(read[inner], tone(440)[inner], atol=0.01, rtol=0)
    assert len(read) == len(tone(440))


def test_averages_channels():
    data = encoded(torch.stack((tone(440), torch.zeros(4000)), 1).flatten(), PCM, 16)
    torch.testing.assert_close(read_wav(wav(data, channels=2)), tone(440) / 2, atol=1e-3, rtol=0)


def test_reads_a_path(tmp_path):
    (tmp_path / "a.wav").write_bytes(write_wav(tone(440)))
    torch.testing.assert_close(read_wav(tmp_path / "a.wav"), tone(440), atol=1e-3, rtol=0)


def test_writes_what_it_reads():
    once = write_wav(torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0]))
    read = read_wav(once)
    torch.testing.assert_close(
        read, torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1.0]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("claim", [0xFFFFFFFF, 0x7FFFFFFF, 201])
def test_takes_what_is_there_whatever_the_file_claims(claim):
    assert len(read_wav(wav(claim=claim))) == 100


def test_ignores_other_chunks_and_half_samples():
    plain = wav(b"\1\0" * 100 + b"\7")
    other = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # an odd size is padded
    data = plain[:12] + other + plain[12:] + other
    torch.testing.assert_close(read_wav(data), torch.full((100,), 1 / 32768))


def test_makes_floats_beyond_one_softer():
    wave = tone(440, loud=3e38)
    read = read_wav(wav(encoded(wave, FLOAT, 32), FLOAT, 32, rate=16000))
    assert read.isfinite().all()
    assert 0.9 < read.abs().max() <= 1


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "no WAV file"),
        (b"RIFF", "no WAV file"),
        (b"\xff\xfb\x90\x00" * 20, "no WAV file"),  # MP3
        (b"RIFX" + wav()[4:], "big-endian"),
        (wav()[:12], "no format chunk"),
        (wav()[:20], "no format chunk"),
        (wav()[:36], "no data chunk"),
        (wav(b""), "no samples"),
        (wav(b"\0"), "no samples"),
        (wav(b"\0\0", channels=2), "no samples"),
        (wav(rate=3999), "3999 samples a second"),
        (wav(rate=192_001), "192001 samples a second"),
        (wav(rate=0), "0 samples a second"),
        (wav(channels=0), "0 channels"),
        (wav(channels=17), "17 channels"),
        (wav(kind=A_LAW, bits=8), "encoding 6 with 8 bits"),
        (wav(kind=FLOAT, bits=64), "encoding 3 with 64 bits"),
        (wav(bits=12), "encoding 1 with 12 bits"),
        (wav(bits=0), "encoding 1 with 0 bits"),
        (wav(kind=EXTENSIBLE), "encoding 65534"),
        (wav(struct.pack("<f", math.nan) * 9, FLOAT, 32), "NaN"),
        (wav(struct.pack("<f", -math.inf) * 9, FLOAT, 32), "NaN"),
        (wav(b"\0" * (30 * 8000 + 1), bits=8), "at most 30"),
    ],
)
def test_refuses_what_it_cannot_read(data, why):
    with pytest.raises(ValueError, match=why):
        read_wav(data)


def test_every_byte_string_is_read_or_refused():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(st.binary(max_size=40), st.integers(0, 60), st.integers(0, 60))
    def check(junk, begin, end):
        data = wav(b"\1\2\3\4" * 4)
        try:
            read = read_wav(data[:begin] + junk + data[end:])
        except ValueError:
            return
        assert len(read) and read.abs().max() <= 1

    check()


def test_resampling_does_not_fold():
    folded = audio.resample(tone(6000, rate=22050), 22050, SAMPLE_RATE)
    assert folded[400:-400].abs().max() < 0.01


def test_trim_cuts_the_quiet_and_sets_the_loudness():
    hiss = 1e-3 * torch.randn(8000)
    sound = torch.cat((hiss[:4000], vowel(), hiss[4000:]))
    for factor in (1.0, 0.02):
        kept = trim(sound * factor + 0.05)
        assert 0.7 * len(vowel()) < len(kept) < 1.2 * len(vowel())
        assert kept.square().mean().sqrt() == pytest.approx(0.1, rel=1e-3)


def test_trim_cuts_clicks_off_but_no_part_of_a_word():
    quiet, click = torch.zeros(4000), torch.full((20,), 0.5)
    sound = vowel()
    around = torch.cat((quiet, click, quiet, sound, quiet, click, quiet))
    assert len(trim(around)) < 1.2 * len(sound)
    # Two words, and the release of a stop after its closure.
    assert len(trim(torch.cat((sound, quiet, sound)))) > 1.8 * len(sound) + len(quiet)
    assert len(trim(torch.cat((sound, quiet[:800], click)))) > 0.9 * len(sound) + 800
    assert len(trim(torch.cat((quiet, click, quiet)))) < 800


@pytest.mark.parametrize("length", [2, 79, 80, 81, 997])
def test_trim_takes_any_length(length):
    assert 0 < len(trim(torch.randn(length) + torch.tensor([1.0] * (length - 1) + [-1]))) <= length


@pytest.mark.parametrize(
    "waveform, why",
    [
        (torch.zeros(0), "silent"),
        (torch.zeros(1), "silent"),
        (torch.zeros(8000), "silent"),
        (torch.full((8000,), 0.5), "silent"),
        (torch.full((8000,), 1e-5).cumsum(0) % 3e-5, "silent"),
        (torch.tensor([0.1, math.nan]), "NaN"),
        (torch.zeros(2, 80), r"\(2, 80\)"),
        (torch.zeros(80, dtype=torch.int16), "int16"),
    ],
)
def test_trim_refuses_silence_and_what_is_no_waveform(waveform, why):
    with pytest.raises(ValueError, match=why):
        trim(waveform)


@pytest.mark.parametrize("length", [1, 79, 80, 81, 800, 997])
def test_has_a_frame_every_ten_milliseconds(length):
    waves = torch.randn(3, length)
    mels = log_mel(waves)
    assert mels.shape == (3, length // 80 + 1, 40)
    torch.testing.assert_close(mels[1], log_mel(waves[1]))


def test_bands_rise_with_frequency():
    loudest = [int(log_mel(tone(hertz))[10].argmax()) for hertz in (100, 300, 800, 2000, 3700)]
    assert loudest == sorted(set(loudest))
    assert loudest[0] <= 2
    assert loudest[-1] >= 37


def test_a_louder_sound_is_a_sum():
    mel, louder = log_mel(tone(440, loud=0.1)), log_mel(tone(440, loud=0.5))
    band = int(mel[10].argmax())
    assert louder[10, band] - mel[10, band] == pytest.approx(2 * math.log(5) / audio.STD, rel=1e-3)


def test_silence_is_the_lowest():
    silence = audio.silence(5)
    assert silence.shape == (5, 40)
    assert (silence == log_mel(torch.zeros(400))[:5]).all()
    assert log_mel(torch.randn(800)).min() >= silence.max()


def test_prepare_fills_up_to_whole_tokens():
    for frames in range(20, 25):
        mel = audio.prepare(vowel(frames / 100))
        assert len(mel) % 4 == 0
        exact = log_mel(trim(vowel(frames / 100)))
        assert torch.equal(mel[: len(exact)], exact)
        assert torch.equal(mel[len(exact) :], audio.silence(len(mel) - len(exact)))


@pytest.mark.parametrize("pitch", [90, 210])
def test_griffin_lim_repeats_the_log_mel(pitch):
    mel = log_mel(trim(vowel(pitch=pitch)))
    again = log_mel(griffin_lim(mel))
    assert len(again) == len(mel)
    assert (again - mel).abs().mean() < 0.15  # of a standard deviation
    assert torch.equal(griffin_lim(mel), griffin_lim(mel))


def test_griffin_lim_of_silence_is_silent():
    assert griffin_lim(audio.silence(8)).abs().max() < 1e-4


def test_griffin_lim_stays_within_one():
    for mel in (torch.full((9, 40), 1e4), torch.full((2, 40), 3.0), torch.full((9, 40), -1e4)):
        sound = griffin_lim(mel)
        assert sound.isfinite().all()
        assert sound.abs().max() <= 1


@pytest.mark.parametrize(
    "mel, why",
    [
        (torch.zeros(1, 40), r"\(1, 40\)"),
        (torch.zeros(8, 41), r"\(8, 41\)"),
        (torch.zeros(1, 8, 40), r"\(1, 8, 40\)"),
        (torch.full((8, 40), math.nan), "NaN"),
    ],
)
def test_griffin_lim_refuses_what_is_no_log_mel(mel, why):
    with pytest.raises(ValueError, match=why):
        griffin_lim(mel)
