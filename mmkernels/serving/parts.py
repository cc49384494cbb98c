"""What is at hand in Python - paths, arrays, pictures - as parts of OpenAI's messages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.audio import resample, write_wav
from mmkernels.models.images import write_png
from mmkernels.serving.media import audio_part, image_part

_IMAGE_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}


def plain(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Messages whose parts are all of the kinds that requests have; the rest is as it was."""
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def image_bytes(image: Any) -> bytes:
    """The file of an image.

    Args:
        image: the path or the bytes of a file; a picture of Pillow; or a uint8 array or tensor
            (3, H, W), (H, W, 3) or (H, W).

    Raises:
        TypeError: it is none of these.
        ValueError: it has another shape.
    """
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if hasattr(image, "convert"):  # Pillow's
        image = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3
        )
    pixels = _tensor(image, "image")
    if pixels.dtype != torch.uint8:
        raise TypeError(f"image is {pixels.dtype}; it must be uint8")
    if pixels.ndim == 2:
        pixels = pixels.expand(3, -1, -1)
    elif pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.shape[0] != 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"image has shape {tuple(pixels.shape)}; it must be (3, H, W), (H, W, 3) or (H, W)"
        )
    return write_png(pixels)


def audio_bytes(sound: Any, sample_rate: int = 8000) -> bytes:
    """The WAV file of a sound.

    Args:
        sound: the path or the bytes of a WAV file; or an array or tensor (N,) in [-1, 1].
        sample_rate: of an array.

    Raises:
        TypeError: it is none of these.
        ValueError: it has another shape.
    """
    if isinstance(sound, str | Path):
        return Path(sound).read_bytes()
    if isinstance(sound, bytes | bytearray):
        return bytes(sound)
    waveform = _tensor(sound, "audio")
    if waveform.ndim != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"audio is {waveform.dtype} {tuple(waveform.shape)}; it must be float (N,) in [-1, 1]"
        )
    return write_wav(resample(waveform.float(), sample_rate, 8000))


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image" and "image" in part:
        data = image_bytes(part["image"])
        known = (name for head, name in _IMAGE_TYPES.items() if data.startswith(head))
        return image_part(data, next(known, "application/octet-stream"))
    if kind == "audio" and "audio" in part:
        return audio_part(audio_bytes(part["audio"], part.get("sample_rate", 8000)))
    return part


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is {type(value).__name__}; it must be a path, bytes, an array or a tensor"
        ) from error
