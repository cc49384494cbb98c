"""The messages of a request, in OpenAI's form, as those that the model reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmkernels.models.multimodal import MultimodalModel
from mmkernels.serving import media
from mmkernels.serving.errors import BadRequest
from mmkernels.serving.protocol import Limits, short, text_of

# As requests say it -> as the model's chat format says it.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Part = dict[str, Any]


def messages_of(value: Any, model: MultimodalModel, limits: Limits) -> list[dict[str, Any]]:
    """Messages for `MultimodalModel.document`.

    Args:
        value: the request's "messages". An assistant's may have images and sounds: as parts of its
            content, or as "images" and "audio", in the form in which answers come.
        model: what will read them; its codecs give the codes of an assistant's images and sounds.
        limits: how much there may be.

    Raises:
        BadRequest: a role, part or value is wrong, or there is too much of something.
    """
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list of at least one message", "messages")
    if len(value) > limits.messages:
        raise BadRequest(
            f"there are {len(value)} messages; at most {limits.messages} are read", "messages"
        )
    reader = _Reader(model, limits)
    return [reader.message(message, f"messages[{i}]") for i, message in enumerate(value)]


@dataclass
class _Reader:
    """Reads messages and counts what they hold."""

    model: MultimodalModel
    limits: Limits
    images: int = 0
    sounds: int = 0
    text_chars: int = 0

    def message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise BadRequest(f"{where} is {short(message)}; it must be an object", where)
        fields = {name: value for name, value in message.items() if value not in (None, [])}
        role = fields.pop("role", None)
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(
                f"{where}.role is {short(role)}; it must be one of {', '.join(ROLES)}",
                f"{where}.role",
            )
        assistant = ROLES[role] == "assistant"
        content = list(self._content(fields.pop("content", None), where, role, assistant))
        if assistant:
            content += self._answered(fields, where)
        for name in fields:
            raise BadRequest(
                f"{where}.{name} is a field that this server does not support", f"{where}.{name}"
            )
        if message.get("content") is None and not content:
            raise BadRequest(f"{where}.content is missing", f"{where}.content")
        return {"role": ROLES[role], "content": content}

    def _content(self, value: Any, where: str, role: str, assistant: bool) -> Iterator[Part]:
        where += ".content"
        if value is None:
            return
        if isinstance(value, str):
            yield self._text(value, where)
            return
        if not isinstance(value, Sequence):
            raise BadRequest(f"{where} is {short(value)}; it must be a text or a list", where)
        for number, part in enumerate(value):
            place = f"{where}[{number}]"
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                yield self._text(part.get("text"), f"{place}.text")
            elif kind == "image_url" and role != "system":
                yield self._image(part.get("image_url"), f"{place}.image_url", assistant)
            elif kind == "input_audio" and role != "system":
                yield self._sound(part.get("input_audio"), f"{place}.input_audio", assistant)
            else:
                kinds = "text" if role == "system" else "text, image_url or input_audio"
                raise BadRequest(
                    f"{place}.type is {short(kind)}; of a {role} it must be {kinds}",
                    f"{place}.type",
                )

    def _answered(self, fields: dict[str, Any], where: str) -> Iterator[Part]:
        """Images and sounds of an earlier answer."""
        images = fields.pop("images", [])
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise BadRequest(f"{where}.images must be a list", f"{where}.images")
        for number, part in enumerate(images):
            place = f"{where}.images[{number}]"
            url = part.get("image_url") if isinstance(part, Mapping) else None
            yield self._image(url, f"{place}.image_url", True)
        if "audio" in fields:
            sound = fields.pop("audio")
            if not isinstance(sound, Mapping) or "data" not in sound:
                raise BadRequest(
                    f"{where}.audio must have data, as it came: sounds are not kept here",
                    f"{where}.audio",
                )
            yield self._sound({"format": "wav", **sound}, f"{where}.audio", True)

    def _text(self, value: Any, where: str) -> Part:
        text = text_of(value, where)
        self.text_chars += len(text)
        most = self.limits.text_chars
        if self.text_chars > most:
            raise BadRequest(f"the messages have more than {most} characters of text", where)
        return {"type": "text", "text": text}

    def _image(self, value: Any, where: str, assistant: bool) -> Part:
        self.images += 1
        if self.images > self.limits.images:
            raise BadRequest(
                f"the messages have more than {self.limits.images} images; send fewer", where
            )
        if assistant and self.model.image_codec is None:
            raise BadRequest(f"{where}: this model draws nothing, so it drew no image", where)
        image = media.image_of(value, where)
        if assistant:
            return {"type": "image_codes", "codes": media.image_codes(self.model, image)}
        return {"type": "image", "image": image}

    def _sound(self, value: Any, where: str, assistant: bool) -> Part:
        self.sounds += 1
        if self.sounds > self.limits.sounds:
            raise BadRequest(
                f"the messages have more than {self.limits.sounds} sounds; send fewer", where
            )
        if not assistant:
            return {"type": "audio", "audio": media.sound_of(value, where)}
        if self.model.audio_codec is None:
            raise BadRequest(f"{where}: this model says nothing, so it made no sound", where)
        codes = media.audio_codes(self.model, media.waveform_of(value, where))
        return {"type": "audio_codes", "codes": codes}
