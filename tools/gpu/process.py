"""Runs commands: every line of theirs goes to one log at once, and none outlives its time."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Seconds that a process has to say what it did when its time is out.
GRACE = 6


class Done(NamedTuple):
    """A command that has ended.

    Attributes:
        code: its exit status; -9 and the like: ended by a signal.
        timed_out: it took longer than it had.
        seconds: that it took.
        stdout: what it printed there.
    """

    code: int
    timed_out: bool
    seconds: float
    stdout: str


class Runner:
    """Runs commands, from several threads if need be.

    Attributes:
        stopped: `stop` was called: nothing more is begun.
    """

    def __init__(self, log: Path) -> None:
        self.stopped = False
        self._log = log
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[str]] = set()

    def say(self, name: str, line: str) -> None:
        """A line of the log, behind the name of the part that it belongs to."""
        with self._lock, self._log.open("a", encoding="utf-8") as file:
            file.write(f"[{name}] {line.rstrip()}\n")

    def run(
        self, name: str, command: Sequence[str], seconds: float, env: Mapping[str, str]
    ) -> Done:
        """Runs a command in the checkout's root.

        Args:
            name: of the part, for the log.
            command: its words.
            seconds: after which it is interrupted, as by Ctrl-C, and then ended.
            env: variables to set beside those of this process.
        """
        self.say(name, f"$ {' '.join(command)}")
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        with self._lock:
            self._live.add(process)
        if self.stopped:  # `stop` did not yet see this one
            _signal(process, signal.SIGKILL)
        printed: list[str] = []
        readers = [
            threading.Thread(target=self._read, args=(name, process.stdout, printed), daemon=True),
            threading.Thread(target=self._read, args=(name, process.stderr, []), daemon=True),
        ]
        for reader in readers:
            reader.start()
        timed_out = not _ends(process, seconds)
        if timed_out:
            _signal(process, signal.SIGINT)
            _ends(process, GRACE)
        _signal(process, signal.SIGKILL)  # what it has started and left behind, too
        ended = _ends(process, GRACE)  # one that hangs in the driver does not end even so
        for reader in readers:
            reader.join(GRACE)
        with self._lock:
            self._live.discard(process)
        code = process.returncode if ended else -signal.SIGKILL
        return Done(code, timed_out, time.monotonic() - began, "".join(printed))

    def stop(self) -> None:
        """Ends all that runs; what is begun later ends at once. A signal handler may call it."""
        self.stopped = True
        for process in list(self._live):
            _signal(process, signal.SIGKILL)

    def _read(self, name: str, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                self.say(name, line)
                lines.append(line)


def _ends(process: "subprocess.Popen[str]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal(process: "subprocess.Popen[str]", number: int) -> None:
    """To the process and all that it started: each has a session of its own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
