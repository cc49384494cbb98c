"""Is a perfect model told from one that guesses, in every task and with every modality?"""

import collections

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn"):
    pytest.importorskip(library)

from mmkernels.models.answers import Piece  # noqa: E402 (may be absent)
from mmkernels.training import digits, evaluate, phrases  # noqa: E402
from mmkernels.training.digits import COLOURS, HARDER_FROM, PLACES  # noqa: E402
from mmkernels.training.evaluate import MODALITIES, Answered, Judges, Result  # noqa: E402
from mmkernels.training.examples import Example, Material, make  # noqa: E402
from mmkernels.training.phrases import DIGITS, NUMBERS, TASKS  # noqa: E402
from tests.training import small  # noqa: E402

MODEL = small.model()
TEXT_TASKS = tuple(task for task in TASKS if task not in ("draw", "say"))
COUNT = 150


class Oracle:
    """Answers what is true of the image and the sound that it is given, whatever was meant."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.images, self.sounds = {}, {}
        self.task = None
        self.prompts = []
        monkeypatch.setattr(evaluate, "make", self.make)
        monkeypatch.setattr(evaluate, "generate", self.generate)

    def make(self, tasks, material, generator):
        self.task = tasks[0]
        made = make(tasks, material, generator)
        for example in made:
            for part in example.question:
                if part["type"] == "image":
                    self.images[part["image"].numpy().tobytes()] = example.facts
                elif part["type"] == "audio":
                    self.sounds[part["audio"].contiguous().numpy().tobytes()] = example.facts
        return made

    def generate(self, model, prompts, samplings):
        assert len(prompts) == len(samplings) <= 64
        self.prompts += prompts
        return [list(model.tokenizer.encode(self.say(prompt))) for prompt in prompts]

    def say(self, prompt):
        seen = heard = None
        for image in prompt.images:
            seen = self.images[image.numpy().tobytes()]
        for mel in prompt.audios:
            heard = self.sounds[mel[0].T.contiguous().numpy().tobytes()]
        return self.tell(seen, heard, prompt)

    def tell(self, seen, heard, prompt):
        if self.task == "see":
            return f"I see a {DIGITS[seen['seen']]}."
        if self.task == "hear":
            return f"I hear a {DIGITS[heard['heard']]}."
        if self.task == "read":
            return f"It reads {' '.join(DIGITS[digit] for digit in seen['digits'])}."
        if self.task == "sum":
            a, b = seen["seen"], heard["heard"]
            return f"{DIGITS[a]} plus {DIGITS[b]} is {NUMBERS[a + b]}."
        if self.task == "same":
            return "the same" if seen["seen"] == heard["heard"] else "different"
        if self.task == "describe":
            return f"A {seen['colour']} {DIGITS[seen['seen']]} at the {seen['place']}."
        asked = MODEL.tokenizer.decode(prompt.ids)
        asked = asked.removeprefix("user\n").removesuffix("\nassistant\n")
        return dict(phrases.talk())[asked]


class Constant(Oracle):
    """Always says the same."""

    def __init__(self, monkeypatch, said):
        super().__init__(monkeypatch)
        self.said = said

    def tell(self, seen, heard, prompt):
        return self.said


def ask(task, count=COUNT, seed=0, judges=None, model=MODEL):
    material = small.material(train=False)
    return evaluate.evaluate(
        model, material, judges or Judges(), count=count, seed=seed, tasks=[task]
    )[task]


def near(accuracy, share, count):
    """Five standard deviations."""
    return abs(accuracy - share) <= 5 * (share * (1 - share) / count) ** 0.5 + 1e-9


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_an_oracle_is_always_right_and_lost_when_it_is_shown_another(task, monkeypatch):
    Oracle(monkeypatch)
    result = ask(task)
    assert (result.accuracy, result.count) == (1.0, COUNT)
    assert set(result.shuffled) == set(MODALITIES.get(task, ()))
    chance = {"read": 0.005, "describe": 0.0025}.get(task, result.chance)
    for modality, accuracy in result.shuffled.items():
        assert near(accuracy, chance, COUNT), modality
        assert accuracy < 0.75


CONSTANTS = {
    "see": "I see a {digit}.",
    "hear": "I hear a {digit}.",
    "sum": "four plus five is nine.",
    "same": "I see a one and hear a one: the same.",
    "describe": "A red {digit} at the top left.",
    "read": "It reads {digit} {digit}.",
    "talk": "You are welcome.",
}


@pytest.mark.parametrize("task", CONSTANTS)
def test_a_constant_is_at_chance(task, monkeypatch):
    """The likeliest of its kind has just the accuracy that is called chance."""
    # No picture need be made, nor sound.
    monkeypatch.setattr("mmkernels.training.examples._show", lambda *args: None)
    monkeypatch.setattr("mmkernels.training.examples._sound", lambda *args: None)
    labels = small.images()["test"].labels
    common = DIGITS[int(labels.bincount().argmax())]
    said = CONSTANTS[task].format(digit=common)
    total = 4000
    material = small.material(train=False)
    made = make([task] * total, material, torch.Generator().manual_seed(0))
    if task == "talk":
        answers = collections.Counter(answer for _, answer in phrases.talk())
        said = answers.most_common(1)[0][0]
    right = sum(evaluate._RIGHT[task](said, example.facts) for example in made)
    assert near(right / total, evaluate._chance(task, material), total)


def test_chance_is_that_of_the_labels():
    labels = torch.tensor([3] * 4 + [5])
    few = digits.Digits(torch.zeros(5, 8, 8), labels, torch.arange(5))
    material = Material(few, small.banks()["voices"], [("a", "x"), ("b", "x"), ("c", "y")], False)
    chance = {task: evaluate._chance(task, material) for task in TASKS}
    assert chance == pytest.approx(
        {
            "see": 0.8, "hear": 0.1, "read": 0.8**2 / 2, "sum": 0.1, "same": 0.5,
            "describe": 0.8 / 8 / 5, "draw": 0.8, "say": 0.1, "talk": 2 / 3,
        }
    )  # fmt: skip


def test_a_constant_stays_where_it_is_when_shuffled(monkeypatch):
    Constant(monkeypatch, "three plus six is nine.")
    result = ask("sum")
    assert result.shuffled == {"image": result.accuracy, "audio": result.accuracy}
    assert near(result.accuracy, 0.1, COUNT)


@pytest.mark.parametrize("count", [2, 3, 17, 400])
def test_shuffled_gives_each_another_one(count):
    for seed in range(5):
        others = evaluate._others(count, torch.Generator().manual_seed(seed))
        assert sorted(others) == list(range(count))
        assert all(other != place for place, other in enumerate(others))


def test_shuffling_keeps_all_but_one_modality():
    made = make(["sum"] * 9, small.material(train=False), torch.Generator().manual_seed(0))
    order = evaluate._others(9, torch.Generator().manual_seed(0))
    before = [list(example.question) for example in made]
    mixed = evaluate._shuffled(made, "image", order)
    for place, (example, question) in enumerate(zip(mixed, before, strict=True)):
        assert made[place].question == question  # what is there stays as it was
        for part, old in zip(example.question, question, strict=True):
            if part["type"] == "image":
                donor = before[order[place]]
                assert any(part is other for other in donor)
            else:
                assert part is old
        assert example.facts is made[place].facts


@pytest.mark.parametrize(
    ("task", "facts", "right", "wrong"),
    [
        ("see", {"seen": 7}, ["I see a seven.", "7"], ["", "eight", "seven or eight", "seventeen"]),
        ("hear", {"heard": 0}, ["I hear a zero."], ["one", "zero zero", "nothing"]),
        (
            "read", {"digits": [1, 2]}, ["It reads one two.", "1 2"],
            ["two one", "one two two", "one", "12", ""],
        ),
        (
            "sum", {"seen": 7, "heard": 5}, ["seven plus five is twelve.", "twelve"],
            ["", "seven plus five", "twelve is seven plus five", "seven plus five is eleven"],
        ),
        (
            "same", {"seen": 1, "heard": 1}, ["the same."],
            ["different", "", "the same, or different"],
        ),
        ("same", {"seen": 1, "heard": 2}, ["different"], ["the same", "", "same different"]),
        (
            "describe", {"seen": 3, "colour": "red", "place": "top left"},
            ["A red three at the top left."],
            [
                "A blue three at the top left.", "A red four at the top left.", "a red three",
                "A red three at the top right.", "A red blue three at the top left.",
                f"A red three at the {' '.join(PLACES)}.", f"A {' '.join(COLOURS)} three, top left",
            ],
        ),
        ("talk", {"answer": "You are welcome."}, [" You are welcome.\n"], ["", "You are"]),
    ],
)  # fmt: skip
def test_what_is_right(task, facts, right, wrong):
    for text in right:
        assert evaluate._RIGHT[task](text, facts), text
    for text in wrong:
        assert not evaluate._RIGHT[task](text, facts), text


def test_groups_add_up(monkeypatch):
    """Wrong about sevens and about one voice only."""
    oracle = Oracle(monkeypatch)

    def tell(seen, heard, prompt):
        wrong = seen["seen"] == 7 if seen else heard["voice"] == "emil"
        return "" if wrong else Oracle.tell(oracle, seen, heard, prompt)

    oracle.tell = tell
    see = ask("see", 300)
    assert see.by("seen") == {digit: float(digit != 7) for digit in range(10)}
    sevens = sum(item.example.facts["seen"] == 7 for item in see.answered)
    assert see.accuracy == pytest.approx(1 - sevens / 300)
    plain = see.to_dict()
    assert plain["by_seen"] == {str(digit): float(digit != 7) for digit in range(10)}
    assert "by_voice" not in plain and "by_heard" not in plain
    hear = ask("hear", 100)
    assert hear.by("voice") == {"dora": 1.0, "emil": 0.0}
    assert hear.to_dict()["by_voice"] == {"dora": 1.0, "emil": 0.0}
    assert set(hear.to_dict()["by_heard"]) <= set(map(str, range(10)))
    assert hear.harder is None and "harder_group" not in hear.to_dict()


def test_the_harder_group_is_the_end_of_the_set():
    def answered(index, right):
        return Answered(Example("see", [], [], {"index": index, "seen": 1}), [], right)

    assert HARDER_FROM == 1797 - 360
    some = [answered(HARDER_FROM - 1, True), answered(0, True)]
    some += [answered(HARDER_FROM, False), answered(HARDER_FROM + 1, True), answered(1796, False)]
    result = Result(0.6, 5, 0.1, answered=some)
    assert result.harder == (pytest.approx(1 / 3), 3)
    assert result.to_dict()["harder_group"] == {"accuracy": pytest.approx(1 / 3), "count": 3}
    assert Result(1.0, 2, 0.1, answered=some[:2]).harder is None


def test_only_test_digits_and_held_out_voices_are_asked_about(monkeypatch):
    Oracle(monkeypatch)
    known = set(small.images()["test"].index.tolist())
    for task in ("see", "same"):
        for item in ask(task, 60).answered:
            assert item.example.facts["index"] in known
            assert item.example.facts.get("voice", "dora") in ("dora", "emil")


def test_the_same_seed_asks_the_same(monkeypatch):
    asked = []
    for seed in (3, 3, 4):
        with monkeypatch.context() as patch:
            oracle = Oracle(patch)
            ask("sum", 20, seed)
            asked.append([(p.ids, [x.tolist() for x in p.images]) for p in oracle.prompts])
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("codecs", [False, True])
def test_tasks_that_none_can_judge_are_left_out(codecs, monkeypatch):
    model, told = small.model(codecs), []
    Constant(monkeypatch, "no")
    results = evaluate.evaluate(
        model, small.material(train=False), Judges(), count=2, advance=told.append
    )
    assert list(results) == list(TEXT_TASKS)
    assert len(told) == evaluate.steps(model, Judges()) == 7 + 9 - 1
    assert told[:3] == ["see", "see, image shuffled", "hear"]


class Judge:
    """Tells the digit by the brightest row of a drawing, or by a sound's length."""

    def judge(self, what):
        if isinstance(what, list):
            return torch.tensor([len(sound) for sound in what])
        return what.amax((1, 3)).argmax(1)


