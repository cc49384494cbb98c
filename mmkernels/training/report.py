"""What a trained model can do: run.json, and a page with a table and pictures made from it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmkernels._core.markdown import aligned_table
from mmkernels._core.progress import progress
from mmkernels.bench import environment
from mmkernels.models import checkpoint
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import attention_maps, digits, evaluate, phrases, plots
from mmkernels.training.evaluate import Judges, Result
from mmkernels.training.examples import Material
from mmkernels.training.judges import DigitJudge, SpeechJudge
from mmkernels.training.loop import read_log
from mmkernels.training.recipes import Recipe
from mmkernels.training.speech import SpeechBank

RUN = "run.json"
# Tasks that are also asked with real recordings.
REAL_TASKS = ("hear", "sum", "same")
SETS = {
    "voices": "synthetic voices never heard",
    "real_test": "real speakers, recordings never heard",
    "real_speaker": "a real speaker never heard",
    "train": "the recordings that it was trained on",
}
# All tasks are asked with the first of these that is there.
ASKED_WITH = ("voices", "real_speaker", "real_test", "train")
# What tests and the table expect of a full run of the tiny preset.
TARGETS = {"see": 0.95, "hear": 0.9, "sum": 0.85, "draw": 0.8, "say": 0.7}
_BY_DIGIT = (("see", "by_seen"), ("hear", "by_heard"), ("draw", "by_digit"), ("say", "by_digit"))
HEADER = ("task", "accuracy", "chance", "image shuffled", "sound shuffled", "target")


def write(
    out: Path,
    recipe: Recipe,
    model: MultimodalModel,
    banks: dict[str, SpeechBank],
    *,
    device: torch.device,
    command: str,
    seed: int = 0,
) -> str:
    """Evaluates a model and writes run.json, report.md and pictures into the run's folder.

    All tasks are asked with one set of recordings, which is the first in the record's results.

    Args:
        out: the run's folder.
        recipe: what it was trained by.
        model: in evaluation mode.
        banks: recordings by what they are for.
        device: that computed.
        command: that began the run.
        seed: of the questions.

    Returns:
        The table, as text.
    """
    began = time.perf_counter()
    split = digits.split()
    judges = _judges(recipe, model, banks, split["train"])
    first = next(name for name in ASKED_WITH if name in banks)
    made = {
        name: Material(split["test"], banks[name], phrases.talk(), False)
        for name in (first, *banks)
        if name in (first, "real_test", "real_speaker")
    }
    tasks = [task for task in phrases.TASKS if task in recipe.shares]
    asked = {
        name: tasks if name == first else [task for task in REAL_TASKS if task in tasks]
        for name in made
    }
    total = sum(evaluate.steps(model, judges, some) for some in asked.values())
    results: dict[str, dict[str, Result]] = {}
    with progress(total, "evaluation") as advance:
        for name, material in made.items():
            results[name] = evaluate.evaluate(
                model, material, judges, count=recipe.evaluated, seed=seed, tasks=asked[name],
                advance=advance,
            )  # fmt: skip
    log = read_log(out)
    record = {
        "schema": 1,
        "preset": recipe.preset,
        "parameters": sum(x.numel() for x in model.parameters()),
        "training": _training(log),
        "judges": _accuracy_of(judges, split["test"], banks),
        "results": {
            name: {task: result.to_dict() for task, result in of.items()}
            for name, of in results.items()
        },
        "evaluation_seconds": time.perf_counter() - began,
        "environment": environment.describe(device, recipe.evaluated < 100, command),
    }
    checkpoint.write_file(out / RUN, json.dumps(record, indent=1).encode())
    plots.loss(log, out / "loss.png")
    plots.samples(model, results[first], out / "samples.png")
    attention_maps.plot(model, made[first], out / "attention.png")
    table = aligned_table(HEADER, rows(record))
    checkpoint.write_file(out / "report.md", page(record).encode())
    return table


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of the table for each task, then those with further recordings."""
    first = _asked_with(record)
    found: list[tuple[str, ...]] = []
    for name, results in record["results"].items():
        for task, result in results.items():
            title = task if name == first else f"{task}, {SETS[name]}"
            shuffled = result["shuffled"]
            found.append(
                (
                    title,
                    _percent(result["accuracy"]),
                    _percent(result["chance"]),
                    _percent(shuffled.get("image")),
                    _percent(shuffled.get("audio")),
                    f"≥ {TARGETS[task]:.0%}" if name == "voices" and task in TARGETS else "",
                )
            )
    return found


