"""The first step: the compiled extension beside the package."""

import os
import platform
import re
import zipfile
from pathlib import Path

from tools.gpu.process import ROOT
from tools.gpu.run import Run, tool


def install(run: Run, seconds: float) -> None:
    """Takes the extension from dist/, else as it lies there, else builds it if nvcc is there."""
    found = _from_wheel() or _there()
    if found is None and run.dry:
        found = "none; a dry run builds none"
    if found is None and tool("nvcc") is None:
        found = "none: no wheel in dist/ holds it, and nvcc is not on PATH"
    if found is None:
        done = run.python("install", "build", ("setup.py", "build_ext", "--inplace"), seconds)
        found = "built" if done.code == 0 and _there() else "none: it was not built"
    run.record.put(extension=found)


def _from_wheel() -> str | None:
    """From the newest wheel for this machine, unless what lies beside the package is newer."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    for wheel in reversed(wheels):
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"mmkernels/_C\S*\.so", n)]
            if not names or not wheel.stem.endswith(platform.machine()):
                continue
            made = wheel.stat().st_mtime
            if any(path.stat().st_mtime > made for path in ROOT.glob("mmkernels/_C*.so")):
                return None
            for name in names:
                os.utime(archive.extract(name, ROOT), (made, made))
        return wheel.name + _age(wheel)
    return None


def _there() -> str | None:
    found = sorted(ROOT.glob("mmkernels/_C*.so"))
    return f"{found[0].name}, which was there{_age(found[0])}" if found else None


def _age(path: Path) -> str:
    newest = max(source.stat().st_mtime for source in (ROOT / "csrc").rglob("*.*"))
    return ", OLDER THAN THE SOURCES" if path.stat().st_mtime < newest else ""