def row(digit, colour):
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    rgb = digits.drawing(torch.ones(1, 8, 8), torch.tensor([COLOURS.index(colour)]))
    picture[:, digit] = rgb[0, :, 0]
    return picture


@pytest.mark.parametrize("task", ["draw", "say"])
def test_what_is_drawn_and_said_is_judged(task, monkeypatch):
    """None and two are wrong; so is another digit. Another colour is noted."""

    def answer(model, conversations, seed=0):
        return [[Piece("text", str(place))] for place in range(len(conversations))]

    def media(model, parts):
        facts = made[int(parts[0].text)].facts
        digit, place = facts["digit"], int(parts[0].text)
        kind = ["right", "none", "two", "digit", "colour"][place % 5]
        if kind == "digit":
            digit = (digit + 1) % 10
        colour = facts.get("colour")
        if kind == "colour" and task == "draw":
            colour = COLOURS[(COLOURS.index(colour) + 1) % 8]
        one = row(digit, colour) if task == "draw" else torch.zeros(digit)
        return [one] * {"none": 0, "two": 2}.get(kind, 1)

    made = make([task] * 50, small.material(train=False), torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluate, "make", lambda *args: made)
    monkeypatch.setattr(evaluate, "answer", answer)
    monkeypatch.setattr(evaluate, "pictures", media)
    monkeypatch.setattr(evaluate, "sounds", media)
    result = ask(task, 50, judges=Judges(Judge(), Judge()))
    assert result.accuracy == pytest.approx(0.4)
    rights = [item.right for item in result.answered]
    assert rights == [place % 5 in (0, 4) for place in range(50)]
    plain = result.to_dict()
    assert sum(plain["by_digit"].values()) > 0
    if task == "draw":  # of five: right, and the one with another digit
        assert plain["colour_accuracy"] == pytest.approx(0.4)
        drawn = [item.example.facts.get("drawn") for item in result.answered]
        assert drawn[1] is drawn[2] is None
    else:
        assert "colour_accuracy" not in plain


