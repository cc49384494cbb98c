"""The command: `python -m tools.gpu [step ...]`; the variables OUT and DRY_RUN=1."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.gpu import install, page, plan, profile, testing, verbs
from tools.gpu.process import ROOT, Runner
from tools.gpu.record import Record
from tools.gpu.run import Run

Step = Callable[[Run, float], None]
STEPS: dict[str, Step] = {
    "install": install.install,
    "doctor": verbs.doctor,
    "tests": testing.tests,
    "tune": verbs.tune,
    "bench": verbs.bench,
    "profile": profile.profile,
    "sanitize": testing.sanitize,
}


def execute(run: Run, names: Sequence[str], budget: plan.Budget, steps: Mapping[str, Step]) -> None:
    """Runs steps, each as long as it may; what one of them raises is kept, and ends that one."""
    for name in names:
        if run.runner.stopped or not (seconds := budget.allowed(name)):
            reason = "the run was ended" if run.runner.stopped else "the time was used up"
            run.instead(name, "not reached", reason)
            continue
        try:
            steps[name](run, seconds)
        except Exception as error:
            run.runner.say(name, traceback.format_exc())
            run.instead(name, "failed", f"{type(error).__name__}: {error}")
    run.record.put(finished=not run.runner.stopped)


def main(words: Sequence[str], variables: Mapping[str, str] = os.environ) -> int:
    """Runs the steps and prints a table.

    Args:
        words: the steps; none: all.
        variables: of the environment.

    Returns:
        The exit code: 0; 1 if a part failed or took too long, or there is no GPU; 2 for a step or
        a value of DRY_RUN that there is not, or an OUT that is no folder; 130 if it was ended from
        outside.
    """
    dry_run = variables.get("DRY_RUN") or "0"
    try:
        names = plan.chosen(words)
        if dry_run not in ("0", "1"):
            raise ValueError(f"DRY_RUN is {dry_run}; it must be 1, or 0 as without it")
    except ValueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    dry = dry_run == "1"
    import torch

    if not dry and not torch.cuda.is_available():
        print(
            "make gpu: torch sees no GPU: nothing is run; DRY_RUN=1 tries the plan on the CPU",
            file=sys.stderr,
        )
        return 1
    from mmkernels.bench import environment

    device = torch.device("cpu" if dry else "cuda")
    slug = environment.device_name(device).replace(" ", "-")
    default = ROOT / "build" / "dry-run" if dry else ROOT / "benchmarks" / "results" / slug
    budget = plan.Budget(names, dry)
    command = " ".join(("make gpu", *(["DRY_RUN=1"] if dry else []), *words))
    facts = {
        "dry_run": dry,
        "steps": names,
        "total_seconds": budget.total,
        "environment": environment.describe(device, True, command),
    }
    try:
        record = Record(Path(variables.get("OUT") or default), facts)
    except OSError as error:
        print(f"make gpu: OUT must be a folder that can be written to: {error}", file=sys.stderr)
        return 2
    run = Run(record, Runner(record.folder / "gpu.log"), dry)
    run.runner.say("run", f"{facts['environment']['date']}: {command}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: run.runner.stop())
    execute(run, names, budget, STEPS)
    print(page.table(record.data["parts"]))
    if lines := page.limiters(record.data):
        print("", *lines, sep="\n")
    print(f"written: gpu.json, gpu.md and gpu.log in {record.folder}")
    if run.runner.stopped:
        return 130
    return int(any(part["status"] in ("failed", "timed out") for part in record.data["parts"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
