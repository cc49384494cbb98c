"""Builds distributions of the source tree in copies of it, so that nothing is left there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mmkernels

ROOT = Path(mmkernels.__file__).parent.parent
PIP = (sys.executable, "-m", "pip")


def run(*command: object, cwd: Path, **variables: str) -> str:
    """The command's output; on failure all that it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_sdist(folder: Path) -> Path:
    """The sdist, in a new folder."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = (tree / "dist").iterdir()
    return archive


def sources() -> set[str]:
    """The package's files in the source tree, relative to it, without what is built or cached."""
    files = (path for path in (ROOT / "mmkernels").rglob("*") if path.is_file())
    kept = (path for path in files if path.suffix not in (".pyc", ".so"))
    return {str(path.relative_to(ROOT)) for path in kept}


def contents(wheel: Path) -> set[str]:
    """The names of a wheel's files; those that describe it without the name of their folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {re.sub(r"^mmkernels-[^/]+\.dist-info/", "", name) for name in archive.namelist()}


DESCRIPTION = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
