"""`python -m mmkernels tune`: measures the Triton kernels' tile sizes here and keeps the best.

What it finds goes to a file in the user's cache directory (`_core/tuning_store.py`), which every
later process reads in place of the built-in table. A configuration whose results disobey the error
rule, or that fails, never wins, and is listed with its reason.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels._core import triton_runtime, tuning, tuning_store
from mmkernels._core.progress import progress
from mmkernels._core.triton_runtime import Gpu
from mmkernels._core.tuning import Config, Problem
from mmkernels._core.tuning_cases import Case, make_case
from mmkernels._core.tuning_search import Measure, Result, neighbours, search

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(function: Callable[[], object]) -> float:
    """Milliseconds of a call on the GPU: the median of many, each with a cold L2 cache."""
    import triton.testing

    return float(triton.testing.do_bench(function, warmup=20, rep=80, return_mode="median"))


def entry(result: Result) -> dict[str, Any] | None:
    """What the file keeps of a result; None if no configuration was right."""
    if result.best is None:
        return None
    return {
        "problem": tuning.key(result.problem),
        "config": result.best.config._asdict(),
        "milliseconds": result.best.milliseconds,
        "table_milliseconds": result.trials[0].milliseconds,
        **tuning_store.made_with(),
        "torch": torch.__version__,
    }


def tune(
    problems: Sequence[Problem],
    gpu: Gpu,
    make: Callable[[Problem], Case],
    measure: Measure,
    quick: bool = False,
) -> list[Result]:
    """Searches every problem, and saves each result as soon as it is there.

    Args:
        problems: what to tune.
        gpu: the one that is measured.
        make: gives the case of a problem.
        measure: takes a function, returns the milliseconds of a call.
        quick: try only configurations next to the table's.

    Raises:
        ValueError: the file of saved configurations is not one of ours; raised before any search.
        OSError: there is no folder to save them in, raised before any search, or none to write to.
    """
    tuning_store.read(gpu.name)
    plans = {problem: tuning.candidates(problem, gpu) for problem in problems}
    if quick:
        plans = {problem: neighbours(configs) for problem, configs in plans.items()}
    results = []
    with progress(sum(map(len, plans.values())), "config") as step:
        for problem, configs in plans.items():
            results.append(search(problem, make, configs, measure, step))
            if (found := entry(results[-1])) is not None:
                tuning_store.merge(gpu.name, [found])
    tuning.forget()
    return results


def render(result: Result) -> str:
    """A result as text: the winner, and every configuration that failed."""

    def words(config: Config) -> str:
        block_m, block_n, warps, stages = config
        return f"{block_m} x {block_n}, {warps} warps, {stages} stage{'s' * (stages > 1)}"

    name, best, first = tuning.key(result.problem), result.best, result.trials[0]
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


def unavailable() -> str | None:
    """Why there is nothing to tune here, in one line; None if there is."""
    if torch.cuda.is_available():
        return triton_runtime.why_not(torch.empty(0, device="cuda"))
    built = torch.version.cuda or torch.version.hip
    cause = "torch sees no GPU" if built else "this torch is built without CUDA and ROCm"
    return f"{cause}; run it on the machine whose GPU is to be tuned"


def current_gpu() -> Gpu:
    """The GPU that torch would use."""
    return triton_runtime.gpu_of(torch.empty(0, device="cuda"))


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m mmkernels tune`.

    Args:
        argv: its arguments; None: the process's.

    Returns:
        The exit code: 0; 1 if a problem had no right configuration; 2 without a GPU or if the file
        of saved configurations cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels tune",
        description="Measure tile sizes of the Triton kernels on this GPU and keep the best ones. "
        "MMKERNELS_TUNING=0 makes later processes ignore them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kernels = [kernel for kernel in tuning.KERNELS if kernel != "backward_bias"]
    parser.add_argument("--quick", action="store_true", help="only what is close to the table")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], metavar="D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--kernel", nargs="+", choices=tuning.KERNELS, default=kernels)
    parser.add_argument("--bias", action="store_true", help="with a bias, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args(argv)
    for dim in arguments.head_dim:
        if not 1 <= dim <= 256:
            parser.error(f"--head-dim is {dim}; it must lie in [1, 256]")
    if (reason := unavailable()) is not None:
        print(f"mmkernels tune: {reason}", file=sys.stderr)
        return 2
    problems = {
        tuning.key(problem): problem
        for kernel in arguments.kernel
        for dim in arguments.head_dim
        for dtype in arguments.dtype
        for masked in (False, True)
        for bias in ((False, True) if arguments.bias else (False,))
        for problem in [Problem(kernel, dim, dim, DTYPES[dtype], masked, bias)]
    }
    gpu = current_gpu()
    try:
        results = tune(
            list(problems.values()), gpu, lambda p: make_case(p, "cuda"), measure, arguments.quick
        )
    except (ValueError, OSError) as error:
        print(f"mmkernels tune: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(report(gpu, results), indent=2))
    else:
        print("\n".join(map(render, results)))
        print(f"saved in {tuning_store.path(gpu.name)}")
    return 0 if all(result.best for result in results) else 1


def report(gpu: Gpu, results: Sequence[Result]) -> dict[str, Any]:
    """Results for --json."""
    return {
        "gpu": gpu.name,
        "file": os.fspath(tuning_store.path(gpu.name)),
        "problems": {
            tuning.key(result.problem): {
                "best": entry(result),
                "trials": [t._asdict() | {"config": t.config._asdict()} for t in result.trials],
            }
            for result in results
        },
    }
