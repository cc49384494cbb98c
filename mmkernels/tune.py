"""`python -m mmkernels tune`: measures the Triton kernels' tile sizes here and keeps the best.

What it finds goes to a file in the user's cache directory (`_core/tuning_store.py`), which every
later process reads before the package's tables. A configuration whose results disobey the error
rule, or that fails, never wins, and is listed with its reason.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkernels._core import (
    triton_runtime,
    tuning_cases,
    tuning_patch_cases,
    tuning_plan,
    tuning_store,
)
from mmkernels._core.progress import progress
from mmkernels._core.triton_runtime import KNOWN_GPUS, Gpu, input_precision
from mmkernels._core.tuning_choice import ATTENTION_KERNELS, Config, Problem, choice, forget
from mmkernels._core.tuning_report import entry, render, report
from mmkernels._core.tuning_search import Case, Measure, Result, neighbours, search

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Whose table and candidates a dry run takes, and how many of the latter.
DRY_GPU, DRY_CANDIDATES = KNOWN_GPUS["sm_90"], 2
Select = Callable[[list[Config]], list[Config]]


def measure(function: Callable[[], object]) -> float:
    """Milliseconds of a call on the GPU: the median of many, each with a cold L2 cache."""
    import triton.testing

    return float(triton.testing.do_bench(function, warmup=20, rep=80, return_mode="median"))


def measure_once(function: Callable[[], object]) -> float:
    """Milliseconds of a call by the host's clock, for a dry run."""
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1e3


def few(configs: list[Config]) -> list[Config]:
    """The first candidates, for a dry run."""
    return configs[:DRY_CANDIDATES]


def make_case(problem: Problem, device: str, toy: bool = False) -> Case:
    """The call that a problem's configurations are verified and timed on; toy: tiny ones."""
    cases: Any = tuning_cases if problem.kernel in ATTENTION_KERNELS else tuning_patch_cases
    return cases.make_case(problem, device, **(cases.TOY if toy else {}))


