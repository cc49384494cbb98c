"""Spoken digits: synthetic voices, and real recordings where a folder holds them.

Voices are held out whole, real speakers too; what is measured on them is of voices never heard.

Source: Jakobovski et al., "Free Spoken Digit Dataset", 2018; for `augment`, Jaitly and Hinton,
"Vocal Tract Length Perturbation improves speech recognition", ICML 2013, and Park et al.,
"SpecAugment", Interspeech 2019.
"""

import importlib.util
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models import audio
from mmkernels.training import espeak
from mmkernels.training.phrases import DIGITS

# Variants of espeak's voices. Whispers, robots and monsters are left out.
VARIANTS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo",
    "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Reed", "adam", "anika", "announcer",
    "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward", "f1",
    "f2", "f3", "f4", "f5", "grandma", "grandpa", "gustave", "ian", "iven", "iven2", "john",
    "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "linda", "m1", "m2", "m3", "m4", "m5",
    "m6", "m7", "m8", "marcelo", "max", "michel", "miguel", "mike2", "norbert", "pablo", "paul",
    "pedro", "quincy", "rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip
# Never in training, with the accents that follow.
HELD_OUT_VARIANTS = (
    "Alicia", "Andy", "Hugo", "Mario", "Reed", "antonio", "belinda", "david", "f4", "grandpa",
    "klatt3", "m3", "m7", "max", "quincy", "steph",
)  # fmt: skip
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan")
HELD_OUT_ACCENTS = ("en-gb-scotland", "en-gb-x-gbcwmd", "en-us", "en")
# Real speakers who are never in training.
HELD_OUT_SPEAKERS = ("george",)
# Recordings with a number below this one are the official test of the real set.
TEST_BELOW = 5
# Frames of a bank: 1.2 seconds.
FRAMES = 120

_SETTINGS = ((110, 35), (150, 50), (190, 65), (230, 45), (170, 25), (140, 75))


@dataclass
class Clip:
    """A spoken digit.

    Attributes:
        waveform: (N,) float32, 8 kHz.
        digit: what is said.
        voice: who says it.
        source: "espeak", "fsdd" or "captcha".
        number: of the recording, among those of its voice and digit.
    """

    waveform: Tensor
    digit: int
    voice: str
    source: str
    number: int = 0


@dataclass
class SpeechBank:
    """Log-mels of clips.

    Attributes:
        mels: (N, FRAMES, 40), the end of each filled with silence.
        lengths: (N,) frames, a multiple of 4.
        digits: (N,).
        voices: of each.
        sources: of each.
    """

    mels: Tensor
    lengths: Tensor
    digits: Tensor
    voices: list[str]
    sources: list[str]

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> "SpeechBank":
        """Trims and analyses clips; what is longer than the bank's frames is left out.

        Raises:
            ValueError: a clip is silent, or none is left.
        """
        mels, digits, voices, sources = [], [], [], []
        for clip in clips:
            mel = audio.prepare(clip.waveform)
            if len(mel) <= FRAMES:
                mels.append(mel)
                digits.append(clip.digit)
                voices.append(clip.voice)
                sources.append(clip.source)
        if not mels:
            raise ValueError(f"clips has none of at most {FRAMES} frames; a bank needs one")
        silence = audio.silence(FRAMES)
        padded = [torch.cat((mel, silence[len(mel) :])) for mel in mels]
        return cls(
            torch.stack(padded),
            torch.tensor([len(mel) for mel in mels]),
            torch.tensor(digits),
            voices,
            sources,
        )

    def take(self, where: Iterable[int]) -> "SpeechBank":
        """The clips at these places."""
        rows = list(where)
        index = torch.tensor(rows, dtype=torch.long)
        return SpeechBank(
            self.mels[index],
            self.lengths[index],
            self.digits[index],
            [self.voices[row] for row in rows],
            [self.sources[row] for row in rows],
        )


def espeak_clips(voices: Iterable[str], settings: int, seed: int = 0) -> list[Clip]:
    """Every digit in every voice, at so many rates and pitches each, at most 6."""
    speaker = espeak.Espeak()
    chance = random.Random(seed)
    clips = []
    for voice in voices:
        for rate, pitch in chance.sample(_SETTINGS, settings):
            rate, pitch = rate + chance.randrange(-15, 16), pitch + chance.randrange(-10, 11)
            for digit, word in enumerate(DIGITS):
                waveform = speaker.say(
                    word, voice, rate=rate, pitch=pitch, pitch_range=chance.randrange(20, 80)
                )
                clips.append(Clip(waveform, digit, voice, "espeak"))
    return clips


def fsdd_clips(data: Path) -> list[Clip]:
    """The real recordings in data/fsdd/recordings; none where there is no such folder.

    Raises:
        ValueError: a file is not named {digit}_{speaker}_{number}.wav.
    """
    clips = []
    for path in sorted((data / "fsdd" / "recordings").glob("*.wav")):
        name = re.fullmatch(r"([0-9])_([^_]+)_([0-9]+)", path.stem)
        if name is None:
            raise ValueError(
                f"{path} is not named {{digit}}_{{speaker}}_{{number}}.wav; rename or move it"
            )
        digit, speaker, number = name.groups()
        clips.append(Clip(audio.read_wav(path), int(digit), speaker, "fsdd", int(number)))
    return clips


