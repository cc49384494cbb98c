"""Fresh processes, the memory they need, and the spread of repeated measurements."""

import ctypes
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args, **kwargs)` in a new interpreter, which shares no memory with this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_rise(work: Callable[[], object]) -> float | None:
    """MiB by which this process's resident memory rose at its highest while `work` ran.

    The kernel keeps the highest value, so no peak is missed. None where the system has no /proc.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def field(name: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # else the work could use what was freed before, unseen
    reset.write_text("5")  # the highest value starts from the present one
    before = field("VmRSS")
    work()
    return (field("VmHWM") - before) / 1024


def spread(values: list[float], digits: int = 2) -> str:
    """The median and, for more than one value, the lowest and the highest."""
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f}–{max(values):.{digits}f})"
