"""Is every example true: do its picture, sound, question and answer say the same?"""

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn"):
    pytest.importorskip(library)

from mmkernels.training import examples, phrases  # noqa: E402 (may be absent)
from mmkernels.training.digits import COLOURS, MIDDLE, PLACES, Digits, colour_of  # noqa: E402
from mmkernels.training.examples import Material, make  # noqa: E402
from mmkernels.training.phrases import DIGITS, NUMBERS, TASKS, numbers_in  # noqa: E402
from tests.training import small  # noqa: E402

COUNT = 200


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def made():
    """Task -> examples, all made at once."""
    tasks = [task for task in TASKS for _ in range(COUNT)]
    every = make(tasks, small.material(), generator())
    assert [example.task for example in every] == tasks
    return {task: [e for e in every if e.task == task] for task in TASKS}


def parts(example, kind):
    return [part[kind] for part in example.question if part["type"] == kind]


def text(content):
    return "".join(part["text"] for part in content if part["type"] == "text")


def test_each_shows_and_plays_what_its_task_asks_about(made):
    seen = {"see", "read", "sum", "same", "describe"}
    heard = {"hear", "sum", "same"}
    for task, some in made.items():
        for example in some:
            assert len(parts(example, "image")) == (task in seen)
            assert len(parts(example, "audio")) == (task in heard)
            assert len(text(example.question)) > 3
            roles = [message["role"] for message in example.messages]
            assert roles == ["user", "assistant"]


def test_the_label_is_that_of_the_image(made):
    labels = small.images()["train"].labels
    for task in ("see", "sum", "same", "describe"):
        for example in made[task]:
            (row,) = example.facts["rows"]
            assert example.facts["seen"] == labels[row]
            assert example.facts["index"] == small.images()["train"].index[row]
    for example in made["read"]:
        assert example.facts["digits"] == labels[example.facts["rows"]].tolist()


def test_the_picture_is_that_image_in_that_place(made):
    """Ink lies where the facts say, in the colour they say."""
    plain = Material(small.images()["test"], small.banks()["voices"], (), False)
    for example in make(["describe"] * COUNT, plain, generator(1)):
        (picture,) = parts(example, "image")
        assert picture.dtype == torch.uint8 and picture.shape == (3, 32, 32)
        ink = picture.amax(0).float() - 60
        ink = ink.clamp(min=0)
        rows = (ink.sum(1) * torch.arange(32)).sum() / ink.sum()
        columns = (ink.sum(0) * torch.arange(32)).sum() / ink.sum()
        place = f"{'top' if rows < 16 else 'bottom'} {'left' if columns < 16 else 'right'}"
        inked = (ink > 0).any(1).nonzero()[:, 0]
        if inked[-1] - inked[0] > 19:  # large
            place = MIDDLE
        assert place == example.facts["place"]
        assert COLOURS[colour_of(picture[None])] == example.facts["colour"]


def test_pictures_are_of_their_own_rows():
    """Each image a shade of its own: none is shown for another, whatever is made together."""
    count = 4
    shades = torch.linspace(0.25, 1, count)[:, None, None].expand(count, 8, 8)
    shaded = Digits(shades.contiguous(), torch.arange(count), torch.arange(count))
    material = Material(shaded, small.banks()["train"], (), False, in_the_middle=1.0)
    tasks = ["see", "sum", "read", "hear", "same"] * 20
    for example in make(tasks, material, generator()):
        for picture in parts(example, "image"):
            rows = example.facts["rows"]
            assert picture.shape == (3, 32, 32 * len(rows))
            bright = picture.view(3, 32, -1, 32).amax(0).float()[12:20, :, 12:20].mean((0, 2))
            colour = COLOURS.index(example.facts["colour"])
            full = [230, 190, 240, 240, 245, 200, 245, 250][colour]
            ink = shades[rows, 0, 0]
            # Of the ground 15 on average. Half of the way to the next shade is more than 23.
            torch.testing.assert_close(bright, ink * full + (1 - ink) * 15, atol=23, rtol=0)


def test_the_sound_is_the_digit_in_the_voice(made):
    bank = small.banks()["train"]
    for task in ("hear", "sum", "same"):
        for example in made[task]:
            recording = example.facts["recording"]
            assert bank.digits[recording] == example.facts["heard"]
            assert bank.voices[recording] == example.facts["voice"]
            (mel,) = parts(example, "audio")
            assert mel.shape[1] == 40 and len(mel) % 4 == 0 and 4 <= len(mel) <= 120
    untouched = Material(small.images()["test"], bank, (), False)
    for example in make(["hear"] * 50, untouched, generator()):
        recording = example.facts["recording"]
        (mel,) = parts(example, "audio")
        assert torch.equal(mel, bank.mels[recording, : bank.lengths[recording]])


def test_answers_say_what_is_true(made):
    for example in made["see"]:
        assert text(example.answer) == f"I see a {DIGITS[example.facts['seen']]}."
    for example in made["hear"]:
        assert text(example.answer) == f"I hear a {DIGITS[example.facts['heard']]}."
    for example in made["read"]:
        assert numbers_in(text(example.answer)) == example.facts["digits"]
    for example in made["sum"]:
        a, b = example.facts["seen"], example.facts["heard"]
        assert text(example.answer) == f"{DIGITS[a]} plus {DIGITS[b]} is {NUMBERS[a + b]}."
    for example in made["same"]:
        a, b = example.facts["seen"], example.facts["heard"]
        verdict = "the same" if a == b else "different"
        assert text(example.answer) == f"I see a {DIGITS[a]} and hear a {DIGITS[b]}: {verdict}."
    for example in made["describe"]:
        facts = example.facts
        assert text(example.answer) == (
            f"A {facts['colour']} {DIGITS[facts['seen']]} at the {facts['place']}."
        )
    pairs = dict(phrases.talk())
    for example in made["talk"]:
        assert pairs[text(example.question)] == text(example.answer) == example.facts["answer"]


