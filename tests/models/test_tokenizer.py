"""Text to ids and back, ids that come one by one, and where codes stand among them."""

from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from hypothesis import given
from hypothesis import strategies as st

from mmkernels.models.config import smol, tiny
from mmkernels.models.tokenizer import (
    END,
    END_OF_TEXT,
    START,
    TextStream,
    Tokenizer,
    Vocabulary,
)
from tests.models import small

TOKENIZER = small.tokenizer()
MARKS = (START, END, END_OF_TEXT)


@given(st.text() | st.lists(st.sampled_from((*MARKS, "a", " ", "\n", "é", "<|"))).map("".join))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < len(TOKENIZER) for token in ids)
    assert not set(ids) & {TOKENIZER.start, TOKENIZER.end, TOKENIZER.end_of_text}


def test_the_empty_text_has_no_ids() -> None:
    assert TOKENIZER.encode("") == () and TOKENIZER.decode([]) == ""


def test_marks_are_ids_that_no_text_has() -> None:
    ids = [TOKENIZER.start, TOKENIZER.end, TOKENIZER.end_of_text]
    assert len(set(ids)) == 3
    assert TOKENIZER.decode([ids[0], *TOKENIZER.encode("Hi"), ids[1], ids[2]]) == "Hi"
    for mark in MARKS:
        assert len(TOKENIZER.encode(mark)) > 1


def test_learning_makes_texts_shorter() -> None:
    text = small.TEXTS[0]
    assert len(TOKENIZER) == 300
    assert len(TOKENIZER.encode(text)) < len(text) / 1.5


def test_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json())
    loaded = Tokenizer.load(path)
    text = f"What do you hear, naïve? {END}"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.start, loaded.end) == (TOKENIZER.start, TOKENIZER.end)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "\0"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(path)


def test_a_tokenizer_without_the_marks() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    with pytest.raises(ValueError, match=r"no <\|im_start\|>"):
        Tokenizer(Backend(models.BPE()))


@given(st.text(), st.data())
def test_a_stream_gives_whole_characters_only(text: str, data: st.DataObject) -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode(text)
    said = ""
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        added = stream.add(ids[:count])
        ids = ids[count:]
        said += added
        assert text.startswith(said)
    said += "".join(stream.rest())
    assert said == text


def test_bytes_over_several_tokens_come_out_at_once() -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode("🙂é")
    assert len(ids) == 6  # a byte each
    assert [stream.add([token]) for token in ids] == ["", "", "", "🙂", "", "é"]
    assert list(stream.rest()) == []


def test_an_answer_that_ends_within_a_character() -> None:
    stream = TextStream(TOKENIZER)
    ids = TOKENIZER.encode("a🙂")
    assert stream.add(ids[:-1]) == ""
    assert list(stream.rest()) == ["a�"]


def test_bytes_that_are_no_character_do_not_hold_the_rest_back() -> None:
    stream = TextStream(TOKENIZER)
    broken, *_ = TOKENIZER.encode("🙂")
    assert stream.add([broken]) == ""
    assert stream.add(TOKENIZER.encode("a")) == "�a"
    assert stream.add(TOKENIZER.encode("b")) == "b"


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary.of(tiny(500)),
        Vocabulary(300, 15, 7),
        Vocabulary(300, 15, 0),
        Vocabulary(300, 0, 7),
        Vocabulary.of(smol()),
    ],
)
def test_ids_do_not_overlap(vocabulary: Vocabulary) -> None:
    v = vocabulary
    ids = list(range(v.text_size))
    if v.image_codes or v.audio_codes:
        ids += [v.image_start, v.image_end, v.audio_start, v.audio_end]
    ids += range(v.first_image_code, v.first_image_code + v.image_codes)
    ids += range(v.first_audio_code, v.first_audio_code + v.audio_codes)
    assert ids == list(range(v.size))  # each once, none left over
    assert {v.image_patch, v.audio_patch}.isdisjoint(ids)
    assert v.image_patch != v.audio_patch


def test_the_vocabulary_of_a_configuration() -> None:
    v = Vocabulary.of(tiny(500))
    assert (v.text_size, v.image_codes, v.audio_codes, v.marks) == (500, 1000, 1000, 4)
    assert v.size == tiny(500).decoder.vocab_size
    v = Vocabulary.of(smol())
    assert (v.text_size, v.size, v.marks) == (49152, 49152, 0)