@pytest.mark.parametrize("task", ["draw", "say"])
def test_nothing_drawn_or_said_is_all_wrong(task, monkeypatch):
    Constant(monkeypatch, "I would rather not.")
    assert ask(task, 5, judges=Judges(Judge(), Judge())).accuracy == 0.0


def test_what_a_model_draws_and_says_is_decoded():
    """An image and a sound of its codes, as the codecs give them."""
    codes = tuple(code % 16 for code in range(16))
    parts = [Piece("text", "x"), Piece("image", codes=codes), Piece("audio", codes=(1, 2, 3))]
    (picture,) = evaluate.pictures(MODEL, parts)
    assert torch.equal(picture, MODEL.image_codec.decode(torch.tensor([codes]))[0])
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
    (sound,) = evaluate.sounds(MODEL, parts)
    assert sound.ndim == 1 and len(sound) >= 8 * 80
    assert evaluate.pictures(MODEL, parts[:1]) == evaluate.sounds(MODEL, parts[:2]) == []


def test_a_model_answers_by_itself():
    """No stand-in: an untrained model draws, says and writes something, the same each time."""
    questions = [[{"role": "user", "content": word}] for word in ("Hello!", "Draw a red two.")]
    first, again = (evaluate.answer(MODEL, questions, seed=1) for _ in range(2))
    assert len(first) == 2
    assert first == again