def test_questions_are_those_of_the_task_and_tell_no_answer(made):
    for task in ("see", "hear", "read", "sum", "same", "describe"):
        for example in made[task]:
            assert text(example.question) in phrases.QUESTIONS[task]
            assert not numbers_in(text(example.question))
            assert not any(colour in text(example.question) for colour in COLOURS)


def test_what_is_drawn_and_said_is_what_was_asked_for(made):
    material = small.material()
    labels = small.images()["train"].labels
    for example in made["draw"]:
        (part,) = example.answer
        digit, colour = example.facts["digit"], example.facts["colour"]
        asked = text(example.question)
        assert numbers_in(asked) == [digit]
        assert [c for c in COLOURS if c in asked] in ([], [colour])
        if colour not in asked:
            assert colour == phrases.PLAIN
        known = material.drawings[labels == digit, COLOURS.index(colour)]
        assert part["type"] == "image_codes"
        assert (known == torch.tensor(part["codes"])).all(1).any()
    for example in made["say"]:
        (part,) = example.answer
        digit = example.facts["digit"]
        assert numbers_in(text(example.question)) == [digit]
        assert part["type"] == "audio_codes"
        known = [material.sayings[index] for index in material.sayable[digit]]
        assert part["codes"] in known
        assert all(material.speech.digits[index] == digit for index in material.sayable[digit])


def within(count, total, share):
    """Five standard deviations: one in two million, if the share is right."""
    return abs(count - total * share) <= 5 * (total * share * (1 - share)) ** 0.5


def test_everything_is_as_likely_as_it_is_said_to_be(monkeypatch):
    """Nothing but the image and the sound tells the answer."""
    monkeypatch.setattr(examples, "_show", lambda *args: None)
    monkeypatch.setattr(examples, "_sound", lambda *args: None)
    total = 4000
    some = {task: make([task] * total, small.material(), generator()) for task in TASKS}

    def count(task, holds):
        return sum(holds(example.facts) for example in some[task])

    assert within(count("same", lambda f: f["seen"] == f["heard"]), total, 0.5)
    for digit in range(10):
        share = float((small.images()["train"].labels == digit).float().mean())
        for task in ("see", "sum", "same", "describe"):
            assert within(count(task, lambda f, d=digit: f["seen"] == d), total, share)
        for task in ("hear", "sum"):
            assert within(count(task, lambda f, d=digit: f["heard"] == d), total, 0.1)
        assert within(count("say", lambda f, d=digit: f["digit"] == d), total, 0.1)
    for colour in COLOURS:
        for task in ("see", "describe", "read", "sum"):
            assert within(count(task, lambda f, c=colour: f["colour"] == c), total, 1 / 8)
    for place in PLACES:
        assert within(count("describe", lambda f, p=place: f["place"] == p), total, 0.2)
        share = 0.1 + 0.5 * (place == MIDDLE)
        assert within(count("see", lambda f, p=place: f["place"] == p), total, share)
    for length in (2, 3):
        assert within(count("read", lambda f, n=length: len(f["digits"]) == n), total, 0.5)
    first = [[part["type"] for part in example.question] for example in some["sum"]]
    assert within(first.count(["image", "audio", "text"]), total, 0.5)
    assert within(first.count(["audio", "image", "text"]), total, 0.5)
    for task, questions in phrases.QUESTIONS.items():
        if task.startswith("draw") or task == "say":
            continue
        for question in questions:
            asked = sum(text(example.question) == question for example in some[task])
            assert within(asked, total, 1 / len(questions))


def test_middle_is_only_for_those_that_need_no_place():
    material = Material(
        small.images()["train"], small.banks()["train"], (), True, in_the_middle=1.0
    )
    made = make(["see", "describe"] * 30, material, generator())
    assert {e.facts["place"] for e in made if e.task == "see"} == {MIDDLE}
    assert len({e.facts["place"] for e in made if e.task == "describe"}) == len(PLACES)


def same(a, b):
    """Whether two examples are the same, tensors and all."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return plain(vars(a)) == plain(vars(b))


def test_the_same_seed_gives_the_same_and_another_one_others():
    tasks = list(TASKS)
    a, b, c = (make(tasks, small.material(), generator(seed)) for seed in (5, 5, 6))
    torch.manual_seed(99)
    d = make(tasks, small.material(), generator(5))
    assert all(same(*pair) for pair in zip(a, b, strict=True))
    assert all(same(*pair) for pair in zip(a, d, strict=True))
    assert not all(same(*pair) for pair in zip(a, c, strict=True))


def test_making_changes_no_material():
    material = small.material()
    before = [x.clone() for x in (material.digits.images, material.speech.mels)]
    make(list(TASKS) * 5, material, generator())
    assert torch.equal(before[0], material.digits.images)
    assert torch.equal(before[1], material.speech.mels)
    for plan in (examples._IMAGE, examples._SOUND):
        assert len(plan) == 1  # no picture was put into the plan of all


def test_without_codes_there_is_nothing_to_draw_or_say():
    material = Material(small.images()["test"], small.banks()["voices"], phrases.talk(), False)
    for example in make(["draw", "say"], material, generator()):
        assert example.answer == []
        assert "digit" in example.facts


def test_none_is_made_of_none():
    assert make([], small.material(), generator()) == []
