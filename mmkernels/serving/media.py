"""Images and sounds of a request as tensors, and those of an answer as files in text."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.models import audio
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.serving.errors import BadRequest

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+=-]+)*;base64,", re.ASCII)


def image_of(part: Any, where: str) -> Tensor:
    """The image of an `image_url` part.

    Args:
        part: what stands under "image_url".
        where: its place in the request, for errors.

    Returns:
        (3, H, W) uint8, as the model wants to see it.

    Raises:
        BadRequest: it is no data URI of an image that can be read.
    """
    from mmkernels.models import images

    url = part.get("url") if isinstance(part, dict) else None
    if not isinstance(url, str):
        raise BadRequest(f'{where} must be {{"url": "data:image/png;base64,…"}}', where)
    match = _DATA_URI.match(url)
    if not match:
        raise BadRequest(
            f"{where}.url is {_short(url)}; it must be a data URI with base64, as "
            "data:image/png;base64,…: nothing is fetched from elsewhere",
            where,
        )
    data = _decode(url[match.end() :], f"{where}.url")
    try:
        return images.fit(images.read_image(data))
    except ValueError as error:
        raise BadRequest(f"{where}: {error}", where, "invalid_image") from error


def waveform_of(part: Any, where: str) -> Tensor:
    """The waveform (N,) of an `input_audio` part; arguments and errors as of `image_of`."""
    data = part.get("data") if isinstance(part, dict) else None
    if not isinstance(data, str):
        raise BadRequest(f'{where} must be {{"data": base64, "format": "wav"}}', where)
    if part.get("format") != "wav":
        raise BadRequest(f'{where}.format is {part.get("format")!r}; it must be "wav"', where)
    try:
        return audio.read_wav(_decode(data, f"{where}.data"))
    except ValueError as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"{where}: {error}", where, "invalid_audio") from error


def sound_of(part: Any, where: str) -> Tensor:
    """The log-mel (T, 40) of an `input_audio` part; arguments and errors as of `image_of`."""
    waveform = waveform_of(part, where)
    try:
        return audio.prepare(waveform)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}", where, "invalid_audio") from error


def image_codes(model: MultimodalModel, image: Tensor) -> list[int]:
    """The codes of an image that the model drew before, (3, H, W) uint8."""
    assert model.image_codec is not None
    return model.image_codec.encode(image[None].to(model.device))[0].tolist()


def audio_codes(model: MultimodalModel, waveform: Tensor) -> list[int]:
    """The codes of a sound (N,) that the model made before."""
    assert model.audio_codec is not None
    try:
        mel = audio.prepare(waveform)
    except ValueError:  # the model may have made a silent one
        mel = audio.silence(4)
    return model.audio_codec.encode(mel[None].to(model.device))[0].tolist()


def png(model: MultimodalModel, codes: Sequence[int]) -> bytes:
    """The PNG file of image codes."""
    from mmkernels.models import images

    assert model.image_codec is not None
    return images.write_png(model.image_codec.decode(_row(model, codes))[0].cpu())


def waveform(model: MultimodalModel, codes: Sequence[int]) -> Tensor:
    """The sound (N,) of audio codes."""
    assert model.audio_codec is not None
    return audio.griffin_lim(model.audio_codec.decode(_row(model, codes))[0].float().cpu())


def image_part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    """An `image_url` part of a file."""
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encode(data)}"}}


def audio_part(data: bytes) -> dict[str, Any]:
    """An `input_audio` part of a WAV file."""
    return {"type": "input_audio", "input_audio": {"data": encode(data), "format": "wav"}}


def encode(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{where} is not base64: {error}", where) from error


def _row(model: MultimodalModel, codes: Sequence[int]) -> Tensor:
    return torch.tensor([list(codes)], device=model.device)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
