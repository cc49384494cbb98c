"""Conversations about real digits, seen and heard, with what is right to answer.

First every example is planned: which digit, which recording, which words. Then the images and
sounds of all are made at once, for one by one would take longer than training on them. All chance
comes from one generator: the same seed gives the same examples.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkernels.training import digits as seen
from mmkernels.training import speech
from mmkernels.training.digits import COLOURS, MIDDLE, PLACES, Digits
from mmkernels.training.phrases import DIGITS, NUMBERS, PLAIN, QUESTIONS
from mmkernels.training.speech import SpeechBank

Content = list[dict[str, Any]]


@dataclass
class Material:
    """What examples are made of.

    Attributes:
        digits: images of digits.
        speech: recordings of digits.
        talk: pairs of question and answer.
        train: whether to vary images and sounds at random, as in training.
        drawings: (digits, colours, codes) the codes of every digit in every colour; None where no
            drawing is to be learned.
        sayings: the codes of each recording; None where no saying is to be learned.
        sayable: for each digit, the recordings that may be learned to be said.
        longest_row: most digits of a number to read.
        in_the_middle: part of the pictures, but those to describe, that show the digit in the
            middle, where it is larger.
    """

    digits: Digits
    speech: SpeechBank
    talk: Sequence[tuple[str, str]]
    train: bool
    drawings: Tensor | None = None
    sayings: Sequence[Sequence[int]] | None = None
    sayable: Sequence[Sequence[int]] | None = None
    longest_row: int = 3
    in_the_middle: float = 0.5

    def __post_init__(self) -> None:
        """Sorts the recordings by digit."""
        self.recordings = [
            (self.speech.digits == digit).nonzero()[:, 0].tolist() for digit in range(10)
        ]


@dataclass
class Example:
    """A question and its answer.

    Attributes:
        task: one of `phrases.TASKS`.
        question: what the user says and shows.
        answer: what is right to answer; empty where it is made of codes that there are none of.
        facts: what is true of it: "seen" and "heard" (digits), "colour", "place", "voice", "index"
            (of the image in scikit-learn's set), "digits" (of a number to read).
    """

    task: str
    question: Content
    answer: Content
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def make(tasks: Sequence[str], material: Material, generator: torch.Generator) -> list[Example]:
    """One example for each of `tasks`, names of `phrases.TASKS`."""
    chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
    examples = [_PLANS[task](task, material, chance) for task in tasks]
    _show(examples, material, generator)
    _sound(examples, material, generator)
    return examples


def said(text: str) -> Content:
    """A text as content."""
    return [{"type": "text", "text": text}]


def _see(task: str, material: Material, chance: random.Random) -> Example:
    facts = _seen(material, chance, 0.0 if task == "describe" else material.in_the_middle)
    digit = DIGITS[facts["seen"]]
    answer = {
        "see": f"I see a {digit}.",
        "describe": f"A {facts['colour']} {digit} at the {facts['place']}.",
    }[task]
    return Example(task, [_IMAGE, _question(task, chance)], said(answer), facts)


def _hear(task: str, material: Material, chance: random.Random) -> Example:
    facts = _heard(chance.randrange(10), material, chance)
    answer = f"I hear a {DIGITS[facts['heard']]}."
    return Example(task, [_SOUND, _question(task, chance)], said(answer), facts)


def _both(task: str, material: Material, chance: random.Random) -> Example:
    facts = _seen(material, chance, material.in_the_middle)
    digit = facts["seen"]
    if task == "sum":
        other = chance.randrange(10)
        answer = f"{DIGITS[digit]} plus {DIGITS[other]} is {NUMBERS[digit + other]}."
    else:
        other = digit if chance.random() < 0.5 else (digit + chance.randrange(1, 10)) % 10
        verdict = "the same" if digit == other else "different"
        answer = f"I see a {DIGITS[digit]} and hear a {DIGITS[other]}: {verdict}."
    facts |= _heard(other, material, chance)
    question = [_IMAGE, _SOUND]
    chance.shuffle(question)
    return Example(task, [*question, _question(task, chance)], said(answer), facts)


def _read(task: str, material: Material, chance: random.Random) -> Example:
    count = chance.randrange(2, material.longest_row + 1)
    rows = [chance.randrange(len(material.digits.labels)) for _ in range(count)]
    digits = [int(material.digits.labels[row]) for row in rows]
    facts = {"rows": rows, "digits": digits, "colour": chance.choice(COLOURS)}
    answer = f"It reads {' '.join(DIGITS[digit] for digit in digits)}."
    return Example(task, [_IMAGE, _question(task, chance)], said(answer), facts)


def _draw(task: str, material: Material, chance: random.Random) -> Example:
    row = chance.randrange(len(material.digits.labels))
    plain = chance.random() < 0.5
    colour = PLAIN if plain else chance.choice(COLOURS)
    digit = int(material.digits.labels[row])
    question = _question("draw plain" if plain else "draw", chance, DIGITS[digit], colour)
    answer: Content = []
    if material.drawings is not None:
        codes = material.drawings[row, COLOURS.index(colour)].tolist()
        answer = [{"type": "image_codes", "codes": codes}]
    return Example(task, [question], answer, {"digit": digit, "colour": colour})


def _say(task: str, material: Material, chance: random.Random) -> Example:
    digit = chance.randrange(10)
    answer: Content = []
    if material.sayings is not None and material.sayable is not None:
        codes = material.sayings[chance.choice(material.sayable[digit])]
        answer = [{"type": "audio_codes", "codes": codes}]
    return Example(task, [_question(task, chance, DIGITS[digit])], answer, {"digit": digit})


def _talk(task: str, material: Material, chance: random.Random) -> Example:
    question, answer = chance.choice(material.talk)
    return Example(task, said(question), said(answer), {"answer": answer})


_PLANS: dict[str, Callable[[str, Material, random.Random], Example]] = {
    "see": _see,
    "hear": _hear,
    "read": _read,
    "sum": _both,
    "same": _both,
    "describe": _see,
    "draw": _draw,
    "say": _say,
    "talk": _talk,
}

# Stand in a plan for what is rendered for all examples together.
_IMAGE: dict[str, Any] = {"type": "image"}
_SOUND: dict[str, Any] = {"type": "audio"}


def _question(
    task: str, chance: random.Random, digit: str = "", colour: str = ""
) -> dict[str, Any]:
    text = chance.choice(QUESTIONS[task]).format(digit=digit, colour=colour)
    return {"type": "text", "text": text}


def _seen(material: Material, chance: random.Random, in_the_middle: float) -> dict[str, Any]:
    """A picture; where it need not be in the middle, any place is as likely."""
    row = chance.randrange(len(material.digits.labels))
    return {
        "rows": [row],
        "seen": int(material.digits.labels[row]),
        "index": int(material.digits.index[row]),
        "colour": chance.choice(COLOURS),
        "place": MIDDLE if chance.random() < in_the_middle else chance.choice(PLACES),
    }


def _heard(digit: int, material: Material, chance: random.Random) -> dict[str, Any]:
    recording = chance.choice(material.recordings[digit])
    voice = material.speech.voices[recording]
    return {"recording": recording, "heard": digit, "voice": voice}


def _show(examples: list[Example], material: Material, generator: torch.Generator) -> None:
    """Puts images into the plans, those of one size together."""
    by_count: dict[int, list[Example]] = {}
    for example in examples:
        if "rows" in example.facts:
            by_count.setdefault(len(example.facts["rows"]), []).append(example)
    for count, group in sorted(by_count.items()):
        rows = torch.tensor([example.facts["rows"] for example in group])
        colours = torch.tensor([COLOURS.index(example.facts["colour"]) for example in group])
        images = material.digits.images[rows]  # (B, n, 8, 8)
        if count == 1:
            places = torch.tensor([PLACES.index(example.facts["place"]) for example in group])
            shown = seen.render(
                images[:, 0], colours, places, generator=generator, train=material.train
            )
        else:
            shown = seen.render_row(images, colours, generator=generator, train=material.train)
        for example, image in zip(group, shown, strict=True):
            _put(example, "image", image)


def _sound(examples: list[Example], material: Material, generator: torch.Generator) -> None:
    """Puts recordings into the plans."""
    group = [example for example in examples if "recording" in example.facts]
    if not group:
        return
    index = torch.tensor([example.facts["recording"] for example in group])
    mels, lengths = material.speech.mels[index], material.speech.lengths[index]
    if material.train:
        mels, lengths = speech.augment(mels, lengths, generator)
    for example, mel, length in zip(group, mels, lengths.tolist(), strict=True):
        _put(example, "audio", mel[:length])


def _put(example: Example, kind: str, media: Tensor) -> None:
    example.question = [
        {"type": kind, kind: media} if part["type"] == kind else part for part in example.question
    ]
