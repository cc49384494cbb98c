"""Where tuned configurations lie: what the user measured, and what ships with the package.

`python -m mmkernels tune` keeps what it measured in one file a GPU model, in the user's cache
directory. An entry of another triton or mmkernels, or of other kernels, says nothing of these; it
is kept and not used. What ships lies beside this file, in `tuned/`; `tools/tuning_table.py` puts it
there. It serves whatever it was measured with, for what it stands in for was never measured.
"""

import contextlib
import contextvars
import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmkernels._core import tuning_entries
from mmkernels._core.tuning_entries import Entry, made_with, slug

SHIPPED = Path(__file__).with_name("tuned")
# Where `elsewhere` keeps the user's files.
_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("folder", default=None)


class Stored(NamedTuple):
    """What a process uses of a file: the entries by problem, and what of it is not used and why."""

    entries: dict[str, Entry]
    note: str | None


def path(gpu_name: str) -> Path:
    """Where the measurements of a GPU model lie; XDG_CACHE_HOME moves it.

    Raises:
        OSError: the user has no home directory; names the fix.
    """
    if (folder := _folder.get()) is None:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError as error:  # no HOME, and no entry in the system's list of users
            raise OSError(
                "there is no folder to save tuned configurations in: "
                f"{error} Set XDG_CACHE_HOME to one"
            ) from error
        folder = home / "mmkernels"
    return folder / f"tuning-{slug(gpu_name)}.json"


def shipped_path(gpu_name: str) -> Path:
    """Where what ships for a GPU model lies, if anything does."""
    return SHIPPED / f"{slug(gpu_name)}.json"


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Within it, and its thread, the user's files lie in a temporary folder, which is removed."""
    with tempfile.TemporaryDirectory(prefix="mmkernels-") as folder:
        token = _folder.set(Path(folder))
        try:
            yield
        finally:
            _folder.reset(token)


def read(gpu_name: str) -> list[Entry]:
    """All entries of the user's for a GPU model, those of other versions among them.

    Raises:
        ValueError: the file cannot be read or is not one of ours; names the fix.
        OSError: there is no place for a file.
    """
    try:
        return tuning_entries.read(path(gpu_name))
    except ValueError as error:
        fix = "move it away or delete it, then run python -m mmkernels tune"
        raise ValueError(f"{error}; {fix}") from error


def merge(gpu_name: str, entries: list[Entry]) -> Path:
    """Adds entries to the file, keeps those of other problems and versions, returns where it is.

    Raises:
        ValueError: the file is there and is not one of ours; it is left as it is.
        OSError: it cannot be written.
    """
    file = path(gpu_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or two processes that tune would lose entries
        everything = [*read(gpu_name), *entries]
        merged = {(e["problem"], *map(e.get, made_with())): e for e in everything}
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"gpu": gpu_name, "entries": list(merged.values())}, stream, indent=1)
            os.replace(temporary, file)  # a reader sees the old file or the new one, never a part
        except BaseException:
            os.unlink(temporary)
            raise
    return file


def _switched_off() -> bool:
    return os.environ.get("MMKERNELS_TUNING") == "0"


@functools.cache
def load(gpu_name: str) -> Stored:
    """The user's usable entries for a GPU model, read once a process; MMKERNELS_TUNING=0: none."""
    if _switched_off():
        return Stored({}, "MMKERNELS_TUNING=0: no tuned configuration is used")
    try:
        everything = read(gpu_name)
    except OSError as error:
        return Stored({}, f"no configuration that was tuned here is used: {error}")
    except ValueError as error:
        warnings.warn(f"{error}. Until then the package's tables serve.", stacklevel=2)
        return Stored({}, str(error))
    if not everything:
        return Stored({}, None)
    now = made_with()
    entries = {e["problem"]: e for e in everything if all(e.get(k) == v for k, v in now.items())}
    others = {e["problem"] for e in everything} - entries.keys()
    if not others:
        return Stored(entries, None)
    return Stored(
        entries,
        f"{len(others)} tuned configurations in {path(gpu_name)} were measured with another triton "
        f"than {now['triton']}, another mmkernels than {now['mmkernels']} or other kernels and are "
        "not used; run python -m mmkernels tune again",
    )


@functools.cache
def shipped(gpu_name: str) -> Stored:
    """What ships for a GPU model, read once a process; MMKERNELS_TUNING=0: nothing."""
    if _switched_off():
        return Stored({}, None)  # `load` says so
    try:
        entries = tuning_entries.read(shipped_path(gpu_name))
    except ValueError as error:
        problem = f"{error}; install mmkernels anew"
        warnings.warn(f"{problem}. Until then the built-in table serves.", stacklevel=2)
        return Stored({}, problem)
    return Stored({entry["problem"]: entry for entry in entries}, None)


def is_of_these_kernels(entry: Entry) -> bool:
    """Whether it was measured with this triton and these kernels."""
    now = made_with()
    return all(entry.get(name) == now[name] for name in ("triton", "kernels"))
