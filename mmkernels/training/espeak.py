"""Digits spoken by espeak-ng, through the library that the package `espeakng-loader` brings.

espeak-ng is under the GPL and is loaded here, never copied; the packages that ask for it are
extras.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.audio import SAMPLE_RATE, resample

# espeak's own numbers.
_SYNCHRONOUS, _UTF8, _RATE, _PITCH, _RANGE = 2, 1, 1, 3, 4
_BUFFER_MS = 500

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Espeak:
    """A speaker with many voices. There is one for each process.

    Its voices tremble and breathe by chance. The same calls in the same order give the same
    waveforms in every process; a second time in one process they do not.

    Raises:
        ModuleNotFoundError: espeakng_loader is not installed.
        RuntimeError: its library does not start.
    """

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, data, 0)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng did not start: espeak_Initialize failed")
        # Else the time of day is the seed.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._samples: list[int] = []
        self._callback = _Callback(self._receive)  # kept, for C holds no reference
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: str, *, rate: int, pitch: int, pitch_range: int) -> Tensor:
        """The waveform of a text, 8 kHz.

        Args:
            text: what to say.
            voice: as "en-us+f3", a language and a variant.
            rate: words a minute.
            pitch: from 0 to 100.
            pitch_range: likewise.

        Raises:
            ValueError: there is no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._samples = []
        said = text.encode()
        self._library.espeak_Synth(said, len(said) + 1, 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return resample(torch.tensor(self._samples) / 32768, self._rate, SAMPLE_RATE)

    def _receive(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._samples.extend(samples[:count])
        return 0


def voices(accents: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Every variant in one accent, the accents in turns."""
    return [f"{accents[i % len(accents)]}+{name}" for i, name in enumerate(variants)]
