"""Conversations as token ids: ChatML, with images and sounds where they stand.

    <|im_start|>user
    ▢▢▢▢…What digit do you see?<|im_end|>
    <|im_start|>assistant
    It is a seven.<|im_end|>

▢ is a placeholder for one embedding. What is between two marks is tokenized as one text, which
makes these ids the ones of SmolLM2's own chat template.

Source: OpenAI, "Chat Markup Language", 2023.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.config import MEL_PATCH
from mmkernels.models.tokenizer import Tokenizer, Vocabulary

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]


@dataclass
class Document:
    """One document: a conversation, or a text, image or sound of pretraining.

    Attributes:
        ids: its tokens.
        learned: for each token, whether the loss asks the model to predict it.
        spans: for each token, the number of the image or sound it is a placeholder for, or -1.
        images: uint8 (3, H, W), in the order of their placeholders.
        audios: log-mels (1, 40, T), likewise; T is a multiple of a patch's frames.
    """

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    audios: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], learned: bool) -> None:
        """Appends tokens."""
        self.ids.extend(ids)
        self.learned.extend([learned] * len(ids))
        self.spans.extend([-1] * len(ids))

    def add_image(self, image: Tensor, placeholder: int, tokens: int) -> None:
        """Appends an image and the placeholders for its embeddings."""
        self.images.append(image)
        self._add_placeholders(placeholder, tokens)

    def add_audio(self, mel: Tensor, placeholder: int, tokens: int) -> None:
        """Appends a spectrogram and the placeholders for its embeddings."""
        self.audios.append(mel)
        self._add_placeholders(placeholder, tokens)

    def _add_placeholders(self, placeholder: int, tokens: int) -> None:
        number = len(self.images) + len(self.audios) - 1
        self.ids.extend([placeholder] * tokens)
        self.learned.extend([False] * tokens)
        self.spans.extend([number] * tokens)


def encode(
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    messages: Sequence[Message],
    *,
    patch_size: tuple[int, int] = (8, 8),
    default_system: str | None = None,
    add_generation_prompt: bool = False,
) -> Document:
    """The tokens of a conversation.

    Args:
        tokenizer: that of the model.
        vocabulary: likewise.
        messages: dicts with "role", one of `ROLES`, and "content": a text, or a list of parts
            {"type": "text", "text": str}, {"type": "image", "image": uint8 (3, H, W)},
            {"type": "audio", "audio": log-mel (T, 40)}, and, of an assistant,
            {"type": "image_codes", "codes": [...]} and {"type": "audio_codes", "codes": [...]}.
        patch_size: of the image embedder.
        default_system: what a conversation begins with that has no system message; None: nothing.
        add_generation_prompt: end with the beginning of an answer.

    Returns:
        The document; learned are the assistant's contents and the marks that end them.

    Raises:
        ValueError: a role, part or size is wrong, or the model has no codes for a part.
        TypeError: a content or part has the wrong type.
    """
    _check_messages(messages)
    places = [f"messages[{index}].content" for index in range(len(messages))]
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
        places = ["default_system", *places]
    document = Document()
    newline = tokenizer.encode("\n")
    for where, message in zip(places, messages, strict=True):
        document.add([tokenizer.start], False)
        _add_content(document, tokenizer, vocabulary, message, where, patch_size)
        document.add([tokenizer.end], message["role"] == "assistant")
        document.add(newline, False)
    if add_generation_prompt:
        document.add([tokenizer.start, *tokenizer.encode("assistant\n")], False)
    return document


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(f"messages is {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise ValueError("messages is empty; it must hold at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"messages[{index}] is {type(message).__name__}; it must be a dict with role and "
                "content"
            )
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(
                f"messages[{index}].role is {role!r}; it must be one of {', '.join(ROLES)}"
            )


def _add_content(
    document: Document,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    message: Message,
    where: str,
    patch_size: tuple[int, int],
) -> None:
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise TypeError(
            f"{where} is {type(content).__name__}; it must be a text or a list of parts"
        )
    learned = role == "assistant"
    text = f"{role}\n"
    if learned:  # what is learned must not share a token with what is not
        document.add(tokenizer.encode(text), False)
        text = ""
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text += _checked_text(part.get("text"), f"{where}[{number}].text")
            continue
        document.add(tokenizer.encode(text), learned)
        text = ""
        if kind == "image":
            add_image(
                document, vocabulary, part.get("image"), patch_size, f"{where}[{number}].image"
            )
        elif kind == "audio":
            add_audio(document, vocabulary, part.get("audio"), f"{where}[{number}].audio")
        elif kind in ("image_codes", "audio_codes"):
            if not learned:
                raise ValueError(
                    f"{where}[{number}].type is {kind}, which an assistant alone makes; give the "
                    f"{role}'s as image or audio"
                )
            add_codes(
                document, vocabulary, kind, part.get("codes"), True, f"{where}[{number}].codes"
            )
        else:
            raise ValueError(
                f"{where}[{number}].type is {kind!r}; it must be text, image, audio, image_codes "
                "or audio_codes"
            )
    document.add(tokenizer.encode(text), learned)


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{where} is {type(text).__name__}; it must be a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate at character {error.start}; it must be Unicode text"
        ) from error
    return text


def add_image(
    document: Document,
    vocabulary: Vocabulary,
    image: Any,
    patch_size: tuple[int, int],
    where: str = "image",
) -> None:
    """Appends placeholders for an image (3, H, W), uint8.

    Raises:
        TypeError: it is no such tensor.
        ValueError: it is smaller than one patch.
    """
    if (
        not isinstance(image, Tensor)
        or image.ndim != 3
        or image.shape[0] != 3
        or image.dtype != torch.uint8
    ):
        raise TypeError(f"{where} is {_kind(image)}; it must be a uint8 tensor (3, H, W)")
    rows, columns = (n // p for n, p in zip(image.shape[1:], patch_size, strict=True))
    if not rows * columns:
        raise ValueError(
            f"{where} has shape {tuple(image.shape)}; it must have at least "
            f"{patch_size[0]} × {patch_size[1]} pixels"
        )
    document.add_image(image, vocabulary.image_patch, rows * columns)


def add_audio(document: Document, vocabulary: Vocabulary, mel: Any, where: str = "audio") -> None:
    """Appends placeholders for a log-mel (T, 40); what is left of a patch of frames is dropped.

    Raises:
        TypeError: it is no such tensor.
        ValueError: it is shorter than one patch.
    """
    bands, frames = MEL_PATCH
    if (
        not isinstance(mel, Tensor)
        or mel.ndim != 2
        or mel.shape[1] != bands
        or not mel.is_floating_point()
    ):
        raise TypeError(f"{where} is {_kind(mel)}; it must be a floating log-mel (T, {bands})")
    whole = len(mel) // frames * frames
    if not whole:
        raise ValueError(f"{where} has {len(mel)} frames; it must have at least {frames}")
    document.add_audio(mel[:whole].T[None], vocabulary.audio_patch, whole // frames)


def add_codes(
    document: Document,
    vocabulary: Vocabulary,
    kind: str,
    codes: Any,
    learned: bool,
    where: str = "codes",
) -> None:
    """Appends an image or a sound of codes, between its marks.

    Raises:
        TypeError: codes is no list of int.
        ValueError: there are none, or the model has no such codes.
    """
    image = kind == "image_codes"
    count = vocabulary.image_codes if image else vocabulary.audio_codes
    if not isinstance(codes, Sequence) or not all(isinstance(code, int) for code in codes):
        raise TypeError(f"{where} must be a list of int; it is {codes!r:.60}")
    if not codes or not all(0 <= code < count for code in codes):
        raise ValueError(
            f"{where} are {list(codes)[:4]}…; there must be at least one, and this model has "
            f"{count} {kind.replace('_', ' ')}, from 0 on"
        )
    first = vocabulary.first_image_code if image else vocabulary.first_audio_code
    begin, end = (
        (vocabulary.image_start, vocabulary.image_end)
        if image
        else (vocabulary.audio_start, vocabulary.audio_end)
    )
    document.add([begin, *(first + code for code in codes), end], learned)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
