"""`make bench-check`: has a kernel or a call become slower than the committed baselines say?

    python -m tools.bench_check [counters] [ratios] [--accept]      both parts by default

counters: what the kernels execute in an emulator, compared exactly (`tools/counters.py`).
ratios: mmkernels beside a robust peer on this CPU, within a band of noise (`tools/ratios.py`).

Exit status: 0 what could be compared is as good; 1 something is not; 2 nothing could be compared.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mmkernels._core.progress import progress
from mmkernels.bench import run
from tools import counters, ratios
from tools.generated import ROOT, table

BASELINES = ROOT / "benchmarks" / "baselines"
GOOD, WORSE, NOT_COMPARED = 0, 1, 2
ACCEPT = "make bench-check ACCEPT=1 rewrites the baseline"
MEANT = f"If this is meant, {ACCEPT}; the commit says why."


class Outcome(NamedTuple):
    """What a check found: lines for the terminal, and one of the exit statuses."""

    text: str
    status: int


def load(path: Path) -> dict[str, Any]:
    """A file of baselines; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def differences(old: counters.Baseline, new: counters.Baseline) -> list[list[str]]:
    """Case, kernel, counter, old and new value, wherever these differ or one is not there."""
    return [
        [case, kernel, counter, *("–" if n is None else f"{n:,}" for n in values)]
        for case in old | new
        for kernel in old.get(case, {}) | new.get(case, {})
        for counter in counters.COUNTERS.values()
        for values in [[x.get(case, {}).get(kernel, {}).get(counter) for x in (old, new)]]
        if values[0] != values[1]
    ]


def check_counters(part: str, accept: bool, folder: Path) -> Outcome:
    """The kernels of one compiler; with `accept` what is counted becomes the baseline."""
    path, title = folder / "counters.json", f"counters, {part}"
    if (reason := counters.missing(part)) is not None:
        return Outcome(f"{title}: not compared: {reason}", NOT_COMPARED)
    here, kept = counters.PARTS[part].compiler(), load(path).get(part)
    comparable = kept is not None and kept["compiler"] == here
    if not (comparable or accept):
        counted = kept["compiler"] if kept else "no compiler yet"
        return Outcome(f"{title}: counted with {counted}, here {here}: not compared", NOT_COMPARED)
    with progress(len(counters.PARTS[part].cases), "case") as step:
        new = counters.counted_all(part, step)
    rows = differences(kept["cases"], new) if kept else []
    lines = [f"{title}: {len(new)} cases, {here}: {len(rows) or 'no'} differences"]
    if rows:
        lines.append(table(["case", "kernel", "counter", "baseline", "here"], rows))
    if accept:
        run.write(path, load(path) | {part: {"compiler": here, "cases": new}})
        lines.append(f"written to {path}")
    elif rows:
        lines.append(MEANT)
    return Outcome("\n".join(lines), WORSE if rows and not accept else GOOD)


def check_ratios(accept: bool, folder: Path) -> Outcome:
    """The cases that are watched; with `accept` repeated runs become this machine's baseline."""
    path, (machine, environment) = folder / "ratios.json", ratios.machine()
    baselines = load(path)
    if accept:
        cases = ratios.watched()
        with progress(ratios.RUNS * len(cases), "case") as step:
            made = ratios.recorded(cases, step)
        entry = {"environment": environment, "cases": ratios.saved(made)}
        rows = [[name, one.peer, *_figures(one)] for name, one in made.items()]
        lines = table(["case", "peer", "ratio", "band"], rows)
        if any(one.band > ratios.MOST_BAND for one in made.values()):
            why = f"a band is above ± {ratios.MOST_BAND:.0%}: record on a machine that does less"
            return Outcome(f"ratios: {machine}\n{lines}\nnot written: {why}", WORSE)
        run.write(path, baselines | {machine: entry})
        return Outcome(f"ratios: {machine}\n{lines}\nwritten to {path}", GOOD)
    recorded = {key: kept["environment"]["torch"] for key, kept in baselines.items()}
    if recorded.get(machine) != environment["torch"]:
        known = "; ".join(f"{key}, torch {version}" for key, version in recorded.items())
        return Outcome(
            f"ratios: not compared: here is {machine}, torch {environment['torch']}; the baseline "
            f"is of {known or 'no machine yet'}; {ACCEPT}",
            NOT_COMPARED,
        )
    kept = ratios.loaded(baselines[machine]["cases"])
    if {name: one.peer for name, one in kept.items()} != ratios.WATCHED:
        return Outcome(f"ratios: the baseline is of other cases; {ACCEPT}", WORSE)
    cases = ratios.watched()
    with progress(len(cases), "case") as step:
        best = ratios.best_of_tries(cases, kept, step)
    rows = [
        [name, one.peer, *_figures(one), f"{best[name]:.2f}", verdict(best[name], one)]
        for name, one in kept.items()
    ]
    lines = [
        f"ratios: {len(rows)} cases, above 1 mmkernels is faster than the peer; {machine}",
        table(["case", "peer", "baseline", "band", "here", ""], rows),
    ]
    if slower := any(best[name] < one.floor for name, one in kept.items()):
        lines.append(MEANT)
    return Outcome("\n".join(lines), WORSE if slower else GOOD)


def _figures(one: ratios.Baseline) -> list[str]:
    return [f"{one.ratio:.2f}", f"± {one.band:.0%}"]


def verdict(ratio: float, one: ratios.Baseline) -> str:
    """A ratio beside its baseline, in words."""
    if ratio < one.floor:
        return f"SLOWER in {ratios.TRIES} of {ratios.TRIES} tries"
    return "faster than the baseline: ACCEPT=1 to keep" if ratio > one.ceiling else "as before"


def _counters_of(part: str) -> Callable[[bool, Path], Outcome]:
    return lambda accept, folder: check_counters(part, accept, folder)


CHECKS: dict[str, list[Callable[[bool, Path], Outcome]]] = {
    "counters": [_counters_of(part) for part in counters.PARTS],
    "ratios": [check_ratios],
}


def main(argv: list[str] | None = None, folder: Path = BASELINES) -> int:
    """Prints what each check found; the exit status.

    Args:
        argv: the arguments; None: the process's.
        folder: of the baselines.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.bench_check", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="counters, ratios; default: both")
    parser.add_argument("--accept", action="store_true", help="rewrite the baselines")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(CHECKS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    statuses = set()
    for part in arguments.parts or CHECKS:
        for check in CHECKS[part]:
            try:
                outcome = check(arguments.accept, folder)
            except Exception as error:  # shown, and the other checks still run
                outcome = Outcome(f"{part}: {type(error).__name__}: {error}", WORSE)
            print(outcome.text, flush=True)
            statuses.add(outcome.status)
    return WORSE if WORSE in statuses else min(statuses)


if __name__ == "__main__":
    raise SystemExit(main())
