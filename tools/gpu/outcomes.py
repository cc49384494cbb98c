"""A pytest plugin for kernels that were never run: what every test did, kept as it happens.

    pytest -p tools.gpu.outcomes --outcomes FILE [--test-seconds N]

A kernel may hang, or write where it must not; then the process, or its GPU context, is lost, and
with it every later test. So FILE gets a line of JSON when a test begins and one when it ends, a
test that takes too long ends the process, a lost context ends the session, and tests that are in
FILE already are not run again: the same command, run again, goes on behind the culprit.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Taken before pytest captures what is written to it.
_STDERR = os.dup(2)
MESSAGE_LINES = 12


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the plugin."""
    parser.addoption("--outcomes", type=Path, required=True, help="the file of outcomes")
    parser.addoption("--test-seconds", type=float, help="longest time of a test")


def pytest_configure(config: pytest.Config) -> None:
    """Begins to watch."""
    config.pluginmanager.register(Outcomes(config))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of outcomes; a last line that was cut off is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def add(path: Path, **line: object) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def context_is_lost() -> str | None:
    """Why no later call on the GPU can succeed in this process; None: they can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class Outcomes:
    """Writes the lines."""

    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("--outcomes")
        self._seconds: float | None = config.getoption("--test-seconds")
        self._done = {line["test"] for line in read(self._path)}
        self._lost: str | None = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is an error of its own."""
        if report.failed:
            message = _tail(report.longreprtext)
            add(self._path, test=report.nodeid, outcome="error", message=message)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves out what an earlier run has done."""
        items[:] = [item for item in items if item.nodeid not in self._done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """The watch over one test."""
        add(self._path, test=item.nodeid, outcome="begun")
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._lost is not None:
                item.session.shouldstop = f"the GPU context is lost: {self._lost}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line a test, and one more if taking it down fails."""
        if report.when == "call" or report.outcome != "passed":
            wrong = report.outcome == "failed" and report.when != "call"
            line: dict[str, object] = {"test": report.nodeid, "seconds": round(report.duration, 2)}
            line["outcome"] = "error" if wrong else report.outcome
            if report.failed:
                line["message"] = _tail(report.longreprtext)
                self._lost = self._lost or context_is_lost()
                line |= {"lost": self._lost} if self._lost else {}
            elif report.skipped and isinstance(report.longrepr, tuple):
                line["message"] = report.longrepr[2].removeprefix("Skipped: ")
            add(self._path, **line)


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-MESSAGE_LINES:])
