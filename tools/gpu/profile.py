"""The step that says what limits each kernel: ncu's counters where it may read them."""

import csv
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.gpu.process import Done
from tools.gpu.run import Run, limit, parsed, tool

BACKENDS = ("triton", "cuda")
# Column of a row -> the metrics of ncu that it may come from: the first that this GPU has. All of
# them are in Nsight Compute since 2022.
METRICS = {
    "microseconds": ("gpu__time_duration.sum",),
    "sm": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    ),
    "memory": ("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",),
    "l2": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
# The clocks as they are in use; only what lies between cudaProfilerStart and cudaProfilerStop.
NCU = (
    *("--clock-control", "none", "--profile-from-start", "off", "--metrics"),
    ",".join(name for names in METRICS.values() for name in names),
    *("--csv", "--page", "raw", "--print-units", "base"),
)
# Launched in front of every case, so that the rows behind it are that case's.
BETWEEN = "spin_kernel"
# Below this share of what a unit can do, in %, it does not limit.
BUSY = 60.0
# The tensor pipe is what keeps an SM busy if it has this share of the busiest pipe's load.
MOST = 0.8


def profile(run: Run, seconds: float) -> None:
    """One launch of each kernel, by backend, for one may hang: under ncu, else by the clock."""
    found: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    for index, backend in enumerate(BACKENDS):
        share = (deadline - time.monotonic()) / (len(BACKENDS) - index)
        words = ("-m", "tools.profiled", "--backend", backend, *(["--toy"] if run.dry else []))
        found[backend] = _by_ncu(run, backend, words, share)
        run.record.put(profile=found)


def _by_ncu(run: Run, backend: str, words: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """The rows of a backend's kernels, from ncu's counters."""
    ncu = tool("ncu")
    if run.dry or ncu is None:
        why = "there is no GPU" if run.dry else "ncu is not on PATH"
        return _by_clock(run, backend, words, seconds, why)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        launcher, most = (ncu, *NCU, "--log-file", str(log)), 0.7 * seconds
        done = run.python(
            "profile", f"ncu, {backend}", (*words, "--limit", limit(most)), most, launcher
        )
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    for line in lines:
        run.runner.say("ncu", line)
    launched = _printed(done)
    try:
        rows = counted(lines, launched.get("cases", []))
        why = next((line for line in lines if "==ERROR==" in line), "ncu counted no kernel")
    except (KeyError, IndexError, ValueError) as error:
        rows, why = [], f"ncu's table reads otherwise than expected: {error!r}"
    if rows or (launched.get("left_out") and not launched["cases"]):
        return {"source": "ncu", **launched, "rows": rows}
    return _by_clock(run, backend, words, 0.3 * seconds, why)


def _by_clock(
    run: Run, backend: str, words: tuple[str, ...], seconds: float, why_not: str
) -> dict[str, Any]:
    """The same from torch's profiler and the ceilings of this machine."""
    words = (*words, "--clock", "--limit", limit(seconds))
    done = run.python("profile", f"by the clock, {backend}", words, seconds)
    return {"source": "torch.profiler", "why_not_ncu": why_not, **_printed(done)}


def _printed(done: Done) -> dict[str, Any]:
    """What the script has printed in its last line, whatever a launcher says besides."""
    return parsed(next((x for x in reversed(done.stdout.splitlines()) if x.startswith("{")), ""))


def counted(lines: Sequence[str], cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `ncu --csv --page raw`, in the documented form: names, units, a row a kernel.

    Args:
        lines: of ncu's output, messages included, which begin with "==".
        cases: {"case", "backend"} in the order of their launches.

    Returns:
        A row a kernel: "case", "backend", "kernel", the columns of METRICS (in %, but for
        microseconds and registers; None where ncu has no number) and "limiter".

    Raises:
        ValueError: the time has a unit that is none.
    """
    units: dict[str, str] = {}
    rows, case = [], -1
    table = [line for line in lines if line.startswith('"')]
    for line in csv.DictReader(table):
        if not line["ID"]:
            units = line
        elif BETWEEN in line["Kernel Name"]:
            case += 1
        else:
            found = {column: _number(line, names) for column, names in METRICS.items()}
            if found["microseconds"] is not None:
                found["microseconds"] *= _microseconds(units[METRICS["microseconds"][0]])
            of = {"case": "before the first", "backend": ""} if case < 0 else dict(cases[case])
            rows.append({**of, "kernel": line["Kernel Name"], **found, "limiter": limiter(found)})
    return rows


def _number(line: Mapping[str, str], names: Sequence[str]) -> float | None:
    for name in names:
        try:
            return float(line[name].replace(",", ""))
        except (KeyError, ValueError):
            continue
    return None


def _microseconds(unit: str) -> float:
    factors = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0}
    if unit not in factors:
        raise ValueError(f"the unit of time is {unit!r}; it must be of {', '.join(factors)}")
    return factors[unit]


def limiter(row: Mapping[str, float | None]) -> str:
    """What keeps a kernel from being faster.

    The busier one of the SM's pipes and the memory system, if it is busy for BUSY % of its peak;
    else waiting. Of pipes the tensor pipe, if it has most of the load; of memory the DRAM, if that
    is busy by itself.
    """
    sm, memory = row["sm"], row["memory"]
    if sm is None or memory is None:
        return "unknown"
    if max(sm, memory) < BUSY:
        return "latency"
    if memory > sm:
        return "DRAM" if (row["dram"] or 0) >= BUSY else "caches and shared memory"
    return "tensor pipe" if (row["tensor"] or 0) >= MOST * sm else "other pipes of the SM"


def limiter_by_clock(share: float | None, by_flops: bool) -> str:
    """The same without counters.

    Args:
        share: the least time that the ceilings allow, as a share of the time that it took, in %.
        by_flops: the ceiling of products is the nearer one, not that of the memory.
    """
    if share is None:
        return "unknown"
    if share < BUSY:
        return "latency"
    return "tensor pipe" if by_flops else "DRAM"