def tune(
    problems: Sequence[Problem],
    gpu: Gpu,
    make: Callable[[Problem], Case],
    measure: Measure,
    select: Select = list,
    limit: float = float("inf"),
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Searches the problems, and saves each result as soon as it is there.

    Args:
        problems: what to tune, the most important first.
        gpu: the one that is measured.
        make: gives the case of a problem.
        measure: takes a function, returns the milliseconds of a call.
        select: which of a problem's candidates to try, the table's first.
        limit: seconds after which no problem is begun.
        done: called with every result once it is saved.

    Returns:
        The results of the problems that were begun, in their order.

    Raises:
        ValueError: the file of saved configurations is not one of ours; raised before any search.
        OSError: there is no folder to save them in, raised before any search, or none to write to.
    """
    tuning_store.read(gpu.name)
    plans = {problem: select(problem.candidates(gpu)) for problem in problems}
    for problem, configs in plans.items():
        # What serves now, measured here or shipped: what is saved goes before it.
        served = choice(problem, gpu, input_precision(problem.dtype)).config
        if served not in configs:
            configs.append(served)
    results: list[Result] = []
    began = time.monotonic()
    try:
        with progress(sum(map(len, plans.values())), "config") as step:
            for problem, configs in plans.items():
                if time.monotonic() - began >= limit:
                    break
                results.append(search(problem, make, configs, measure, step))
                if (found := entry(results[-1])) is not None:
                    tuning_store.merge(gpu.name, [found])
                done(results[-1])
    finally:
        forget()
    return results


def unavailable(dry_run: bool = False) -> str | None:
    """Why there is nothing to tune here, or to rehearse with, in one line; None if there is."""
    if dry_run:
        if (reason := triton_runtime.import_error()) is not None:
            return reason
        if triton_runtime.interpreted():
            return None
        return (
            "a dry run is run by Triton's interpreter; start it with "
            "TRITON_INTERPRET=1 python -m mmkernels tune --dry-run"
        )
    if torch.cuda.is_available():
        return triton_runtime.why_not(torch.empty(0, device="cuda"))
    built = torch.version.cuda or torch.version.hip
    cause = "torch sees no GPU" if built else "this torch is built without CUDA and ROCm"
    return f"{cause}; run it on the machine whose GPU is to be tuned, or here with --dry-run"


def current_gpu() -> Gpu:
    """The GPU that torch would use."""
    return triton_runtime.gpu_of(torch.empty(0, device="cuda"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's arguments; exits with a message on bad ones."""
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels tune",
        description="Measure tile sizes of the Triton kernels on this GPU and keep the best ones. "
        "MMKERNELS_TUNING=0 makes later processes ignore them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kernels = [kernel for kernel in tuning_plan.KERNELS if kernel != "backward_bias"]
    patches = tuning_patch_cases.PATCH_STEPS
    parser.add_argument("--quick", action="store_true", help="only what is close to the table")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS",
                        help="begin no problem after so long")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="tiny calls in Triton's interpreter; nothing is kept")  # fmt: skip
    parser.add_argument("--kernel", nargs="+", choices=tuning_plan.KERNELS, default=kernels)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64], metavar="D",
                        help="of attention")  # fmt: skip
    parser.add_argument("--patch", type=int, nargs="+", choices=patches, default=[16, 14],
                        help="side of a patch; 16 stands for 8, 32 and frames, too")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=argparse.SUPPRESS,
                        help="default: bfloat16, or float16 in a dry run")  # fmt: skip
    parser.add_argument("--bias", action="store_true", help="attention with a bias, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args(argv)
    for dim in arguments.head_dim:
        if not 1 <= dim <= 256:
            parser.error(f"--head-dim is {dim}; it must lie in [1, 256]")
    if not arguments.limit >= 0:
        parser.error(f"--limit is {arguments.limit}; it must be a number of seconds, 0 or more")
    if "dtype" not in arguments:
        arguments.dtype = ["float16" if arguments.dry_run else "bfloat16"]
    if arguments.dry_run and "bfloat16" in arguments.dtype:
        parser.error("--dtype is bfloat16, which Triton's interpreter multiplies wrongly; "
                     "a dry run takes float16 or float32")  # fmt: skip
    return arguments


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m mmkernels tune`.

    Args:
        argv: its arguments; None: the process's.

    Returns:
        The exit code: 0; 1 if a problem had no right configuration; 2 without a GPU or if the file
        of saved configurations cannot be used; 130 if it was interrupted.
    """
    arguments = parse(argv)
    dry = arguments.dry_run
    if (reason := unavailable(dry)) is not None:
        print(f"mmkernels tune: {reason}", file=sys.stderr)
        return 2
    gpu, device, clock = (DRY_GPU, "cpu", measure_once) if dry else (current_gpu(), "cuda", measure)
    select: Select = list
    if dry or arguments.quick:
        select = few if dry else neighbours
    scope = tuning_plan.Scope(
        tuple(arguments.kernel), tuple(arguments.head_dim), tuple(arguments.patch),
        tuple(DTYPES[name] for name in arguments.dtype), arguments.bias,
    )  # fmt: skip
    with tuning_store.elsewhere() if dry else contextlib.nullcontext():
        problems = tuning_plan.problems(scope, gpu)
        results: list[Result] = []
        interrupted = False
        try:
            tune(
                problems, gpu, lambda p: make_case(p, device, dry), clock, select,
                arguments.limit, results.append,
            )  # fmt: skip
        except KeyboardInterrupt:  # what was found is printed
            interrupted = True
        except (ValueError, OSError) as error:
            print(f"mmkernels tune: {error}", file=sys.stderr)
            return 2
    missed = [problem.key() for problem in problems[len(results) :]]
    if arguments.json:
        print(json.dumps(report(gpu, results, missed, dry), indent=2))
    else:
        lines = [*map(render, results), *(f"{name}: not reached" for name in missed)]
        saved = "a dry run: nothing is saved" if dry else f"saved in {tuning_store.path(gpu.name)}"
        print("\n".join([*lines, saved]))
    if interrupted:
        return 130
    return 0 if all(result.best for result in results) else 1
