"""Accuracy of every task on what was held out, beside chance and with a modality shuffled.

A modality is shuffled by giving each question the image, or the sound, of another one. What the
model owes to that modality is then lost: accuracy should fall to chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkernels.models import audio
from mmkernels.models.answers import Piece, pieces
from mmkernels.models.generation import Sampling, generate
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training.digits import COLOURS, HARDER_FROM, PLACES, colour_of
from mmkernels.training.examples import Example, Material, make
from mmkernels.training.judges import DigitJudge, SpeechJudge
from mmkernels.training.phrases import TASKS, numbers_in

MODALITIES = {
    "see": ("image",),
    "hear": ("audio",),
    "read": ("image",),
    "sum": ("image", "audio"),
    "same": ("image", "audio"),
    "describe": ("image",),
}
# Answered at once.
_TOGETHER = 64


@dataclass
class Answered:
    """A question and what the model answered.

    Attributes:
        example: the question, and what is true.
        parts: the answer's texts, images and sounds.
        right: whether it is right.
    """

    example: Example
    parts: list[Piece]
    right: bool = False

    @property
    def text(self) -> str:
        """All text of the answer."""
        return "".join(piece.text for piece in self.parts)


@dataclass
class Judges:
    """Who judges what the model draws and says; None: such tasks are left out."""

    digit: DigitJudge | None = None
    speech: SpeechJudge | None = None


@dataclass
class Result:
    """How a task went.

    Attributes:
        accuracy: part of the answers that are right.
        count: number of questions.
        chance: accuracy of the best answer that looks at nothing.
        shuffled: modality -> accuracy with it shuffled.
        answered: every answer.
    """

    accuracy: float
    count: int
    chance: float
    shuffled: dict[str, float] = field(default_factory=dict)
    answered: list[Answered] = field(default_factory=list)

    def by(self, fact: str) -> dict[Any, float]:
        """Accuracy for each value of a fact, such as "voice"."""
        groups: dict[Any, list[bool]] = {}
        for item in self.answered:
            groups.setdefault(item.example.facts[fact], []).append(item.right)
        return {key: sum(group) / len(group) for key, group in sorted(groups.items())}

    @property
    def harder(self) -> tuple[float, int] | None:
        """Accuracy on images of the set's harder end, and how many; None where there are none."""
        right = [
            item.right
            for item in self.answered
            if item.example.facts.get("index", -1) >= HARDER_FROM
        ]
        return (sum(right) / len(right), len(right)) if right else None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = {
            "accuracy": self.accuracy,
            "count": self.count,
            "chance": self.chance,
            "shuffled": self.shuffled,
        }
        for name, fact in (
            ("by_seen", "seen"),
            ("by_heard", "heard"),
            ("by_voice", "voice"),
            ("by_digit", "digit"),
        ):
            if self.answered and fact in self.answered[0].example.facts:
                values[name] = {str(key): value for key, value in self.by(fact).items()}
        if any("drawn" in item.example.facts for item in self.answered):
            facts = [item.example.facts for item in self.answered]
            right = sum(of.get("drawn_colour") == of["colour"] for of in facts)
            values["colour_accuracy"] = right / len(facts)
        if self.harder is not None:
            values["harder_group"] = dict(zip(("accuracy", "count"), self.harder, strict=True))
        return values


def evaluate(
    model: MultimodalModel,
    material: Material,
    judges: Judges,
    *,
    count: int = 200,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Result]:
    """Asks `count` questions of each task.

    Args:
        model: in evaluation mode.
        material: what was held out, with train False.
        judges: of drawings and sayings.
        count: questions of a task.
        seed: of all chance.
        tasks: which; those that need codes or a judge that is not there are left out.
        advance: is told each task, and each modality of it that is shuffled, when done.

    Returns:
        task -> result.
    """
    results = {}
    for number, task in enumerate(tasks):
        if not _possible(task, model, judges):
            continue
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        examples = make([task] * count, material, generator)
        result = _ask(model, task, examples, judges, material, seed)
        advance(task)
        for modality in MODALITIES.get(task, ()):
            mixed = _shuffled(examples, modality, _others(count, generator))
            result.shuffled[modality] = _ask(model, task, mixed, judges, material, seed).accuracy
            advance(f"{task}, {modality} shuffled")
        results[task] = result
    return results


def steps(model: MultimodalModel, judges: Judges, tasks: Sequence[str] = TASKS) -> int:
    """How often `evaluate` calls advance."""
    possible = [task for task in tasks if _possible(task, model, judges)]
    return sum(1 + len(MODALITIES.get(task, ())) for task in possible)


def answer(
    model: MultimodalModel, conversations: Sequence[list[dict[str, Any]]], seed: int = 0
) -> list[list[Piece]]:
    """The answers to conversations that end with a question."""
    parts = []
    for first in range(0, len(conversations), _TOGETHER):
        some = conversations[first : first + _TOGETHER]
        prompts = [model.document(messages, add_generation_prompt=True) for messages in some]
        samplings = [
            Sampling(max_tokens=64, seed=seed * 100_000 + first + i) for i in range(len(some))
        ]
        parts += [
            list(pieces(tokens, model.tokenizer, model.vocabulary))
            for tokens in generate(model, prompts, samplings)
        ]
    return parts


