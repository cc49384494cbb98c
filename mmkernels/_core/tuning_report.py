"""What `python -m mmkernels tune` keeps and prints of its search."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from mmkernels._core import tuning_entries, tuning_store
from mmkernels._core.triton_runtime import Gpu
from mmkernels._core.tuning_choice import Config
from mmkernels._core.tuning_search import Result


def entry(result: Result) -> dict[str, Any] | None:
    """What the file keeps of a result; None if no configuration was right."""
    if result.best is None:
        return None
    return {
        "problem": result.problem.key(),
        "config": result.best.config._asdict(),
        "milliseconds": result.best.milliseconds,
        "table_milliseconds": result.trials[0].milliseconds,
        **tuning_entries.made_with(),
        "torch": torch.__version__,
    }


def render(result: Result) -> str:
    """A result as text: the winner, and every configuration that failed."""

    def words(config: Config) -> str:
        block_m, block_n, warps, stages = config
        return f"{block_m} x {block_n}, {warps} warps, {stages} stage{'s' * (stages > 1)}"

    name, best, first = result.problem.key(), result.best, result.trials[0]
    if best is None:
        lines = [f"{name}: none of {len(result.trials)} configurations was right; the table serves"]
    else:
        table = "failed" if first.milliseconds is None else f"{first.milliseconds:.3f} ms"
        lines = [
            f"{name}: {words(best.config)}: {best.milliseconds:.3f} ms "
            f"(table: {words(first.config)}: {table}; {len(result.trials)} tried)"
        ]
    return "\n".join(
        lines + [f"  {words(t.config)}: {t.problem}" for t in result.trials if t.problem]
    )


def report(
    gpu: Gpu, results: Sequence[Result], missed: Sequence[str] = (), dry: bool = False
) -> dict[str, Any]:
    """Results for --json, which `tools/tuning_table.py` reads.

    Args:
        gpu: the one measured, or in a dry run the one whose candidates were tried.
        results: of the problems that were begun.
        missed: names of those that were not.
        dry: nothing was measured on a GPU.
    """
    return {
        "gpu": gpu.name,
        "dry_run": dry,
        "file": None if dry else os.fspath(tuning_store.path(gpu.name)),
        "problems": {
            result.problem.key(): {
                "best": entry(result),
                "trials": [t._asdict() | {"config": t.config._asdict()} for t in result.trials],
            }
            for result in results
        },
        "not_reached": list(missed),
    }
