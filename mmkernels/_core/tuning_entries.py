"""What a file of tuned configurations holds, the user's and those that ship alike.

{"gpu": the name that the driver gives it, "entries": [entry]}. An entry has "problem", "config",
"milliseconds" and what it was measured with: the versions of triton, torch and mmkernels, and a
digest of the kernels and their tables.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import mmkernels

Entry = dict[str, Any]
# Limits of a configuration's fields; all but the stages are powers of two.
FIELDS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "num_warps": (1, 16), "num_stages": (1, 8)}
PACKAGE = Path(__file__).parents[1]
# The kernels and their tables, which a winner was faster than.
SOURCES = ("attention/triton_*.py", "patch_embed/triton_*.py", "_core/tuning.py")


def slug(gpu_name: str) -> str:
    """A GPU's name as a file is called."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def made_with() -> dict[str, str | None]:
    """What is measured now is measured with this."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"triton": triton, "mmkernels": mmkernels.__version__, "kernels": digest(PACKAGE)}


@functools.cache
def digest(package: Path) -> str:
    """Of SOURCES."""
    sources = [file for pattern in SOURCES for file in sorted(package.glob(pattern))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]


def _allowed(field: str, value: object) -> bool:
    low, high = FIELDS[field]
    if type(value) is not int or not low <= value <= high:
        return False
    return field == "num_stages" or value & (value - 1) == 0


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")  # type: ignore[operator]


def flaw(entry: Any) -> str | None:
    """What is wrong with an entry, or None."""
    if not isinstance(entry, dict) or not isinstance(entry.get("problem"), str):
        return "an entry has no problem"
    where, config = f"the entry of {entry['problem']!r}", entry.get("config")
    if not isinstance(config, dict) or not all(_allowed(x, config.get(x)) for x in FIELDS):
        ranges = ", ".join(f"{field} {low} to {high}" for field, (low, high) in FIELDS.items())
        return f"{where} has no config of {ranges}, in powers of two"
    if "milliseconds" in entry and not _is_time(entry["milliseconds"]):
        return f"{where} has {entry['milliseconds']!r} milliseconds, not a number above 0"
    return None


def read(file: Path) -> list[Entry]:
    """All entries of a file; [] where there is none.

    Raises:
        ValueError: it cannot be read or is not one of ours.
    """
    try:
        entries = list(json.loads(file.read_text(encoding="utf-8"))["entries"])
        problem = next(filter(None, map(flaw, entries)), None)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"{file} is not a file of tuned configurations ({problem})")
    return entries
