"""What every step is given, and the commands that it runs by it."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.gpu.process import Done, Runner
from tools.gpu.record import Record

# Where tools of CUDA lie that are not on PATH.
CUDA_TOOLS = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Run:
    """A run of the plan.

    Attributes:
        record: takes what is found.
        runner: runs commands.
        dry: there is no GPU; the CPU and Triton's interpreter stand in.
    """

    record: Record
    runner: Runner
    dry: bool

    def python(
        self,
        step: str,
        name: str,
        words: Sequence[str],
        seconds: float,
        launcher: Sequence[str] = (),
    ) -> Done:
        """Runs `python words...` as a part of a step, perhaps under a launcher such as ncu."""
        part = self.begin(step, name, words, launcher)
        done = self.again(part, words, seconds, launcher)
        self.end(part, done)
        return done

    def begin(
        self, step: str, name: str, words: Sequence[str], launcher: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A part of a step that begins."""
        return self.record.begin(step, name, command=shlex.join((*launcher, "python", *words)))

    def again(
        self,
        part: dict[str, Any],
        words: Sequence[str],
        seconds: float,
        launcher: Sequence[str] = (),
    ) -> Done:
        """Runs the command of a part that has begun."""
        # Other people's pytest plugins warn, and warnings are errors.
        variables = {"TRITON_INTERPRET": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        if "memcheck" in launcher:  # it sees no access past a tensor inside a larger, cached block
            variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if self.dry:  # at toy size threads only wait for each other
            variables |= {
                "TRITON_INTERPRET": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
        command = (*launcher, sys.executable, *words)
        return self.runner.run(part["name"], command, seconds, variables)

    def end(self, part: dict[str, Any], done: Done, **facts: Any) -> None:
        """Keeps how a part has ended, by its exit code or, among the facts, its `status`."""
        status = facts.pop("status", "passed" if done.code == 0 else "failed")
        if done.timed_out:
            status = "timed out"
        if self.runner.stopped:
            status = "cut off"
        facts |= {"exit_code": done.code, "seconds": round(done.seconds, 1)}
        self.record.end(part, status, **facts)

    def instead(self, step: str, status: str, reason: str) -> None:
        """Keeps why a step does not run: its status is "not possible", or "not reached"."""
        self.record.end(self.record.begin(step, step), status, reason=reason)


def tool(name: str) -> str | None:
    """Where a program is, if it is there."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{CUDA_TOOLS}")


def limit(seconds: float) -> str:
    """Of the seconds that a command has, those in which it may begin something new."""
    return str(int(max(seconds - 25, seconds / 2)))


def parsed(text: str) -> dict[str, Any]:
    """A JSON object, or the reason why the text is none under "problem"."""
    try:
        found = json.loads(text)
    except ValueError as error:
        return {"problem": f"no JSON: {error}"}
    return found if isinstance(found, dict) else {"problem": "not a JSON object"}
