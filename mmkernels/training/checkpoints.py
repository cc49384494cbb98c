"""Checkpoints of a training run: whole or not there, the newest that is whole is used.

One process writes a model's folder with the optimizer beside it. Several write their parts through
torch.distributed.checkpoint, while training goes on. Either can be loaded by any number of them.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor

from mmkernels.models import checkpoint as files
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training.world import World

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
METADATA = ".metadata"  # of torch.distributed.checkpoint
KEPT = 2


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
        folder: the checkpoint.
        state: what was given to `save`.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def in_parts(self) -> bool:
        """Whether several processes wrote it."""
        return (self.folder / METADATA).exists()

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the model, where one process wrote them."""
        return _read(self.folder / files.WEIGHTS)

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """Its tensors by name, where one process wrote them."""
        return _read(self.folder / OPTIMIZER)


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
    folder = _folder(run, state)
    written = {
        files.WEIGHTS: to_bytes(weights),
        OPTIMIZER: to_bytes({name: x.cpu().contiguous() for name, x in optimizer.items()}),
    }
    files.write_folder(folder, _about(model, state) | written)
    _remove_old(run, folder)
    return folder


def save_parts(
    run: Path,
    model: MultimodalModel,
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    world: World,
) -> Future:
    """`save` by several processes at once, in the background.

    Tensors are copied before it returns, so training may go on. The folder gets its place when all
    processes have written.

    Args:
        run: as of `save`, the same folder for all processes.
        model: as of `save`; tensors of it may be in parts.
        optimizer: likewise.
        state: as of `save`.
        world: the processes.

    Returns:
        What tells that it is done, by result().
    """
    folder = _folder(run, state)
    aside = files.aside_of(folder)
    if world.rank == 0 and aside.exists():  # others write only once rank 0 has a plan
        shutil.rmtree(aside)
    tensors = {"model": model.own_weights(), "optimizer": optimizer}
    written = async_save(tensors, checkpoint_id=aside, process_group=world.files)
    assert isinstance(written, Future)
    about = _about(model, state)

    def put_in_place() -> None:
        try:
            written.result()
        except CheckpointException as error:  # no Exception, for whatever reason
            raise OSError(f"{folder} could not be written: {error}") from error
        if world.rank == 0:
            files.adopt_folder(folder, about)
            _remove_old(run, folder)

    thread = ThreadPoolExecutor(1)
    done = thread.submit(put_in_place)
    thread.shutdown(wait=False)
    return done


def load(
    found: Resumed, model: MultimodalModel, optimizer: dict[str, Tensor], world: World
) -> None:
    """Reads a checkpoint into a model and `moments`; of those only what it has is left.

    Args:
        found: which.
        model: tensors of it may be in parts.
        optimizer: likewise.
        world: the processes, all of which read.
    """
    weights = model.own_weights()
    if not found.in_parts:
        saved = found.optimizer
        for name in [name for name in optimizer if name not in saved]:
            del optimizer[name]
        for tensors, whole in ((weights, found.weights), (optimizer, saved)):
            for name, x in tensors.items():
                x.copy_(_part_of(whole[name], x))
        return
    known = FileSystemReader(found.folder).read_metadata().state_dict_metadata
    for name in [name for name in optimizer if f"optimizer.{name}" not in known]:
        del optimizer[name]
    alone = world.plan.size == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        load_parts(
            {"model": weights, "optimizer": optimizer},
            checkpoint_id=found.folder,
            process_group=None if alone else world.files,
            no_dist=alone,
        )


def moments(parameters: list[nn.Parameter], names: list[str]) -> dict[str, Tensor]:
    """What `optimizer_tensors` gives of AdamW after a step, to be filled by `load`."""
    return {
        f"{name}|{key}": torch.zeros(()) if key == "step" else torch.zeros_like(x.detach())
        for name, x in zip(names, parameters, strict=True)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def _part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor, if `like` is held in parts."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _folder(run: Path, state: dict[str, Any]) -> Path:
    return run / "checkpoints" / f"{state['step']:08d}"


def _about(model: MultimodalModel, state: dict[str, Any]) -> dict[str, bytes]:
    """Files beside the tensors."""
    return {
        files.CONFIG: json.dumps(model.config.to_dict(), indent=1).encode(),
        files.TOKENIZER: model.tokenizer.to_json().encode(),
        STATE: json.dumps(state, indent=1).encode(),
    }


def _remove_old(run: Path, folder: Path) -> None:
    """But for the newest, of those before `folder`, and what is left of writes that broke off."""
    folders = list(_newest_first(run))
    broken_off = folder.parent.glob(".*")
    for old in (*folders[folders.index(folder) + KEPT :], *broken_off):
        shutil.rmtree(old)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def newest(run: Path) -> Resumed | None:
    """The newest checkpoint that is whole; says on standard error which it left out, and why.

    Returns:
        None where there is none.
    """
    for folder in _newest_first(run):
        try:
            found = files.read_folder(folder)
            if METADATA not in found:
                found[files.WEIGHTS], found[OPTIMIZER]
            return Resumed(folder, json.loads(found[STATE]))
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