def page(record: dict[str, Any]) -> str:
    """The whole report, in Markdown."""
    parts = [
        f"# mmkernels {record['preset']}: what it can do",
        origin(record),
        aligned_table(HEADER, rows(record)),
        asked(record),
        judged(record),
        harder(record),
        "## Is it fair to each?",
        *fairness(record),
        "![Loss](loss.png)\n\n![Samples](samples.png)\n\n![Attention](attention.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def origin(record: dict[str, Any]) -> str:
    """Where the numbers come from, in a sentence."""
    where = record["environment"]
    machine = where["cpu"] if where["device_type"] == "cpu" else where["device"]
    commit = (where["commit"] or "unknown")[:7] + (" with changes" if where["dirty"] else "")
    begun = "from nothing" if record["preset"] == "tiny" else "on the weights of SmolLM2-135M"
    return (
        f"{record['parameters']:,} parameters, trained {begun} in "
        f"{record['training']['seconds'] / 60:.0f} minutes on {machine}: `{where['command']}`, "
        f"{where['date'][:10]}, torch {where['torch']}, commit {commit}."
    )


def asked(record: dict[str, Any]) -> str:
    """What the questions were made of, and whether drawings have the colour asked for."""
    first = _asked_with(record)
    coloured = record["results"][first].get("draw", {}).get("colour_accuracy")
    return (
        "The digits shown were held out; where the table does not say otherwise, what is heard is "
        f"from {SETS[first]}."
        + (
            f" Of the drawings, {coloured:.1%} have the colour asked for."
            if coloured is not None
            else ""
        )
    )


def judged(record: dict[str, Any]) -> str:
    """Who judged drawings and sayings, and how sure those judges are."""
    lines = [
        f"- {name}: trained on {judge['trained_on']}; "
        + (
            "right in "
            + ", ".join(f"{value:.1%} of {what}" for what, value in judge["accuracy"].items())
            if judge["accuracy"]
            else "nothing was left to measure it on"
        )
        for name, judge in record["judges"].items()
    ]
    return "Judges of drawings and sayings:\n\n" + "\n".join(lines) if lines else ""


def harder(record: dict[str, Any]) -> str:
    """Accuracy on the harder group of writers."""
    see = record["results"][_asked_with(record)].get("see", {}).get("harder_group")
    if see is None:
        return ""
    return (
        "Of the last 360 images of the set, by writers who are harder to read, "
        f"{see['count']} were asked about in `see`: {see['accuracy']:.1%} right."
    )


def fairness(record: dict[str, Any]) -> list[str]:
    """Accuracy for each digit and each voice."""
    results = record["results"][_asked_with(record)]
    tables = []
    header = ("digit", *map(str, range(10)))
    found = [
        (f"{task}", *(_percent(results[task][by].get(str(digit))) for digit in range(10)))
        for task, by in _BY_DIGIT
        if task in results and by in results[task]
    ]  # fmt: skip
    if found:
        tables.append(aligned_table(header, found))
    voices = results.get("hear", {}).get("by_voice", {})
    if voices:
        cells = [(voice, _percent(value)) for voice, value in voices.items()]
        tables.append(aligned_table(("voice, in `hear`", "accuracy"), cells))
    return tables


def _judges(
    recipe: Recipe, model: MultimodalModel, banks: dict[str, SpeechBank], images: digits.Digits
) -> Judges:
    judges = Judges()
    if model.image_codec is not None and "draw" in recipe.shares:
        judges.digit = DigitJudge(images)
    if model.audio_codec is not None and "say" in recipe.shares:
        judges.speech = SpeechJudge(banks, steps=recipe.judge_steps)
    return judges


def _accuracy_of(
    judges: Judges, test: digits.Digits, banks: dict[str, SpeechBank]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if judges.digit is not None:
        found["digit"] = {
            "trained_on": judges.digit.trained_on,
            "accuracy": {"test digits": judges.digit.accuracy(test)},
        }
    if judges.speech is not None:
        found["speech"] = {
            "trained_on": judges.speech.trained_on,
            "accuracy": {
                SETS[name]: judges.speech.accuracy(bank)
                for name, bank in banks.items()
                if name in SETS and name != "train"
            },
        }
    return found


def _training(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps, tokens and seconds of the stages, from the log."""
    stages: dict[str, dict[str, float]] = {}
    for line in log:
        stage = stages.setdefault(line["stage"], {"steps": 0, "tokens": 0, "seconds": 0.0})
        stage["steps"] += 1
        stage["tokens"] += line["tokens"]
        stage["seconds"] += line["seconds"]
        stage["loss"] = line["loss"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    tokens = sum(stage["tokens"] for stage in stages.values())
    mfu = sorted(line["mfu"] for line in log)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "mfu": mfu[len(mfu) // 2] if mfu else 0.0,
        "stages": stages,
    }


def _asked_with(record: dict[str, Any]) -> str:
    """The recordings that all tasks were asked with."""
    return str(next(iter(record["results"])))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
