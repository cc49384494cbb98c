"""From tokens to text: stops across pieces, characters that are whole, kinds that are barred."""

import pytest

pytest.importorskip("tokenizers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.models.generation import Sampling
from mmkernels.serving.answer import Answer, End, Media, Stops, Text
from tests.serving import small

LETTERS = st.text("ab", max_size=12)


@given(pieces=st.lists(LETTERS, max_size=6), stop=st.lists(st.text("ab", min_size=1), max_size=3))
def test_stops_cut_where_the_whole_text_would_be_cut(pieces, stop):
    stops = Stops(stop)
    shown = []
    for piece in pieces:
        shown.append(stops.add(piece))
        if stops.found:
            break
    text = "".join(shown) + stops.rest()
    whole = "".join(pieces)
    # The first piece that completes a stop decides, as it does for whoever reads along.
    for end in range(len(pieces) + 1):
        seen = "".join(pieces[:end])
        places = [at for at in map(seen.find, stop) if at >= 0]
        if places:
            assert stops.found and text == seen[: min(places)]
            return
    assert not stops.found and text == whole


def run(tokens, stop=(), modalities=("text", "image", "audio"), max_tokens=200):
    """The events of an answer of which these tokens are by far the likeliest."""
    model = small.model()
    sampling = Sampling(max_tokens=max_tokens, media_temperature=0.0)
    answer = Answer(model.tokenizer, model.vocabulary, sampling, stop, frozenset(modalities))
    events = []
    for token in tokens:
        logits = torch.zeros(model.vocabulary.size)
        logits[token] = 10.0
        events += answer.next(logits)[1]
        if answer.done:
            break
    return events


def encoded(text):
    return list(small.model().tokenizer.encode(text))


def end():
    return small.model().tokenizer.end


def texts(events):
    return [event.text for event in events if isinstance(event, Text)]


def test_characters_come_whole():
    tokens = encoded("七🙂é")
    assert len(tokens) > 6
    assert texts(run([*tokens, end()])) == ["七", "🙂", "é"]


def test_a_character_that_is_cut_off_is_marked():
    tokens = encoded("七")
    assert "".join(texts(run([*tokens[:2], end()]))) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stop", ["name", "your name?", "e", "is your"])
def test_the_answer_ends_before_a_stop(stop):
    text = "What is your name? Tell."
    events = run([*encoded(text), end()], [stop, "never"])
    assert "".join(texts(events)) == text[: text.index(stop)]
    assert events[-1].reason == "stop"


def test_the_beginning_of_a_stop_is_kept_only_as_long_as_it_may_be_one():
    assert "".join(texts(run([*encoded("abc abd"), end()], ["abd!"]))) == "abc abd"


def image():
    v = small.model().vocabulary
    codes = [v.first_image_code + code for code in small.IMAGE_CODES]
    return [v.image_start, *codes, v.image_end]


def test_text_around_an_image_stands_around_it():
    events = run([*encoded("a"), *image(), *encoded("b"), end()])
    picture = Media("image", tuple(small.IMAGE_CODES))
    assert events == [Text("a"), picture, Text("b"), End("stop", 21)]


def test_an_image_that_is_cut_off_is_left_out():
    events = run([*encoded("a"), *image()], max_tokens=10)
    assert events == [Text("a"), End("length", 10)]


@pytest.mark.parametrize(
    ("modalities", "kinds"),
    [(("text", "image"), ["image"]), (("text", "audio"), []), (("text",), [])],
)
def test_what_was_not_asked_for_is_not_made(modalities, kinds):
    events = run([*image(), end()], modalities=modalities)
    assert [event.kind for event in events if isinstance(event, Media)] == kinds
