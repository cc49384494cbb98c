"""The file in the user's cache directory where `python -m mmkernels tune` keeps what it measured.

One JSON file a GPU model, {"gpu": its name, "entries": [entry]}. An entry has "problem", "config",
"milliseconds" and what it was measured with: the versions of triton, torch and mmkernels, and a
digest of the kernels and their table. One of another triton or mmkernels, or of other kernels, says
nothing of these; it is kept and not used.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import mmkernels

Entry = dict[str, Any]
# Limits of a configuration's fields; all but the stages are powers of two.
FIELDS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "num_warps": (1, 16), "num_stages": (1, 8)}
KERNELS, TABLE = Path(__file__).parents[1] / "attention", Path(__file__).with_name("tuning.py")


class Stored(NamedTuple):
    """What a process uses of a file: the entries by problem, and what of it is not used and why."""

    entries: dict[str, Entry]
    note: str | None


def path(gpu_name: str) -> Path:
    """Where the measurements of a GPU model lie; XDG_CACHE_HOME moves it.

    Raises:
        OSError: the user has no home directory; names the fix.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no HOME, and no entry in the system's list of users
        raise OSError(
            f"there is no folder to save tuned configurations in: {error} Set XDG_CACHE_HOME to one"
        ) from error
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return home / "mmkernels" / f"tuning-{slug}.json"


def made_with() -> dict[str, str | None]:
    """What an entry must have been measured with to be used."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"triton": triton, "mmkernels": mmkernels.__version__, "kernels": _digest()}


@functools.cache
def _digest() -> str:
    """Of the kernels' sources, and of the table's, which a winner was faster than."""
    sources = [*sorted(KERNELS.glob("triton_*.py")), TABLE]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]


def _allowed(field: str, value: object) -> bool:
    low, high = FIELDS[field]
    if type(value) is not int or not low <= value <= high:
        return False
    return field == "num_stages" or value & (value - 1) == 0


def _flaw(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("problem"), str):
        return "an entry has no problem"
    config = entry.get("config")
    if isinstance(config, dict) and all(_allowed(field, config.get(field)) for field in FIELDS):
        return None
    ranges = ", ".join(f"{field} {low} to {high}" for field, (low, high) in FIELDS.items())
    return f"the entry of {entry['problem']!r} has no config of {ranges}, in powers of two"


def read(gpu_name: str) -> list[Entry]:
    """All entries of a GPU model, those of other versions among them; [] without a file.

    Raises:
        ValueError: the file cannot be read or is not one of ours; names the fix.
        OSError: there is no place for a file.
    """
    file = path(gpu_name)
    try:
        entries = list(json.loads(file.read_text(encoding="utf-8"))["entries"])
        problem = next(filter(None, map(_flaw, entries)), None)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(
            f"{file} is not a file of tuned configurations ({problem}); move it away or delete "
            "it, then run python -m mmkernels tune"
        )
    return entries


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


@functools.cache
def load(gpu_name: str) -> Stored:
    """The usable entries of a GPU model, read once a process; MMKERNELS_TUNING=0: none."""
    if os.environ.get("MMKERNELS_TUNING") == "0":
        return Stored({}, "MMKERNELS_TUNING=0: no tuned configuration is used")
    try:
        everything = read(gpu_name)
    except OSError as error:
        return Stored({}, f"no tuned configuration is used: {error}")
    except ValueError as error:
        warnings.warn(f"{error}. Until then the built-in table serves.", stacklevel=2)
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
