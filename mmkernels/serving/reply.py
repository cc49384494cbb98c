"""An answer in the form of OpenAI's chat completions, whole or in chunks.

An image of an answer stands in its message's "images", in the form in which requests have images;
a sound in "audio": "id", "data" (base64), "format" ("wav") and "transcript", the answer's text. A
message with them can be sent back as it is. In a stream each delta has one of "content", "images"
and "audio".

Source: OpenAI, "API reference: the chat completion object, the chat completion chunk object".
"""

import secrets
import time
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.audio import write_wav
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.serving import media
from mmkernels.serving.answer import End, Event, Media, Text


class Reply:
    """Gathers an answer.

    Args:
        model: what answers; its codecs make images and sounds of codes.
        name: the model's, as requests say it.
        prompt_tokens: of the conversation.
    """

    def __init__(self, model: MultimodalModel, name: str, prompt_tokens: int) -> None:
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.end: End | None = None
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }
        self._text: list[str] = []
        self._images: list[dict[str, Any]] = []
        self._waveforms: list[Tensor] = []

    def add(self, event: Event) -> dict[str, Any]:
        """Takes an event and gives the delta that says it; an image or sound is computed here."""
        if isinstance(event, Text):
            self._text.append(event.text)
            return {"content": event.text}
        if isinstance(event, Media) and event.kind == "image":
            part = media.image_part(media.png(self.model, event.codes))
            self._images.append(part)
            return {"images": [part]}
        if isinstance(event, Media):
            waveform = media.waveform(self.model, event.codes)
            self._waveforms.append(waveform)
            return {"audio": self._audio(waveform)}
        self.end = event
        return {}

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream; of the last delta if the answer has ended."""
        reason = self.end.reason if self.end else None
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}

    def first_chunk(self) -> dict[str, Any]:
        """The chunk that begins a stream."""
        return self.chunk({"role": "assistant", "content": ""})

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that counts tokens, after the last one."""
        return {
            **self._frame,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self._usage(),
        }

    def response(self) -> dict[str, Any]:
        """The whole answer, once it has ended."""
        assert self.end is not None
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        if self._images:
            message["images"] = self._images
        if self._waveforms:
            message["audio"] = self._audio(torch.cat(self._waveforms))
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self.end.reason,
        }
        return {
            **self._frame,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    def _audio(self, waveform: Tensor) -> dict[str, Any]:
        return {
            "id": f"audio-{secrets.token_hex(8)}",
            "data": media.encode(write_wav(waveform)),
            "format": "wav",
            "transcript": "".join(self._text),
            "expires_at": self._frame["created"],
        }

    def _usage(self) -> dict[str, Any]:
        made = self.end.tokens if self.end else 0
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }
