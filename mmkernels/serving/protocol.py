"""A request in the form of OpenAI's chat completions: what it asks for, or why it is refused.

A field that would change the answer and is not supported is refused, never passed over.

Source: OpenAI, "API reference: create chat completion".
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmkernels.models.generation import Sampling
from mmkernels.serving.errors import BadRequest

# Fields that change no answer.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
}  # fmt: skip
# Fields of which only these values are supported, and null, as if they were not there.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
MODALITIES = ("text", "image", "audio")
MAX_STOPS, MAX_STOP_CHARS = 4, 64


@dataclass(frozen=True)
class Limits:
    """How large a request may be.

    Attributes:
        body_bytes: of the whole request.
        messages: number of them.
        images: number of images in all messages.
        sounds: likewise.
        text_chars: characters of all texts.
        max_tokens: most tokens of an answer that may be asked for.
        default_max_tokens: of an answer for which none are asked.
    """

    body_bytes: int = 8 << 20
    messages: int = 128
    images: int = 8
    sounds: int = 8
    text_chars: int = 20_000
    max_tokens: int = 1024
    default_max_tokens: int = 256


@dataclass(frozen=True)
class Options:
    """What a request asks for besides its messages.

    Attributes:
        models: names of the models that may answer; none: any.
        sampling: how tokens are chosen.
        max_tokens: as it was asked for; None: it was not.
        stop: texts at which the answer ends, which it does not include.
        modalities: what an answer may consist of, of `MODALITIES`.
        stream: whether the answer comes in chunks.
        include_usage: whether the last chunk counts tokens.
    """

    models: tuple[str, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    modalities: frozenset[str]
    stream: bool
    include_usage: bool


def body_of(data: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        BadRequest: it is not UTF-8, not JSON, or no object.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        body = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply") from error
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body is a JSON {_kind(body)}; it must be an object")
    return body


def options_of(body: Mapping[str, Any], limits: Limits) -> Options:
    """What a request asks for besides its messages.

    Raises:
        BadRequest: a field is unknown, not supported, or has a wrong type or value.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    fields.pop("messages", None)
    stream = _flag(fields.pop("stream", False), "stream")
    include_usage = _stream_options(fields.pop("stream_options", {}))
    max_tokens = _max_tokens(fields, limits)
    options = Options(
        models=_models(fields),
        max_tokens=max_tokens,
        sampling=Sampling(
            max_tokens=max_tokens or limits.default_max_tokens,
            temperature=_number(fields, "temperature", 0.0, 0.0, 2.0),
            media_temperature=_number(fields, "media_temperature", 0.7, 0.0, 2.0),
            top_k=_integer(fields, "top_k", 0, 0, 1 << 20),
            top_p=_number(fields, "top_p", 1.0, 0.001, 1.0),
            seed=_integer(fields, "seed", secrets.randbits(62), -(1 << 63), (1 << 63) - 1),
        ),
        stop=_stop(fields.pop("stop", ())),
        modalities=_modalities(fields),
        stream=stream,
        include_usage=include_usage,
    )
    for name, value in fields.items():
        if name in NEUTRAL:
            # 0 and False are equal, and neither is meant by the other.
            if not any(value == known and _kind(value) == _kind(known) for known in NEUTRAL[name]):
                wanted = " or ".join(json.dumps(known) for known in NEUTRAL[name])
                raise BadRequest(
                    f"{name} is {short(value)}; this server supports {wanted} alone",
                    name,
                    "unsupported_value",
                )
        elif name not in HARMLESS:
            raise BadRequest(
                f"{name} is a field that this server does not support; leave it out",
                name,
                "unsupported_parameter",
            )
    return options


def text_of(value: Any, where: str) -> str:
    """A text that has characters alone.

    Raises:
        BadRequest: it is no text, or has halves of surrogate pairs, which are no characters.
    """
    if not isinstance(value, str):
        raise BadRequest(f"{where} is {_kind(value)}; it must be a text", where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{where} has a lone surrogate at character {error.start}; it must be Unicode text",
            where,
        ) from error
    return value


def short(value: Any) -> str:
    """A value for an error, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:80] + "…"


def _models(fields: dict[str, Any]) -> tuple[str, ...]:
    both = [name for name in ("model", "models") if name in fields]
    if len(both) == 2:
        raise BadRequest("model and models are both given; give one of them", "models")
    value = fields.pop(both[0]) if both else ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise BadRequest(
            f"{both[0]} is {short(value)}; it must be a name or a list of them", both[0]
        )
    return tuple(names)


def _max_tokens(fields: dict[str, Any], limits: Limits) -> int | None:
    given = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    values = {_integer(fields, name, 1, 1, limits.max_tokens) for name in given}
    if len(values) > 1:
        raise BadRequest(
            "max_tokens and max_completion_tokens differ; give one of them", "max_tokens"
        )
    return values.pop() if values else None


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or len(stops) > MAX_STOPS:
        raise BadRequest(f"stop must be a text or a list of at most {MAX_STOPS} texts", "stop")
    for index, stop in enumerate(stops):
        text_of(stop, f"stop[{index}]")
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise BadRequest(
                f"stop[{index}] has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARS}",
                "stop",
            )
    return tuple(stops)


def _modalities(fields: dict[str, Any]) -> frozenset[str]:
    value = fields.pop("modalities", MODALITIES)
    if not isinstance(value, Sequence) or isinstance(value, str) or "text" not in value:
        raise BadRequest('modalities must be a list that has "text"', "modalities")
    unknown = [kind for kind in value if kind not in MODALITIES]
    if unknown:
        raise BadRequest(
            f"modalities has {short(unknown[0])}; it may have {', '.join(MODALITIES)}", "modalities"
        )
    # OpenAI's clients ask for a format and a voice with the modality.
    form = fields.pop("audio", {})
    if not isinstance(form, Mapping) or form.get("format", "wav") != "wav":
        raise BadRequest('audio.format must be "wav"', "audio", "unsupported_value")
    extra = [key for key in form if key != "format"]
    if extra and form != {**form, "voice": "default"}:
        raise BadRequest(
            f'audio.{extra[0]} is {short(form[extra[0]])}; the model has one voice, "default"',
            "audio",
            "unsupported_value",
        )
    return frozenset(value)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) - {"include_usage", "include_obfuscation"}:
        raise BadRequest('stream_options may have "include_usage" alone', "stream_options")
    return _flag(value.get("include_usage", False), "stream_options.include_usage")


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} is {short(value)}; it must be true or false", name)
    return value


def _number(fields: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = fields.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadRequest(
            f"{name} is {short(value)}; it must be a number from {least:g} to {most:g}", name
        )
    return float(value)


def _integer(fields: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = fields.pop(name, default)
    whole = isinstance(value, float) and math.isfinite(value) and value == int(value)
    if isinstance(value, bool) or not (isinstance(value, int) or whole):
        raise BadRequest(f"{name} is {short(value)}; it must be a whole number", name)
    if not least <= value <= most:
        raise BadRequest(f"{name} is {short(value)}; it must be from {least} to {most}", name)
    return int(value)


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    for kind, name in ((str, "string"), ((int, float), "number"), (Mapping, "object")):
        if isinstance(value, kind):
            return name
    return "array"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")