def captcha_clips() -> list[Clip]:
    """The ten digits recorded in the package `captcha`."""
    import captcha

    assert captcha.__file__ is not None
    folder = Path(captcha.__file__).parent / "data"
    return [
        Clip(audio.read_wav(path), digit, f"captcha {digit}", "captcha")
        for digit in range(10)
        for path in sorted((folder / str(digit)).glob("*.wav"))
    ]


def load(data: Path | None = None, *, quick: bool = False) -> dict[str, SpeechBank]:
    """Spoken digits, sorted by what they are for.

    Args:
        data: a folder with fsdd/recordings, or None.
        quick: a third of the synthetic voices.

    Returns:
        "train"; "voices", synthetic ones that are held out, which needs espeakng-loader; with
        recordings in data also "real_test", the official test of the speakers in training, and
        "real_speaker", a speaker who is held out. What is held out is the same whatever `quick` is.

    Raises:
        ModuleNotFoundError: neither espeakng-loader nor captcha is installed.
    """
    banks: dict[str, list[Clip]] = {}
    if importlib.util.find_spec("espeakng_loader"):
        known = [name for name in VARIANTS if name not in HELD_OUT_VARIANTS]
        train = espeak.voices(ACCENTS, known[:: 3 if quick else 1])
        held_out = espeak.voices(HELD_OUT_ACCENTS, HELD_OUT_VARIANTS)
        # These first: what espeak says depends a little on what it said before.
        banks["voices"] = espeak_clips(held_out, settings=2, seed=1)
        banks["train"] = espeak_clips(train, settings=2 if quick else 5)
    elif importlib.util.find_spec("captcha"):
        banks["train"] = captcha_clips()
    else:
        raise ModuleNotFoundError(
            "spoken digits need a package that is not installed: pip install espeakng-loader, "
            "or pip install captcha for ten recordings"
        )
    if data is not None:
        clips = fsdd_clips(data)
        known_speakers = [clip for clip in clips if clip.voice not in HELD_OUT_SPEAKERS]
        if clips:
            banks["train"] += [clip for clip in known_speakers if clip.number >= TEST_BELOW]
            banks["real_test"] = [clip for clip in known_speakers if clip.number < TEST_BELOW]
            banks["real_speaker"] = [clip for clip in clips if clip.voice in HELD_OUT_SPEAKERS]
    return {name: SpeechBank.of(clips) for name, clips in banks.items()}


def augment(mels: Tensor, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Other voices, tempos, rooms and microphones from the same recordings.

    Args:
        mels: (B, T, 40).
        lengths: (B,) frames that are filled.
        generator: of all chance.

    Returns:
        mels (B, T, 40) and lengths (B,), multiples of 4 from 4 to T.
    """
    batch, frames, bands = mels.shape

    def chance(*shape: int, spread: float) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * spread

    # Stretch in time, warp in frequency: where each new frame and band comes from.
    tempo = torch.exp(chance(batch, spread=0.22))
    # A small warp: with a larger one, fewer digits of voices never heard are recognised.
    warp = torch.exp(chance(batch, spread=0.06))
    bend = chance(batch, spread=0.2)
    time = torch.arange(frames)[None] * tempo[:, None]  # (B, T) in old frames
    band = torch.linspace(0, 1, bands)[None]
    source = band * warp[:, None] + bend[:, None] * band * (1 - band)
    grid = torch.stack(
        (
            (source * 2 - 1)[:, None].expand(-1, frames, -1),
            (time / (frames - 1) * 2 - 1)[:, :, None].expand(-1, -1, bands),
        ),
        -1,
    )
    out = F.grid_sample(mels[:, None], grid, padding_mode="border", align_corners=True)[:, 0]
    lengths = (lengths / tempo).long().clamp(4, frames)
    # A room and a microphone: tilt and waves over the bands; loudness.
    tilt = chance(batch, 1, 1, spread=0.5) * (band - 0.5)[:, None]
    wave = torch.sin(band * chance(batch, 1, spread=9.0) + chance(batch, 1, spread=3.2))
    wave = wave[:, None] * chance(batch, 1, 1, spread=0.3)
    out = out + tilt + wave + chance(batch, 1, 1, spread=0.3)
    # Noise as a second source: powers add. Mostly soft.
    level = -2.6 + 2.0 * torch.rand(batch, 1, 1, generator=generator) ** 3
    noise = level + chance(batch, 1, 1, spread=0.6) * (band - 0.5)[:, None]
    noise = noise + 0.25 * torch.randn(batch, frames, bands, generator=generator)
    out = torch.logaddexp(out * audio.STD, noise * audio.STD) / audio.STD
    # Hide a stretch of time and of bands.
    for size, most in ((frames, 3), (bands, 3)):
        begin = torch.randint(size, (batch, 1), generator=generator)
        width = torch.randint(most + 1, (batch, 1), generator=generator)
        place = torch.arange(size)[None]
        hidden = (place >= begin) & (place < begin + width)
        hidden = hidden[:, :, None] if size == frames else hidden[:, None, :]
        out = out.masked_fill(hidden, float(audio.silence(1).mean()))
    lengths = (lengths + 3) // 4 * 4
    return out, lengths.clamp(max=frames // 4 * 4)
