"""The file in the user's cache directory where `python -m mmkernels tune` keeps what it measured.

One JSON file a GPU model, {"gpu": its name, "entries": [entry]}. An entry has "problem", "config",
"milliseconds" and the versions of triton, torch and mmkernels that it was measured with; there is
one a problem and version of triton.
"""

import fcntl
import functools
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

Entry = dict[str, Any]
FIELDS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


class Stored(NamedTuple):
    """What a process uses of a file: the entries by problem, and what of it is not used and why."""

    entries: dict[str, Entry]
    note: str | None


def path(gpu_name: str) -> Path:
    """Where the measurements of a GPU model lie; XDG_CACHE_HOME moves it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return home / "mmkernels" / f"tuning-{slug}.json"


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _flaw(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("problem"), str):
        return "an entry has no problem"
    config = entry.get("config")
    if isinstance(config, dict) and all(
        type(config.get(field)) is int and config[field] > 0 for field in FIELDS
    ):
        return None
    return f"the entry of {entry['problem']!r} has no config of positive {', '.join(FIELDS)}"


def read(gpu_name: str) -> list[Entry]:
    """All entries of a GPU model, those of other versions among them; [] without a file.

    Raises:
        ValueError: the file cannot be read or is not one of ours; names the fix.
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
        merged = {(e["problem"], e.get("triton")): e for e in [*read(gpu_name), *entries]}
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
        return Stored({}, f"MMKERNELS_TUNING=0: {path(gpu_name)} is not used")
    try:
        everything = read(gpu_name)
    except ValueError as error:
        warnings.warn(f"{error}. Until then the built-in table serves.", stacklevel=2)
        return Stored({}, str(error))
    version = triton_version()
    entries = {e["problem"]: e for e in everything if e.get("triton") == version}
    others = {e["problem"] for e in everything} - entries.keys()
    if not others:
        return Stored(entries, None)
    return Stored(
        entries,
        f"{len(others)} tuned configurations in {path(gpu_name)} are of another triton than "
        f"{version} and are not used; run python -m mmkernels tune",
    )
