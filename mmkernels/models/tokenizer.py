"""Text to token ids and back, and where codes and placeholders stand among the ids.

The ids of a model, in this order:

- text, and the marks `<|im_start|>` and `<|im_end|>` around messages;
- image_start, image_end, audio_start and audio_end, around what the model draws and says;
- the image codes, then the audio codes, of its codecs;
- image_patch and audio_patch, placeholders for embeddings of inputs; they have no embedding row.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkernels.models.config import ModelConfig

__all__ = ["TextStream", "Tokenizer", "Vocabulary"]

# Texts of at most so many characters are kept with their ids, at most so many of them: phrases of
# training come again and again, and what users send must not fill the memory.
_SHORT, _KEPT = 256, 8192
START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """Ids beyond the text's; without a codec there are neither its codes nor its marks.

    Attributes:
        text_size: number of text ids.
        image_codes: number of image codes.
        audio_codes: number of audio codes.
        marks: 4 where there are codes, else 0.
    """

    text_size: int
    image_codes: int
    audio_codes: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Vocabulary":
        """The vocabulary of a model with this config."""
        codes = tuple(
            codec.num_codes if codec is not None else 0
            for codec in (config.image_codec, config.audio_codec)
        )
        marks = 4 if any(codes) else 0
        return cls(config.decoder.vocab_size - sum(codes) - marks, *codes)

    @property
    def marks(self) -> int:
        """Ids of the marks."""
        return 4 if self.image_codes or self.audio_codes else 0

    @property
    def image_start(self) -> int:
        """Before the codes of an image."""
        return self.text_size

    @property
    def image_end(self) -> int:
        """After them."""
        return self.text_size + 1

    @property
    def audio_start(self) -> int:
        """Before the codes of a sound."""
        return self.text_size + 2

    @property
    def audio_end(self) -> int:
        """After them."""
        return self.text_size + 3

    @property
    def first_image_code(self) -> int:
        """The id of image code 0."""
        return self.text_size + self.marks

    @property
    def first_audio_code(self) -> int:
        """The id of audio code 0."""
        return self.first_image_code + self.image_codes

    @property
    def size(self) -> int:
        """Rows of the decoder's embedding."""
        return self.first_audio_code + self.audio_codes

    @property
    def image_patch(self) -> int:
        """Placeholder for one embedding of an image that was given."""
        return self.size

    @property
    def audio_patch(self) -> int:
        """Placeholder for one embedding of a sound that was given."""
        return self.size + 1


class Tokenizer:
    """Byte-level BPE of the `tokenizers` library; text never becomes a mark.

    Args:
        backend: a `tokenizers.Tokenizer` that has the three marks.

    Attributes:
        start: id of `<|im_start|>`.
        end: id of `<|im_end|>`.
        end_of_text: id of `<|endoftext|>`, between documents.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        # A user who writes <|im_end|> gets its characters, and ends no message.
        backend.encode_special_tokens = True
        self.start, self.end, self.end_of_text = (
            self._mark(mark) for mark in (START, END, END_OF_TEXT)
        )
        self._encode = functools.lru_cache(maxsize=_KEPT)(self._encode_anew)

    def __len__(self) -> int:
        """Number of ids."""
        return int(self.backend.get_vocab_size())

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "Tokenizer":
        """Learns `size` ids from texts.

        Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units",
        ACL 2016.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a file that holds what `to_json` gave.

        Args:
            path: of the file.

        Raises:
            ValueError: the file is no tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        try:
            return cls(Backend.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer of this model: {error}") from error

    def to_json(self) -> str:
        """What `load` reads from a file."""
        return str(self.backend.to_str())

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text; the empty one has none."""
        return self._encode(text) if len(text) <= _SHORT else self._encode_anew(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; marks are left out, bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def _mark(self, mark: str) -> int:
        index = self.backend.token_to_id(mark)
        if index is None:
            raise ValueError(f"the tokenizer has no {mark}, which the chat format needs")
        return int(index)


class TextStream:
    """Text of ids that come one by one, given out as soon as its characters are whole.

    Args:
        tokenizer: that of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.said = ""

    def add(self, ids: Iterable[int]) -> str:
        """What these ids add to the text; a character that is not whole yet is kept back."""
        self.ids.extend(ids)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("�"):
            return ""
        added, self.said = text[len(self.said) :], text
        return added

    def rest(self) -> Iterator[str]:
        """What was kept back, where the answer ended within a character."""
        text = self.tokenizer.decode(self.ids)
        if len(text) > len(self.said):
            yield text[len(self.said) :]
