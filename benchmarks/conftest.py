"""pytest-benchmark, set up: `--quick`, and the environment in the JSON."""

import pytest

from benchmarks import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: a smoke test, not a result")


def pytest_configure(config: pytest.Config) -> None:
    """Silences pytest-benchmark's own table, which knows nothing of peers; -v brings it back."""
    config.option.benchmark_quiet = True


def pytest_report_header(config: pytest.Config) -> str | None:
    return "benchmarks: smoke, not a result" if config.getoption("--quick") else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Puts what the numbers depend on in place of the host's name and more."""
    quick = config.getoption("--quick")
    machine_info.clear()
    machine_info.update(environment.describe(config.invocation_params.args, quick))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Keeps the commit and whether the tree had changes; drops names of folders and branches."""
    for name in set(commit_info) - {"id", "dirty", "time"}:
        del commit_info[name]


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether this is a smoke test."""
    return pytestconfig.getoption("--quick")
