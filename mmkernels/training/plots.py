"""Pictures of a run: its loss, and samples of what the model answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import evaluate
from mmkernels.training.evaluate import Answered, Result

_SHOWN = ("see", "hear", "read", "sum", "same", "describe")


def loss(log: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss of each step, stage by stage, and its mean over 25."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for stage in dict.fromkeys(line["stage"] for line in log):
        steps = [line["step"] for line in log if line["stage"] == stage]
        values = torch.tensor([line["loss"] for line in log if line["stage"] == stage])
        points = axes.plot(steps, values, linewidth=0.5, alpha=0.35)
        if len(values) > 25:
            mean = values.unfold(0, 25, 1).mean(1)
            axes.plot(steps[12:-12], mean, color=points[0].get_color())
        axes.plot([], [], color=points[0].get_color(), label=stage)
    axes.set(xlabel="step", ylabel="loss, nats per learned token", yscale="log")
    if log:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def samples(model: MultimodalModel, results: dict[str, Result], path: Path) -> None:
    """Two questions of each task with their answers; drawings; what was said, as spectrograms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.subplots(4, 8)
    for axes in grid.flat:
        axes.axis("off")
    shown = [
        (task, item) for task in _SHOWN if task in results for item in results[task].answered[:2]
    ]
    for axes, (task, item) in zip(grid[:2].flat, shown, strict=False):
        _question(axes, task, item)
    drawn = results["draw"].answered[:8] if "draw" in results else []
    for axes, item in zip(grid[2], drawn, strict=False):
        found = evaluate.pictures(model, item.parts)
        if found:
            axes.imshow(found[0].permute(1, 2, 0))
        _title(axes, item.example.question[-1]["text"], item.right)
    said = results["say"].answered[:8] if "say" in results else []
    for axes, item in zip(grid[3], said, strict=False):
        codes = [piece.codes for piece in item.parts if piece.kind == "audio"]
        if codes and model.audio_codec is not None:
            mel = model.audio_codec.decode(torch.tensor([codes[0]], device=model.device))[0]
            axes.imshow(mel.T.cpu(), origin="lower", aspect="auto")
        _title(axes, item.example.question[-1]["text"], item.right)
    figure.savefig(path, dpi=110)


def _question(axes: Any, task: str, item: Answered) -> None:
    """The picture, or else the sound, of a question; the answer above."""
    for part in item.example.question:
        if part["type"] == "image":
            axes.imshow(part["image"].permute(1, 2, 0))
            break
        if part["type"] == "audio":
            axes.imshow(part["audio"].T, origin="lower", aspect="auto")
    heard = item.example.facts.get("heard")
    asked = f"{task}{'' if heard is None else f' (hears {heard})'}"
    _title(axes, f"{asked}\n{item.text.strip()}", item.right)


def _title(axes: Any, text: str, right: bool) -> None:
    import textwrap

    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 22)]
    axes.set_title("\n".join(lines), fontsize=7, color="black" if right else "tab:red")
