"""Sound: WAV files, log-mel spectrograms, and waveforms from them.

A waveform is float32 (N,) in [-1, 1], one channel, 8 kHz. A log-mel has a frame every 10 ms, 40
bands, and is scaled to about mean 0 and deviation 1.

Source: Davis and Mermelstein, "Comparison of Parametric Representations for Monosyllabic Word
Recognition", 1980; Griffin and Lim, "Signal Estimation from Modified Short-Time Fourier Transform",
1984; Perraudin et al., "A Fast Griffin-Lim Algorithm", WASPAA 2013.
"""

import functools
import math
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["griffin_lim", "log_mel", "prepare", "read_wav", "trim", "write_wav"]

SAMPLE_RATE = 8000
HOP = 80
N_MELS = 40
_N_FFT, _WINDOW = 256, 200
_LOWEST, _HIGHEST = 60.0, 3900.0
# Loudness of every waveform before it is analysed.
_RMS = 0.1
# Frames of a click at most, and of the quiet between it and a word at least.
_CLICK, _FAR = 4, 25
# 60 dB below the loudest that speech of that loudness has: what is softer counts as silence.
_FLOOR = 1e-5
# Log power that no sound in [-1, 1] reaches.
_LOUDEST = 12.0
# Of log-mels of trimmed speech.
MEAN, STD = -3.15, 3.5
# Longest sound that is read, in seconds.
MAX_SECONDS = 30.0

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


