"""A run: the cases of some suites, one after another, into one JSON that grows with each."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmkernels.bench import clock, environment, measure, roofline
from mmkernels.bench.case import Case

SCHEMA = 1
# Compilers' caches: what a first call costs is what it costs where nothing was compiled before.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def measured(
    cases: Sequence[Case],
    device: torch.device,
    *,
    quick: bool,
    command: str,
    limit: float = float("inf"),
    save: Callable[[Mapping[str, Any]], None] = lambda data: None,
    step: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Measures cases; the data of a JSON file.

    Args:
        cases: what to measure, the most telling ones first.
        device: where their tensors lie.
        quick: they are the quick ones of their suites.
        command: how to repeat the run.
        limit: seconds after which no case is begun.
        save: called with the data after every case.
        step: called with the name of every case that is done.

    Returns:
        {"schema", "environment", "ceilings", "records", "not_reached", "finished"}.
    """
    began, clock_ = time.monotonic(), clock.of(device)
    with fresh_caches(), ieee_float32():
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "environment": environment.describe(device, quick, command),
            "ceilings": roofline.measure(device, quick),
            "records": [],
            "not_reached": [str(case) for case in cases],
            "finished": False,
        }
        data["environment"] |= environment.clocks(device)
        for case in cases:
            if time.monotonic() - began > limit:
                break
            turns = clock.QUICK if quick else clock.FULL
            data["records"].append(measure.measure(case, clock_, device, turns))
            data["not_reached"].pop(0)
            save(data)  # first of all: a GPU that lost its context raises at any other call
            step(str(case))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    data["environment"]["seconds"] = round(time.monotonic() - began, 1)
    data["finished"] = not data["not_reached"]
    save(data)
    return data


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes the data; a reader, or a run that is cut off, never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(part(path), path)


def part(path: Path) -> Path:
    """Where the data of a file are written before they take its place."""
    return path.with_name(path.name + ".part")


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Within it compilers begin with empty caches."""
    kept = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(
        prefix="mmkernels-bench-", ignore_cleanup_errors=True
    ) as folder:
        for name in CACHES:
            os.environ[name] = os.path.join(folder, name.lower())
        try:
            yield
        finally:
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Within it float32 is IEEE for all, as in the kernels, and cuDNN measures its algorithms.

    Otherwise torch's convolutions round to TF32, and so would the yardstick of the error rule.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
