"""Checkpoints of a training run: whole or not there, the newest that is whole is used."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.models import checkpoint as files
from mmkernels.models.multimodal import MultimodalModel

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
KEPT = 2


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
        weights: of the model.
        optimizer: its tensors by name.
        state: what was given to `save`.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    run: Path, model: MultimodalModel, optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Writes a checkpoint, then removes those before it, but for the newest; `KEPT` are left.

    Args:
        run: the run's folder.
        model: its weights are kept as they are.
        optimizer: tensors by name.
        state: plain values, "step" among them, counted over all stages.
    """
    from safetensors.torch import save as to_bytes

    weights = {name: x.detach().cpu().contiguous() for name, x in model.own_weights().items()}
    folder = run / "checkpoints" / f"{state['step']:08d}"
    files.write_folder(
        folder,
        {
            files.CONFIG: json.dumps(model.config.to_dict(), indent=1).encode(),
            files.TOKENIZER: model.tokenizer.to_json().encode(),
            files.WEIGHTS: to_bytes(weights),
            OPTIMIZER: to_bytes({name: x.cpu().contiguous() for name, x in optimizer.items()}),
            STATE: json.dumps(state, indent=1).encode(),
        },
    )
    folders = list(_newest_first(run))
    broken_off = folder.parent.glob(".*")  # by the end of a process that was writing
    for old in (*folders[folders.index(folder) + KEPT :], *broken_off):
        shutil.rmtree(old)
    return folder


def newest(run: Path) -> Resumed | None:
    """The newest checkpoint that is whole; says on standard error which it left out, and why.

    Returns:
        None where there is none.
    """
    from safetensors.torch import load as from_bytes

    for folder in _newest_first(run):
        try:
            found = files.read_folder(folder)
            return Resumed(
                from_bytes(found[files.WEIGHTS]),
                from_bytes(found[OPTIMIZER]),
                json.loads(found[STATE]),
            )
        # A damaged manifest may be any JSON, and lead to any of these.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"left out the checkpoint {folder}: {error}", file=sys.stderr)
    return None


def set_aside(run: Path, step: int) -> None:
    """Renames checkpoints of later steps to {step}.damaged: they are in nobody's way, and there."""
    for folder in _newest_first(run):
        if int(folder.name) > step:
            aside = folder.with_suffix(".damaged")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)


def _newest_first(run: Path) -> Iterator[Path]:
    folders = (run / "checkpoints").glob("[0-9]*")
    return iter(sorted((f for f in folders if f.is_dir() and f.name.isdigit()), reverse=True))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's moments, by the names of its parameters in their order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}|{key}": torch.as_tensor(value)
        for index, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Takes what `optimizer_tensors` gave."""
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit("|", 1)
        state.setdefault(index[parameter], {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
