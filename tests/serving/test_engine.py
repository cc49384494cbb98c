"""Continuous batching: does an answer depend on itself alone, whatever joins and leaves?"""

import queue
import threading

import pytest

pytest.importorskip("tokenizers")

import torch

from mmkernels.models.generation import Sampling, generate
from mmkernels.serving.answer import Answer, End, Media, Text
from mmkernels.serving.engine import Engine
from mmkernels.serving.errors import Closing, Overloaded, ServingError, TimedOut
from tests.serving import small


@pytest.fixture
def engine():
    made = Engine(small.model(), slots=4, queue=100, context=300)
    yield made
    made.close()


def prompt(*content):
    return small.model().document(small.user(*content), add_generation_prompt=True)


def begin(engine, document, sampling, **options):
    """The ticket, and the queue of the answer's events."""
    model = small.model()
    events = queue.Queue()
    ticket = engine.admit()
    ticket.begin(
        document, Answer(model.tokenizer, model.vocabulary, sampling, **options), events.put
    )
    return ticket, events


def gather(events):
    """The events until the last, which is an `End` or an error."""
    found = []
    while not found or not isinstance(found[-1], End | Exception):
        found.append(events.get(timeout=60))
    return found


def test_answers_are_those_of_the_model_alone(engine):
    shown = {"type": "image", "image": torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)}
    heard = {"type": "audio", "audio": torch.randn(40, 40)}
    documents, samplings = [], []
    for i in range(60):
        question = list(small.ANSWERS)[i % len(small.ANSWERS)]
        content = [question, [shown, question], [heard, shown]][i % 3]
        documents.append(prompt(*([content] if isinstance(content, str) else content)))
        samplings.append(Sampling(max_tokens=5 + i, seed=i, temperature=0.8 * (i % 2)))
    begun = [begin(engine, *both) for both in zip(documents, samplings, strict=True)]
    assert engine.stats()["admitted"] == 60
    for document, sampling, (ticket, events) in zip(documents, samplings, begun, strict=True):
        found = gather(events)
        ticket.close()
        (tokens,) = generate(small.model(), [document], [sampling])
        assert found[-1].tokens - len(tokens) == (found[-1].reason == "stop")
        assert events_of(tokens) == merged(found[:-1])
    assert engine.stats()["admitted"] == 0


def events_of(tokens):
    from mmkernels.models.answers import pieces

    model = small.model()
    return [
        piece.text if piece.kind == "text" else (piece.kind, piece.codes)
        for piece in pieces(tokens, model.tokenizer, model.vocabulary)
        if piece.text or piece.codes
    ]


def merged(events):
    """Texts that follow each other as one."""
    found = []
    for event in events:
        if isinstance(event, Media):
            found.append((event.kind, event.codes))
        elif found and isinstance(found[-1], str):
            found[-1] += event.text
        else:
            found.append(event.text)
    return found


def test_events_come_as_they_are_made(engine):
    ticket, events = begin(engine, prompt("draw"), Sampling(media_temperature=0.0))
    with ticket:
        found = gather(events)
    assert merged(found[:-1]) == ["Here: ", ("image", tuple(small.IMAGE_CODES)), " There."]
    assert len([event for event in found if isinstance(event, Text)]) > 4
    assert found[-1] == End("stop", found[-1].tokens)


def test_one_joins_while_others_are_answered():
    model = small.Held()
    engine = Engine(model, slots=2, queue=5, context=300)
    try:
        first, events = begin(engine, prompt("count"), Sampling())
        assert isinstance(events.get(timeout=30), Text)  # it runs, and waits in its next step
        second, others = begin(engine, prompt("hello"), Sampling())
        model.go.set()
        with first, second:
            assert merged(gather(others)[:-1]) == [small.text_of("hello")]
            assert merged(gather(events)[:-1]) == [small.text_of("count")[1:]]
    finally:
        model.go.set()
        engine.close()


def test_places_are_counted(engine):
    tickets = [engine.admit() for _ in range(104)]
    with pytest.raises(Overloaded, match="104 requests"):
        engine.admit()
    tickets[0].close()
    tickets[0].close()
    engine.admit().close()
    for ticket in tickets:
        ticket.close()
    assert engine.stats()["admitted"] == 0


def test_a_listener_that_fails_stops_its_answer_alone(engine):
    def tell(_):
        raise RuntimeError("gone")

    model = small.model()
    with engine.admit() as ticket:
        ticket.begin(prompt("count"), Answer(model.tokenizer, model.vocabulary, Sampling()), tell)
        other, events = begin(engine, prompt("hello"), Sampling())
        with other:
            assert merged(gather(events)[:-1]) == [small.text_of("hello")]


def test_logits_that_are_nan_fail_their_answer_alone(engine, monkeypatch):
    model = small.model()
    decode = type(model).decode

    def broken(ids, cache):
        logits = decode(model, ids, cache)
        logits[0] = torch.nan
        return logits

    monkeypatch.setattr(model, "decode", broken)
    first, events = begin(engine, prompt("count"), Sampling(temperature=1.0))
    with first:
        assert isinstance(gather(events)[-1], RuntimeError)
    monkeypatch.undo()
    again, events = begin(engine, prompt("hello"), Sampling())
    with again:
        assert merged(gather(events)[:-1]) == [small.text_of("hello")]


def test_a_conversation_that_cannot_be_read_fails_alone(engine):
    broken = prompt("hello")
    broken.images.append(torch.zeros(3, 32, 32, dtype=torch.uint8))  # without a placeholder
    bad, bad_events = begin(engine, broken, Sampling())
    good, good_events = begin(engine, prompt("hello"), Sampling())
    with bad, good:
        assert isinstance(gather(bad_events)[-1], ValueError)
        assert merged(gather(good_events)[:-1]) == [small.text_of("hello")]


def test_time_runs_out():
    engine = Engine(small.model(), context=300, timeout=1e-6)
    ticket, events = begin(engine, prompt("count"), Sampling())
    with ticket:
        assert isinstance(gather(events)[-1], TimedOut)
    engine.close()


def test_closing_fails_what_runs_and_what_comes():
    model = small.Held()
    engine = Engine(model, slots=1, context=300)
    begun = [begin(engine, prompt("count"), Sampling()) for _ in range(3)]
    late = engine.admit()
    threading.Timer(0.2, model.go.set).start()
    engine.close()
    assert not engine.alive
    for _, events in begun:
        assert isinstance(gather(events)[-1], Closing)
    with pytest.raises(Closing):
        engine.admit()
    with pytest.raises(ServingError, match="shutting down"):
        late.begin(prompt("hello"), begun[0][0]._job.answer, print)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"queue": -1}, "queue is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"context": 513}, "capacity is 513"),
    ],
)
def test_wrong_sizes(sizes, words):
    with pytest.raises(ValueError, match=words):
        Engine(small.model(), **sizes)
