"""The data of a run that never was: losses, failures and absences in known places."""

import statistics
from typing import Any

from mmkernels.bench.run import SCHEMA

CEILINGS = {"matmul": {"float32": 1e11, "bfloat16": 4e11}, "copy": {"bytes": 1e10}}


def result(median: float, ours: float | None = None, **changes: Any) -> dict[str, Any]:
    """One implementation's; `ours` is the time of mmkernels, None for mmkernels itself."""
    times = [0.9 * median, median, 1.1 * median]
    ratios = {} if ours is None else {"ratio": median / ours, "pairwise_ratio": median / ours}
    return {
        "median_s": statistics.median(times), "iqr_s": 0.1 * median, "times_s": times,
        "first_call_s": 2.5, "launch_s": None, "timer": "host", "peak_bytes": 3 * 2**20,
        "max_error": 1.5e-7, **ratios, **changes,
    }  # fmt: skip


def record(
    name: str = "ViT-B/16 224", ours: float = 0.01, peers: dict[str, float] | None = None, **changes
) -> dict[str, Any]:
    """A case in which mmkernels takes `ours` seconds and its peers what `peers` says."""
    peers = {"SDPA": 0.02} if peers is None else peers
    return {
        "suite": "attention", "name": name, "shape": "B1 H12 S197 D64", "mask": "full",
        "dtype": "float32", "mode": "forward", "scale": None, "flops": 5e8, "bytes": 1e6,
        "results": {
            "mmkernels": result(ours), **{peer: result(s, ours) for peer, s in peers.items()}
        },
        "left_out": {}, "failed": None, **changes,
    }  # fmt: skip


def run(records: list[dict[str, Any]], **environment: Any) -> dict[str, Any]:
    """A run of these records, full and on a CPU unless told otherwise."""
    return {
        "schema": SCHEMA,
        "environment": {
            "device": "cpu", "device_type": "cpu", "cpu": "a CPU, 2 cores",
            "cpu_capability": "AVX2", "threads": 2, "load_average": 0.4, "memory_gib": 8,
            "os": "Linux, x86_64", "python": "3.11.7", "torch": "2.14.1", "mmkernels": "0.1.0",
            "libraries": {"triton": "3.8.0", "numpy": "2.3.0"}, "variables": {},
            "date": "2026-11-29T10:00:00+00:00", "commit": "0123456789abcdef", "dirty": False,
            "command": "python -m mmkernels bench", "seed": 0, "quick": False, "seconds": 12.5,
            **environment,
        },
        "ceilings": CEILINGS,
        "records": records,
        "not_reached": [],
        "finished": True,
    }  # fmt: skip


GPU = {
    "device": "NVIDIA Fake 200", "device_type": "cuda", "capability": "9.0", "multiprocessors": 132,
    "l2_mib": 50, "gpu_memory_gib": 139, "cuda": "13.0", "driver_version": "580.1",
    "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz",
}  # fmt: skip
