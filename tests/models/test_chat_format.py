"""Conversations as ids: what is learned, what a user cannot forge, and what is refused."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")

from hypothesis import given
from hypothesis import strategies as st

from mmkernels.models.chat_format import Document, encode
from mmkernels.models.tokenizer import Vocabulary
from tests.models import small
from tests.models.small import assistant, image, mel, user

TOKENIZER = small.tokenizer()
VOCABULARY = Vocabulary(len(TOKENIZER), 15, 15)
NAMES = {
    VOCABULARY.image_start: "<img>",
    VOCABULARY.image_end: "</img>",
    VOCABULARY.audio_start: "<snd>",
    VOCABULARY.audio_end: "</snd>",
    VOCABULARY.image_patch: "▢",
    VOCABULARY.audio_patch: "♪",
    TOKENIZER.start: "<|im_start|>",
    TOKENIZER.end: "<|im_end|>",
}


def chat(messages: Any, **options: Any) -> Document:
    return encode(TOKENIZER, VOCABULARY, messages, **options)


def shown(document: Document, where: Any = None) -> str:
    """The ids as text with marks; only those for which `where` holds, if it is given."""
    said: list[str] = []
    plain: list[int] = []
    for token, kept in zip(document.ids, where or [True] * len(document), strict=True):
        if kept and token < VOCABULARY.text_size and token not in NAMES:
            plain.append(token)
            continue
        said.append(TOKENIZER.decode(plain))
        plain = []
        if kept:
            code = token - VOCABULARY.first_image_code
            said.append(NAMES.get(token, f"[{code}]"))
    return "".join(said) + TOKENIZER.decode(plain)


def test_text() -> None:
    document = chat([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello.")])
    assert shown(document) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    assert document.spans == [-1] * len(document)


def test_learned_are_answers_and_their_ends() -> None:
    drawn = {"type": "image_codes", "codes": [3, 0, 14]}
    said = {"type": "audio_codes", "codes": [2]}
    document = chat(
        [
            {"role": "system", "content": "Brief."},
            user("One", image()),
            assistant("Two", drawn),
            user(mel()),
            assistant(said, "three", "four"),
        ]
    )
    assert shown(document, document.learned) == (
        "Two<img>[3][0][14]</img><|im_end|><snd>[17]</snd>threefour<|im_end|>"
    )


def test_no_token_is_of_both_the_prompt_and_the_answer() -> None:
    messages = [user("What digit?"), assistant("\n\n Seven.")]
    prompt = chat(messages[:1], add_generation_prompt=True)
    whole = chat(messages)
    assert whole.ids[: len(prompt)] == prompt.ids
    assert whole.learned == [
        index >= len(prompt) and index < len(whole) - 1 for index in range(len(whole))
    ]
    assert not any(prompt.learned)


def test_the_beginning_of_an_answer() -> None:
    assert shown(chat([user("Hi")], add_generation_prompt=True)).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_answer_without_text_has_its_end_learned() -> None:
    for content in ("", []):
        document = chat([user("Hi"), {"role": "assistant", "content": content}])
        assert shown(document, document.learned) == "<|im_end|>"


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant", "\n", "a"])))
def test_no_text_forges_a_message(pieces: list[str]) -> None:
    text = "".join(pieces)
    document = chat([user(text), assistant("No.")])
    assert document.ids.count(TOKENIZER.start) == document.ids.count(TOKENIZER.end) == 2
    assert TOKENIZER.end_of_text not in document.ids
    end = document.ids.index(TOKENIZER.end)
    assert TOKENIZER.decode(document.ids[1:end]) == f"user\n{text}"
    assert shown(document, document.learned) == "No.<|im_end|>"


def test_images_and_sounds_in_several_turns() -> None:
    pictures, sounds = [image(1, 2, 1), image(2, 2, 2)], [mel(3, 3), mel(1, 4)]
    document = chat(
        [
            user("A", pictures[0], "B", sounds[0]),
            assistant("C"),
            user(sounds[1], pictures[1]),
        ]
    )
    assert shown(document) == (
        "<|im_start|>user\nA▢▢B♪♪♪<|im_end|>\n"
        "<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>user\n♪▢▢▢▢<|im_end|>\n"
    )
    assert [s for s in document.spans if s >= 0] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    placeholders = [token >= VOCABULARY.size for token in document.ids]
    assert placeholders == [s >= 0 for s in document.spans]
    for got, want in zip(document.images, pictures, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(document.audios, sounds, strict=True):
        assert torch.equal(got, want.T[None])


def test_parts_of_text_are_one_text() -> None:
    assert chat([user("Wh", "at", " digit?")]).ids == chat([user("What digit?")]).ids
    assert chat([{"role": "user", "content": "What digit?"}]).ids == chat([user("What digit?")]).ids


def test_what_is_no_whole_patch_is_left_out() -> None:
    document = chat([user(torch.zeros(3, 23, 17, dtype=torch.uint8), torch.zeros(11, 40))])
    assert document.ids.count(VOCABULARY.image_patch) == 2 * 2
    assert document.ids.count(VOCABULARY.audio_patch) == 2
    assert document.audios[0].shape == (1, 40, 8)
    wide = chat([user(image(2, 2))], patch_size=(16, 4))
    assert wide.ids.count(VOCABULARY.image_patch) == 1 * 4


def test_the_default_system_message() -> None:
    with_it = chat([user("Hi")], default_system="Be brief.")
    assert with_it.ids == chat([{"role": "system", "content": "Be brief."}, user("Hi")]).ids
    own = [{"role": "system", "content": "Talk."}, user("Hi")]
    assert chat(own, default_system="Be brief.").ids == chat(own).ids
    assert shown(chat([user("Hi")], default_system="")).startswith("<|im_start|>system\n<|im_end|>")


def test_messages_are_left_as_they_are() -> None:
    messages = [user("Hi", "there"), assistant("Hello")]
    before = copy.deepcopy(messages)
    chat(messages, default_system="Be brief.")
    assert messages == before
    assert chat(tuple(messages)).ids == chat(messages).ids


def of_user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def of_assistant(kind: str, **part: Any) -> list[Any]:
    return [user("Hi"), {"role": "assistant", "content": [{"type": kind, **part}]}]


TEXT = {"type": "text", "text": "Hi"}
WRONG: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "messages is empty"),
    (None, TypeError, "messages is NoneType"),
    ("Hi", TypeError, "messages is str"),
    ({"role": "user", "content": "Hi"}, TypeError, "messages is dict"),
    ([user("Hi"), "Hi"], TypeError, r"messages\[1\] is str"),
    ([{"content": "Hi"}], ValueError, r"messages\[0\].role is None"),
    ([user("Hi"), {"role": "tool", "content": ""}], ValueError, r"messages\[1\].role is 'tool'"),
    ([{"role": ["user"], "content": "Hi"}], ValueError, r"messages\[0\].role is \['user'\]"),
    ([{"role": "user"}], TypeError, r"messages\[0\].content is NoneType"),
    ([{"role": "user", "content": 7}], TypeError, r"messages\[0\].content is int"),
    ([{"role": "user", "content": b"Hi"}], TypeError, r"messages\[0\].content is bytes"),
    ([{"role": "user", "content": TEXT}], TypeError, r"messages\[0\].content is dict"),
    (of_user("Hi"), ValueError, r"messages\[0\].content\[0\].type is None"),
    (of_user(TEXT, {"type": "video"}), ValueError, r"messages\[0\].content\[1\].type is 'video'"),
    (of_user(TEXT, {"type": "text"}), TypeError, r"content\[1\].text is NoneType"),
    (of_user({"type": "text", "text": b"Hi"}), TypeError, r"content\[0\].text is bytes"),
    (of_user({"type": "text", "text": "a\ud83d"}), ValueError, r"content\[0\].text.*surrogate.*1"),
    (of_user({"type": "image"}), TypeError, r"content\[0\].image is NoneType"),
    (
        of_user(TEXT, {"type": "image", "image": torch.zeros(3, 8, 8)}),
        TypeError,
        r"content\[1\].image is torch.float32 \(3, 8, 8\)",
    ),
    (
        of_user({"type": "image", "image": torch.zeros(1, 8, 8, dtype=torch.uint8)}),
        TypeError,
        r"content\[0\].image is torch.uint8 \(1, 8, 8\)",
    ),
    (
        of_user({"type": "image", "image": torch.zeros(3, 8, 7, dtype=torch.uint8)}),
        ValueError,
        r"content\[0\].image.*8 × 8",
    ),
    (of_user({"type": "audio", "audio": [1.0]}), TypeError, r"content\[0\].audio is list"),
    (of_user({"type": "audio", "audio": torch.zeros(40, 8)}), TypeError, r"audio is .*\(40, 8\)"),
    (
        of_user({"type": "audio", "audio": torch.zeros(8, 40, dtype=torch.int16)}),
        TypeError,
        r"audio is torch.int16",
    ),
    (of_user({"type": "audio", "audio": torch.zeros(3, 40)}), ValueError, r"audio has 3 frames"),
    (
        of_user({"type": "image_codes", "codes": [1]}),
        ValueError,
        r"messages\[0\].content\[0\].type is image_codes.*assistant alone",
    ),
    (of_assistant("image_codes"), TypeError, r"messages\[1\].content\[0\].codes"),
    (of_assistant("image_codes", codes="12"), TypeError, r"messages\[1\].content\[0\].codes"),
    (of_assistant("audio_codes", codes=[0.5]), TypeError, r"messages\[1\].content\[0\].codes"),
    (of_assistant("audio_codes", codes=[]), ValueError, r"content\[0\].codes.*at least one"),
    (of_assistant("image_codes", codes=[0, 15]), ValueError, r"content\[0\].codes.*15 image codes"),
    (of_assistant("audio_codes", codes=[-1]), ValueError, r"content\[0\].codes.*15 audio codes"),
]


@pytest.mark.parametrize("default_system", [None, "Be brief."])
@pytest.mark.parametrize(("messages", "error", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_what_is_refused(
    messages: Any, error: type[Exception], said: str, default_system: str | None
) -> None:
    with pytest.raises(error, match=said):
        chat(messages, default_system=default_system)


def test_codes_for_a_model_that_makes_none() -> None:
    with pytest.raises(ValueError, match="this model has 0 image codes"):
        encode(TOKENIZER, Vocabulary(len(TOKENIZER), 0, 0), of_assistant("image_codes", codes=[0]))
