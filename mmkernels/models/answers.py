"""What an answer's tokens say, show and sound like."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmkernels.models.tokenizer import Tokenizer, Vocabulary

__all__ = ["Piece", "pieces"]


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        kind: "text", "image" or "audio".
        text: of a text.
        codes: of an image or a sound.
    """

    kind: str
    text: str = ""
    codes: tuple[int, ...] = ()


def pieces(tokens: Sequence[int], tokenizer: Tokenizer, vocabulary: Vocabulary) -> Iterator[Piece]:
    """The parts of an answer, in their order.

    Args:
        tokens: the answer's.
        tokenizer: that of the model.
        vocabulary: likewise.

    Yields:
        Texts, images and sounds; one of the latter that was cut off is left out.
    """
    text: list[int] = []
    codes: list[int] = []
    kinds = (
        {vocabulary.image_end: "image", vocabulary.audio_end: "audio"} if vocabulary.marks else {}
    )
    firsts = {"image": vocabulary.first_image_code, "audio": vocabulary.first_audio_code}
    for token in tokens:
        if token < vocabulary.text_size:
            text.append(token)
        elif token in kinds:
            kind = kinds[token]
            yield Piece(kind, codes=tuple(code - firsts[kind] for code in codes))
        elif token >= vocabulary.first_image_code:
            codes.append(token)
        else:  # an image or a sound begins
            codes = []
            if text:
                yield Piece("text", tokenizer.decode(text))
                text = []
    if text:
        yield Piece("text", tokenizer.decode(text))
