"""The search of `python -m mmkernels tune`: every configuration verified, then timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmkernels._core import tuning_choice
from mmkernels._core.tuning_choice import Config, Problem

Measure = Callable[[Callable[[], object]], float]
# The table's configuration stays unless another is this much faster: timings repeat no better.
WORTHWHILE = 0.98


@dataclass(frozen=True)
class Case:
    """A problem and what can be done with it.

    Attributes:
        problem: whose kernel is run.
        verify: runs the kernel on a small input; raises unless the results obey the error rule.
        run: runs it on a large one.
    """

    problem: Problem
    verify: Callable[[], None]
    run: Callable[[], object]


class Trial(NamedTuple):
    """One configuration tried: its time, or why it cannot win."""

    config: Config
    milliseconds: float | None
    problem: str | None


class Result(NamedTuple):
    """What the search found for one problem.

    Attributes:
        problem: the problem.
        trials: every configuration tried, the table's first.
        best: the one that wins; None if none was right.
    """

    problem: Problem
    trials: list[Trial]
    best: Trial | None


def attempt(case: Case, config: Config, measure: Measure) -> Trial:
    """Verifies a configuration, then times it."""
    try:
        with tuning_choice.override(case.problem.kernel, config) as asked:
            case.verify()
            if not asked.used:
                raise RuntimeError(f"the {case.problem.kernel} kernel did not run")
            return Trial(config, measure(case.run), None)
    except Exception as error:  # any failure of a kernel: kept, shown, and the search goes on
        return Trial(config, None, _reason(error))


def search(
    problem: Problem,
    make: Callable[[Problem], Case],
    configs: Sequence[Config],
    measure: Measure,
    step: Callable[[str], None],
) -> Result:
    """Tries configurations, the table's first.

    Args:
        problem: whose kernel is tuned.
        make: gives the problem's case; where it fails, all configurations have failed.
        configs: what to try.
        measure: takes a function, returns the milliseconds of a call.
        step: called with the problem's name after every configuration.
    """
    name, trials = problem.key(), []
    try:
        case = make(problem)
    except Exception as error:
        return Result(problem, [Trial(config, None, _reason(error)) for config in configs], None)
    for config in configs:
        trials.append(attempt(case, config, measure))
        step(name)
    best = min(trials, key=_time)
    if _time(best) > WORTHWHILE * _time(trials[0]):
        best = trials[0]
    return Result(problem, trials, None if best.milliseconds is None else best)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _time(trial: Trial) -> float:
    return float("inf") if trial.milliseconds is None else trial.milliseconds


def neighbours(configs: Sequence[Config]) -> list[Config]:
    """The first configuration and those that differ from it in one field."""
    first = configs[0]
    return [c for c in configs if sum(a != b for a, b in zip(c, first, strict=True)) <= 1]
