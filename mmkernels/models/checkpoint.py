"""Folders of weights and settings that are whole or not there.

A folder is written beside its place under another name, file by file, each forced to the disk;
then it is renamed. One that is replaced is renamed before, and removed at last; where a process
ends between the two renames, it is read under that name. manifest.json holds the size and SHA-256
of every file, so one that was cut off or changed is refused.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
MANIFEST = "manifest.json"


class Loaded(NamedTuple):
    """A model's folder, read.

    Attributes:
        folder: where it was.
        config: of config.json.
        weights: of model.safetensors.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]


def save(
    folder: Path, weights: dict[str, Tensor], *, config: dict[str, Any], tokenizer: str
) -> None:
    """Writes a model's folder.

    Args:
        folder: where to; what it holds is replaced once all is on the disk.
        weights: tensors on the CPU, contiguous.
        config: plain values.
        tokenizer: tokenizer.json's text.
    """
    from safetensors.torch import save as to_bytes

    files = {
        CONFIG: json.dumps(config, indent=1).encode(),
        TOKENIZER: tokenizer.encode(),
        WEIGHTS: to_bytes(weights),
    }
    write_folder(folder, files)


def load(folder: Path) -> Loaded:
    """Reads a model's folder.

    Raises:
        ValueError: it is missing or not whole; the message names the file and what is wrong.
    """
    from safetensors.torch import load as from_bytes

    folder = where(Path(folder))
    files = read_folder(folder)
    for name in (CONFIG, TOKENIZER, WEIGHTS):
        if name not in files:
            raise ValueError(f"{folder} has no {name}; it is no folder that save_pretrained wrote")
    return Loaded(folder, json.loads(files[CONFIG]), from_bytes(files[WEIGHTS]))


def restore(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Loads weights into a module of the same shape.

    Raises:
        ValueError: names or shapes differ.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another model: {error}") from error


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files and their manifest, so that the folder is there whole, or as it was before.

    Args:
        folder: where to; what it holds is replaced once all is on the disk. One process may write
            it at a time.
        files: bytes by their names in the folder.

    Raises:
        ValueError: there is something else in its place, which would be lost.
    """
    folder = _with_room(folder)
    aside = aside_of(folder)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    _fill(aside, files)
    _put_in_place(folder, {name: _said_of(data) for name, data in files.items()})


def adopt_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts what several processes have written to `aside_of(folder)` in its place, as a whole.

    Args:
        folder: where to; what it holds is replaced.
        files: more of them, by their names.

    Raises:
        ValueError: as for `write_folder`.
    """
    folder = _with_room(folder)
    aside = aside_of(folder)
    _fill(aside, files)
    paths = sorted(path for path in aside.iterdir() if path.is_file())
    _put_in_place(folder, {path.name: _said_of(path.read_bytes()) for path in paths})


def aside_of(folder: Path) -> Path:
    """Where a folder is written before it gets its place."""
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.part")


def _with_room(folder: Path) -> Path:
    """The folder's path, where nothing is that would be lost."""
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = _before(folder)
    if before.exists() and not folder.exists():  # a write was cut off between the renames
        before.rename(folder)
    foreign = folder.exists() and not (folder / MANIFEST).is_file()
    if foreign and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} holds something else than a checkpoint; remove it, or name another folder"
        )
    if before.exists():
        shutil.rmtree(before)
    return folder


def _said_of(data: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _put_in_place(folder: Path, manifest: dict[str, dict[str, Any]]) -> None:
    aside, before = aside_of(folder), _before(folder)
    _fill(aside, {MANIFEST: json.dumps(manifest, indent=1).encode()})
    _sync(aside)
    if folder.exists():  # a folder cannot be renamed over one that holds files
        folder.rename(before)
        aside.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(before)
    else:
        aside.rename(folder)
        _sync(folder.parent)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder that `write_folder` wrote.

    Raises:
        ValueError: the folder or a file is missing, cut off or changed; the message says which.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        sums = {name: (said["bytes"], said["sha256"]) for name, said in manifest.items()}
    except OSError as error:
        raise ValueError(f"{folder} is no checkpoint: {path.name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    files = {}
    for name, (size, digest) in sums.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise ValueError(
                f"{folder / name} has {len(data):,} bytes of {size:,}: it was cut off. "
                "Use an earlier checkpoint"
            )
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{folder / name} was changed after it was written: its sum is wrong")
        files[name] = data
    return files


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, so that it is there whole, or as it was before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    _sync(path.parent)


def where(folder: Path) -> Path:
    """Where a folder is: in its place, or where a write that was to replace it left it."""
    return _before(folder) if not folder.exists() and _before(folder).exists() else folder


def _before(folder: Path) -> Path:
    """Where a folder is while another takes its place."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.before")


def _sync(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
