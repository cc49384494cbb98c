"""The suites of `mmkernels.bench` under pytest-benchmark: `pytest benchmarks --suite decode`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mmkernels.bench import clock, environment, measure, roofline, run, suites
from mmkernels.bench.case import Case


class Session:
    """What the cases of a session share: the device, its clock and its ceilings."""

    def __init__(self, quick: bool, command: str) -> None:
        self.quick, self.command = quick, command
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clock = clock.of(self.device)
        self.ceilings = roofline.measure(self.device, quick)

    def measured(self, case: Case) -> dict[str, Any]:
        """The record of a case."""
        turns = clock.QUICK if self.quick else clock.FULL
        return measure.measure(case, self.clock, self.device, turns)


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels")
    group.addoption("--quick", action="store_true", help="few cases; on a CPU of tiny sizes")
    group.addoption("--suite", nargs="+", choices=suites.SUITES, default=list(suites.SUITES))


def pytest_report_header(config: pytest.Config) -> str | None:
    smoke = config.getoption("--quick") and not torch.cuda.is_available()
    return "benchmarks: smoke test, not a result" if smoke else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, quick = (metafunc.config.getoption(option) for option in ("--suite", "--quick"))
    metafunc.parametrize("case", suites.cases(names, device, quick), ids=str)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """Measures the ceilings before the first case."""
    with run.fresh_caches(), run.ieee_float32():
        command = " ".join(("pytest", *pytestconfig.invocation_params.args))
        pytestconfig.stash[SESSION] = Session(pytestconfig.getoption("--quick"), command)
        yield pytestconfig.stash[SESSION]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Puts what the numbers depend on in place of the host's name and more."""
    machine_info.clear()
    if (session := config.stash.get(SESSION, None)) is not None:
        described = environment.describe(session.device, session.quick, session.command)
        machine_info.update(described, ceilings=session.ceilings)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Keeps the commit and whether the tree had changes; drops names of folders and branches."""
    for name in set(commit_info) - {"id", "dirty", "time"}:
        del commit_info[name]
