"""One case: every implementation checked, then timed in turns."""

import time
from collections.abc import Callable
from typing import Any

import torch

from mmkernels.bench import clock, compiling
from mmkernels.bench.case import OURS, Call, Case, Problem, Unavailable
from mmkernels.bench.clock import Clock, Timed, Turns
from mmkernels.bench.memory import peak_bytes


def measure(case: Case, clock_: Clock, device: torch.device, turns: Turns) -> dict[str, Any]:
    """The record of a case, ready for JSON.

    Returns:
        What `Case` says of it, "flops", "bytes", "results" by implementation (median_s, iqr_s,
        times_s, first_call_s, launch_s, timer, peak_bytes, max_error and, for peers, ratio and
        pairwise_ratio), "left_out" (implementation -> why), and "failed": None, or what is wrong
        with one of ours. Then nothing is timed; nor where `OURS` is left out, as is a case whose
        library is not installed.
    """
    record: dict[str, Any] = {
        "suite": case.suite,
        "name": case.name,
        "shape": case.shape,
        "mask": case.mask,
        "dtype": case.dtype_name,
        "mode": case.mode,
        "scale": case.scale,
        "flops": None,
        "bytes": None,
        "results": {},
        "left_out": {},
        "failed": None,
    }
    compiling.forget()
    try:
        problem = _made(case)
        record |= {"flops": problem.flops, "bytes": problem.bytes}
        _compare(problem, record, clock_, device, turns, case.wall)
    except Unavailable as error:
        record["left_out"] |= {OURS: str(error)}
    except Exception as error:  # one case shall not end a run; it is kept, shown, and counts as red
        record |= {"failed": _one_line(error), "results": {}}
    return record


def _made(case: Case) -> Problem:
    try:
        return case.make()
    except torch.OutOfMemoryError as full:
        raise Unavailable("its inputs do not fit into memory") from full


def _compare(
    problem: Problem,
    record: dict[str, Any],
    clock_: Clock,
    device: torch.device,
    turns: Turns,
    wall: bool,
) -> None:
    """Fills in the results of every implementation that is there and right."""
    ready: dict[str, tuple[Call, Timed]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, prepare in problem.implementations.items():
        try:
            call, results[name] = _checked(problem, prepare, clock_, device)
            ready[name] = call, clock_.ready(call, wall)
        except Unavailable as error:
            record["left_out"][name] = str(error)
            if name == OURS:
                raise
        except Exception as error:
            if name.startswith(OURS):
                raise
            record["left_out"][name] = _one_line(error)
    times = clock.take_turns({name: timed for name, (_, timed) in ready.items()}, turns)
    for name, (_, timed) in ready.items():
        result = results[name] | clock.summary(times[name])
        result |= {"timer": timed.timer, "launch_s": timed.launch}
        if name != OURS:
            result |= clock.speedup(times[OURS], times[name])
        record["results"][name] = result


def _checked(
    problem: Problem, prepare: Callable[[], Call], clock_: Clock, device: torch.device
) -> tuple[Call, dict[str, Any]]:
    """A call whose results obey the error rule, with its first time, error and peak memory."""
    began = time.perf_counter()
    call = prepare()
    results = call()
    clock_.synchronize()
    first = time.perf_counter() - began
    try:
        error = problem.check(results)
    except torch.OutOfMemoryError as full:
        raise Unavailable("the check of its results does not fit into memory") from full
    del results
    return call, {
        "first_call_s": first,
        "max_error": error,
        "peak_bytes": peak_bytes(call, device),
    }


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
