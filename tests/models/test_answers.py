"""An answer's tokens as texts, images and sounds."""

import pytest

pytest.importorskip("tokenizers")

from mmkernels.models.answers import Piece, pieces
from mmkernels.models.tokenizer import Vocabulary
from tests.models import small

TOKENIZER = small.tokenizer()
V = Vocabulary(len(TOKENIZER), 15, 15)
ONE, TWO = TOKENIZER.encode("It is a seven."), TOKENIZER.encode("🙂")
IMAGE = [V.image_start, V.first_image_code, V.first_image_code + 14, V.image_end]
SOUND = [V.audio_start, V.first_audio_code + 14, V.audio_end]


def test_parts_come_in_their_order() -> None:
    tokens = [*ONE, *IMAGE, *IMAGE, *TWO, *SOUND, *ONE]
    assert list(pieces(tokens, TOKENIZER, V)) == [
        Piece("text", "It is a seven."),
        Piece("image", codes=(0, 14)),
        Piece("image", codes=(0, 14)),
        Piece("text", "🙂"),
        Piece("audio", codes=(14,)),
        Piece("text", "It is a seven."),
    ]


def test_the_empty_answer_has_no_parts() -> None:
    assert list(pieces([], TOKENIZER, V)) == []


@pytest.mark.parametrize("cut", [IMAGE[:-1], SOUND[:-1], SOUND[:1]])
def test_what_was_cut_off_is_left_out(cut: list[int]) -> None:
    assert list(pieces([*ONE, *cut], TOKENIZER, V)) == [Piece("text", "It is a seven.")]


def test_marks_in_a_text_are_left_out() -> None:
    tokens = [TOKENIZER.start, *ONE, TOKENIZER.end_of_text]
    assert list(pieces(tokens, TOKENIZER, V)) == [Piece("text", "It is a seven.")]


def test_a_model_without_codes() -> None:
    assert list(pieces(ONE, TOKENIZER, Vocabulary(len(TOKENIZER), 0, 0))) == [
        Piece("text", "It is a seven.")
    ]
