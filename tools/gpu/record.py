"""What a run has found so far: gpu.json and gpu.md, complete on disk after every part."""

import datetime
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.gpu import page
from tools.gpu.process import ROOT


class Record:
    """The data of gpu.json, from which the page is made.

    Attributes:
        folder: where the files lie.
        data: "dry_run", "steps", "environment", "extension", "parts" and, under the names of their
            steps, what doctor, tune, bench and profile have found.
    """

    def __init__(self, folder: Path, data: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        _set_aside(self.folder)
        self._names = {str(self.folder): "OUT", str(ROOT): ".", str(Path.home()): "~"}
        self._names[tempfile.gettempdir()] = "TMP"
        self._names.pop("/", None)  # a home that is no folder of its own, as in some containers
        self.data: dict[str, Any] = {**data, "parts": [], "finished": False}
        self._lock = threading.RLock()
        self.write()

    def begin(self, step: str, name: str, **facts: Any) -> dict[str, Any]:
        """A part that begins; returns it, "running" until `end`."""
        part = {"step": step, "name": name, "status": "running", **facts}
        with self._lock:
            self.data["parts"].append(part)
            self.write()
        return part

    def end(self, part: dict[str, Any], status: str, **facts: Any) -> None:
        """A part that has ended; prints a line, for a run takes minutes.

        Args:
            part: that `begin` returned.
            status: "passed", "failed", "timed out", "cut off", "skipped", "not reached" or "not
                possible".
            facts: what else is to be known.
        """
        with self._lock:
            part |= {"status": status, **facts}
            self.write()
            print(page.table([part]), flush=True)

    def put(self, **facts: Any) -> None:
        """Keeps facts beside the parts."""
        with self._lock:
            self.data |= facts
            self.write()

    def write(self) -> None:
        """Writes both files; a reader, or a run that is cut off, never finds half of one."""
        with self._lock:
            data = self.anonymous(self.data)
            _replace(self.folder / "gpu.json", json.dumps(data, indent=1) + "\n")
            _replace(self.folder / "gpu.md", self.anonymous(page.render(data)))

    def anonymous(self, data: Any) -> Any:
        """The data without this machine's folders: OUT, ".", "~" and TMP stand for them."""
        if isinstance(data, dict):
            return {key: self.anonymous(value) for key, value in data.items()}
        if isinstance(data, list):
            return [self.anonymous(value) for value in data]
        if isinstance(data, str):
            for folder, name in self._names.items():
                data = data.replace(folder, name)
        return data


def _set_aside(folder: Path) -> None:
    """Moves what an earlier run left into a folder of its own, named by its time."""
    left = [path for pattern in ("gpu.*", "bench[.-]*") for path in folder.glob(pattern)]
    if left:
        time = datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in left))
        aside = folder / f"earlier-{time:%Y-%m-%dT%H-%M-%S}"
        aside.mkdir(exist_ok=True)
        for path in left:
            path.rename(aside / path.name)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