def read_wav(data: bytes | Path) -> Tensor:
    """Reads a WAV file.

    Args:
        data: the file's bytes, or its path. PCM of 8, 16, 24 or 32 bits or 32-bit float, any number
            of channels, which are averaged, and any rate from 4 to 192 kHz.

    Returns:
        The waveform, at 8 kHz.

    Raises:
        ValueError: it is no WAV file, has another encoding, no samples, NaN, or is too long.
    """
    if isinstance(data, Path):
        data = data.read_bytes()
    if len(data) < 12 or data[:4] not in (b"RIFF", b"RIFX") or data[8:12] != b"WAVE":
        raise ValueError("the sound is no WAV file: it does not begin with RIFF … WAVE")
    if data[:4] == b"RIFX":
        raise ValueError("the sound is a big-endian WAV file; save it as RIFF")
    chunks = _chunks(data)
    if b"fmt " not in chunks or len(chunks[b"fmt "]) < 16:
        raise ValueError("the WAV file has no format chunk")
    if b"data" not in chunks:
        raise ValueError("the WAV file has no data chunk")
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunks[b"fmt "][:16])
    if kind == _EXTENSIBLE and len(chunks[b"fmt "]) >= 26:
        (kind,) = struct.unpack("<H", chunks[b"fmt "][24:26])
    if not 4000 <= rate <= 192_000:
        raise ValueError(f"the WAV file has {rate} samples a second; it must have 4000 to 192000")
    if not 1 <= channels <= 16:
        raise ValueError(f"the WAV file has {channels} channels; it must have 1 to 16")
    samples = _samples(chunks[b"data"], kind, bits)
    samples = samples[: len(samples) // channels * channels].view(-1, channels)
    if not len(samples):
        raise ValueError("the WAV file has no samples")
    if len(samples) > MAX_SECONDS * rate:
        raise ValueError(
            f"the sound has {len(samples) / rate:.1f} seconds; at most {MAX_SECONDS:g} are read"
        )
    if not samples.isfinite().all():
        raise ValueError("the sound has samples that are NaN or infinite")
    return _within_one(resample(_within_one(samples).mean(1), rate, SAMPLE_RATE))


def write_wav(waveform: Tensor) -> bytes:
    """Writes a WAV file of 16-bit samples.

    Args:
        waveform: (N,); what is beyond [-1, 1] is cut off.

    Returns:
        The file's bytes.
    """
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy().tobytes()
    head = struct.pack("<HHIIHH", _PCM, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", len(body) + len(samples)) + body + samples


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Another rate, band-limited to the lower of both, by the spectrum.

    Args:
        waveform: (N,).
        rate: its samples a second.
        new_rate: those of the result.

    Returns:
        (ceil(N * new_rate / rate),).
    """
    if rate == new_rate:
        return waveform
    common = math.gcd(rate, new_rate)
    step, new_step = rate // common, new_rate // common
    # As many steps as make both lengths exact, and as a Fourier transform takes quickly.
    steps = _smooth(-(-len(waveform) // step))
    spectrum = torch.fft.rfft(F.pad(waveform, (0, steps * step - len(waveform))))
    new = spectrum.new_zeros(steps * new_step // 2 + 1)
    kept = min(len(spectrum), len(new))
    new[:kept] = spectrum[:kept]
    resampled = torch.fft.irfft(new, n=steps * new_step) * (new_step / step)
    return resampled[: -(-len(waveform) * new_rate // rate)]


def trim(waveform: Tensor) -> Tensor:
    """Cuts quiet ends and clicks before and after off, and brings what is left to one loudness.

    Args:
        waveform: (N,), 8 kHz.

    Returns:
        (M,), M <= N, its mean square 0.01: about as loud as speech, but louder than 1 at places.

    Raises:
        ValueError: the waveform has another shape, is silent, or has NaN.
    """
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"waveform is {waveform.dtype} {tuple(waveform.shape)}; it must be float (N,), "
            "one channel in [-1, 1]"
        )
    if not waveform.isfinite().all():
        raise ValueError("waveform has samples that are NaN or infinite; leave them out")
    waveform = waveform.float() - waveform.float().mean()
    if not len(waveform) or float(waveform.abs().max()) < 1e-4:
        raise ValueError("the sound is silent; record it again, closer to the microphone")
    padded = F.pad(waveform, (0, -len(waveform) % HOP))
    energy = padded.view(-1, HOP).square().mean(1)
    quietest = energy.sort().values[: max(len(energy) // 10, 1)].mean()
    loudest = float(energy.max())
    threshold = max(loudest * 10**-3.5, min(float(quietest) * 4, loudest / 20))
    where = (energy > threshold).nonzero()[:, 0]
    # A short noise far from all else is the click of a mouse, not the end of a word.
    parts = where.tensor_split((where.diff() > _FAR).nonzero()[:, 0] + 1)
    spoken = [part for part in parts if len(part) > _CLICK] or parts
    begin, end = max(int(spoken[0][0]) - 2, 0), int(spoken[-1][-1]) + 3
    kept = waveform[begin * HOP : end * HOP]
    return kept * (_RMS / kept.square().mean().sqrt().clamp(min=1e-9))


def log_mel(waveform: Tensor) -> Tensor:
    """What is heard of a waveform.

    Args:
        waveform: float32 (N,) or (B, N), 8 kHz.

    Returns:
        (T, 40) or (B, T, 40), T = N // 80 + 1.
    """
    spectrum = _stft(waveform).abs().square()
    mel = spectrum.transpose(-1, -2) @ _filters().T
    return (mel.clamp(min=_FLOOR).log() - MEAN) / STD


def silence(frames: int) -> Tensor:
    """The log-mel (frames, 40) of nothing."""
    return log_mel(torch.zeros(1)).expand(1, N_MELS).repeat(frames, 1)


def prepare(waveform: Tensor) -> Tensor:
    """What the model hears of a sound.

    Args:
        waveform: (N,).

    Returns:
        Its log-mel, trimmed, (T, 40), T a multiple of 4.

    Raises:
        ValueError: the sound is silent.
    """
    mel = log_mel(trim(waveform))
    return torch.cat((mel, silence(-len(mel) % 4)))


def griffin_lim(mel: Tensor, iterations: int = 60) -> Tensor:
    """A waveform that has about this log-mel; the same each time.

    Args:
        mel: (T, 40), T >= 2, as from `log_mel`.
        iterations: how often the phases are made consistent.

    Returns:
        (80 * (T - 1),) in [-1, 1], as loud as the log-mel says unless it had to be made softer.

    Raises:
        ValueError: mel has another shape, or NaN.
    """
    if mel.dim() != 2 or mel.shape[0] < 2 or mel.shape[1] != N_MELS:
        raise ValueError(f"mel is {tuple(mel.shape)}; it must be (T, {N_MELS}), T at least 2")
    if not mel.isfinite().all():
        raise ValueError("mel has values that are NaN or infinite")
    # The floor is no sound. What lies far above any speech would overflow.
    power = (mel.float() * STD + MEAN).clamp(max=_LOUDEST).exp() - _FLOOR
    magnitude = _unmel(power.clamp(min=0)).sqrt().T  # (bins, T)
    angles = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    estimate = torch.polar(magnitude, angles * 2 * torch.pi)
    before = torch.zeros_like(estimate)
    for _ in range(iterations):
        rebuilt = _stft(_istft(estimate))
        faster = rebuilt + 0.99 * (rebuilt - before)
        before = rebuilt
        estimate = torch.polar(magnitude, faster.angle())
    return _within_one(_istft(estimate))


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """The format and the samples; a chunk that claims more than there is has what there is."""
    found: dict[bytes, bytes] = {}
    position = 12
    while position + 8 <= len(data):
        name = data[position : position + 4]
        (size,) = struct.unpack("<I", data[position + 4 : position + 8])
        if name in (b"fmt ", b"data") and name not in found:
            found[name] = data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
    return found


def _samples(data: bytes, kind: int, bits: int) -> Tensor:
    """Interleaved samples in [-1, 1]."""
    size = bits // 8
    if (kind, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32)}:
        raise ValueError(
            f"the WAV file has encoding {kind} with {bits} bits; it must be PCM of 8, 16, 24 or 32 "
            "bits or float of 32"
        )
    raw = bytearray(data[: len(data) // size * size])
    if not raw:
        return torch.zeros(0)
    if kind == _FLOAT:
        return torch.frombuffer(raw, dtype=torch.float32).clone()
    if bits == 8:
        return (torch.frombuffer(raw, dtype=torch.uint8).float() - 128) / 128
    if bits == 24:
        parts = torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3).to(torch.int32)
        whole = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        return torch.where(whole >= 1 << 23, whole - (1 << 24), whole).float() / (1 << 23)
    dtype = torch.int16 if bits == 16 else torch.int32
    return torch.frombuffer(raw, dtype=dtype).float() / 2 ** (bits - 1)


def _stft(waveform: Tensor) -> Tensor:
    window = torch.hann_window(_WINDOW)
    return torch.stft(
        waveform, _N_FFT, HOP, _WINDOW, window, center=True, pad_mode="constant",
        return_complex=True,
    )  # fmt: skip


def _istft(spectrum: Tensor) -> Tensor:
    return torch.istft(spectrum, _N_FFT, HOP, _WINDOW, torch.hann_window(_WINDOW), center=True)


@functools.cache
def _filters() -> Tensor:
    """Triangles on the mel scale: (40, bins)."""

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    low, high = mel(torch.tensor([_LOWEST, _HIGHEST])).tolist()
    edges = 700 * (10 ** (torch.linspace(low, high, N_MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, _N_FFT // 2 + 1)
    below, centre, above = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - below) / (centre - below), (above - bins) / (above - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def _unmel(power: Tensor) -> Tensor:
    """The bins' power (T, bins) whose bands' (T, 40) is this one, nearly; nothing is negative.

    Source: the multiplicative update of Lee and Seung, "Algorithms for Non-negative Matrix
    Factorization", NIPS 2000.
    """
    filters = _filters()
    aim = power @ filters
    bins = aim.clone()
    gram = filters.T @ filters
    for _ in range(100):
        bins = bins * aim / (bins @ gram).clamp(min=1e-12)
    return bins


def _smooth(least: int) -> int:
    """The smallest 2**a or 3 * 2**a from `least` on."""
    power = 1 << max(least - 1, 0).bit_length()
    return power // 4 * 3 if power >= 4 and power // 4 * 3 >= least else power


def _within_one(waveform: Tensor) -> Tensor:
    """Made softer where it is louder than 1."""
    return waveform / waveform.abs().max().clamp(min=1)