def _possible(task: str, model: MultimodalModel, judges: Judges) -> bool:
    if task == "draw":
        return model.image_codec is not None and judges.digit is not None
    if task == "say":
        return model.audio_codec is not None and judges.speech is not None
    return True


def _others(count: int, generator: torch.Generator) -> list[int]:
    """For each of `count` another one, never itself; all in one ring."""
    ring = torch.randperm(count, generator=generator)
    others = torch.empty_like(ring)
    others[ring] = ring.roll(1)
    return others.tolist()


def _shuffled(examples: list[Example], modality: str, order: list[int]) -> list[Example]:
    """Each question with the image or sound of another."""
    media = [
        next(part for part in example.question if part["type"] == modality) for example in examples
    ]
    return [
        Example(
            example.task,
            [media[other] if part["type"] == modality else part for part in example.question],
            example.answer,
            example.facts,
        )
        for example, other in zip(examples, order, strict=True)
    ]


def _ask(
    model: MultimodalModel,
    task: str,
    examples: list[Example],
    judges: Judges,
    material: Material,
    seed: int,
) -> Result:
    parts = answer(model, [example.messages[:1] for example in examples], seed)
    answered = [Answered(*pair) for pair in zip(examples, parts, strict=True)]
    if task == "draw":
        _judge_drawings(model, answered, judges.digit)
    elif task == "say":
        _judge_sayings(model, answered, judges.speech)
    else:
        for item in answered:
            item.right = _RIGHT[task](item.text, item.example.facts)
    accuracy = sum(item.right for item in answered) / len(answered)
    return Result(accuracy, len(answered), _chance(task, material), answered=answered)


_RIGHT: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "see": lambda text, facts: numbers_in(text) == [facts["seen"]],
    "hear": lambda text, facts: numbers_in(text) == [facts["heard"]],
    "read": lambda text, facts: numbers_in(text) == facts["digits"],
    "sum": lambda text, facts: numbers_in(text)[-1:] == [facts["seen"] + facts["heard"]],
    "same": lambda text, facts: (
        ("same" in text, "different" in text)
        == (facts["seen"] == facts["heard"], facts["seen"] != facts["heard"])
    ),
    "describe": lambda text, facts: (
        numbers_in(text) == [facts["seen"]]
        and [colour for colour in COLOURS if colour in text] == [facts["colour"]]
        and [place for place in PLACES if place in text] == [facts["place"]]
    ),
    "talk": lambda text, facts: text.strip() == facts["answer"],
}


def _chance(task: str, material: Material) -> float:
    """Of the best constant answer."""
    # Images are drawn row by row, and not all digits have as many; recordings digit by digit.
    labels = material.digits.labels
    seen = float(labels.bincount().max()) / len(labels)
    if task in ("see", "draw"):
        return seen
    if task == "same":
        return 0.5
    if task == "describe":
        return seen / len(COLOURS) / len(PLACES)
    if task == "read":
        lengths = range(2, material.longest_row + 1)
        return seen ** lengths[0] / len(lengths)
    if task == "talk":
        answers = [answer for _, answer in material.talk]
        return max(answers.count(answer) for answer in set(answers)) / len(answers)
    return 0.1  # also of a sum: nine is the likeliest, whatever is seen


def pictures(model: MultimodalModel, parts: Sequence[Piece]) -> list[Tensor]:
    """The images (3, 32, 32) uint8 that an answer holds, on the CPU."""
    assert model.image_codec is not None
    codec = model.image_codec
    return [
        codec.decode(torch.tensor([p.codes], device=model.device))[0].cpu()
        for p in parts
        if p.kind == "image"
    ]


def sounds(model: MultimodalModel, parts: Sequence[Piece]) -> list[Tensor]:
    """The waveforms that an answer holds, on the CPU."""
    assert model.audio_codec is not None
    codec = model.audio_codec
    return [
        audio.griffin_lim(codec.decode(torch.tensor([p.codes], device=model.device))[0].cpu())
        for p in parts
        if p.kind == "audio"
    ]


def _judge_drawings(
    model: MultimodalModel, answered: list[Answered], judge: DigitJudge | None
) -> None:
    """Right is one drawing of the digit; its colour is noted beside."""
    assert judge is not None
    drawn = [(item, pictures(model, item.parts)) for item in answered]
    single = [(item, found[0]) for item, found in drawn if len(found) == 1]
    if not single:
        return
    stack = torch.stack([picture for _, picture in single])
    for (item, _), digit, colour in zip(
        single, judge.judge(stack).tolist(), colour_of(stack).tolist(), strict=True
    ):
        facts = item.example.facts
        facts["drawn"], facts["drawn_colour"] = digit, COLOURS[colour]
        item.right = digit == facts["digit"]


def _judge_sayings(
    model: MultimodalModel, answered: list[Answered], judge: SpeechJudge | None
) -> None:
    """Right is one sound, in which the digit is heard."""
    assert judge is not None
    said = [(item, sounds(model, item.parts)) for item in answered]
    single = [(item, found[0]) for item, found in said if len(found) == 1]
    for (item, _), digit in zip(
        single, judge.judge([sound for _, sound in single]).tolist(), strict=True
    ):
        item.example.facts["said"] = digit
        item.right = digit == item.example.facts["digit"]
