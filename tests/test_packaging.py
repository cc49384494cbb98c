"""The sdist, the wheel built from it, their metadata, and the pinned versions."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmkernels
from tests.distributions import DESCRIPTION, PIP, ROOT, build_sdist, contents, run, sources

EXTRAS = {"triton", "transformers", "models", "train", "serve", "bench", "dev"}

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def build(sdist, tmp_path_factory) -> tuple[Path, str]:
    """A wheel built from the sdist in an environment of its own, without torch; pip's log."""
    folder = tmp_path_factory.mktemp("wheel")
    setuptools = (*PIP, "download", "--no-deps", "--dest", folder / "setuptools", "setuptools>=77")
    if subprocess.run(setuptools, capture_output=True).returncode != 0:
        pytest.skip("pip reaches no index for setuptools, with which isolated builds begin")
    pip = (*PIP, "wheel", "--no-cache-dir", "--no-deps", "--log", folder / "log")
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder, MMKERNELS_BUILD_CUDA="auto")
    (archive,) = folder.glob("mmkernels-*")
    return archive, (folder / "log").read_text()


@pytest.fixture(scope="module")
def wheel(build) -> Path:
    return build[0]


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def tree() -> set[str]:
    """What git tracks, and what it would if asked now."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git, which knows what belongs to the source tree, is not here")
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    return {name for name in listing.split("\0") if name and (ROOT / name).exists()}


# Of the tree, and not in the sdist: what only git reads.
LEFT_OUT = {".gitignore"}
# In the sdist, and not of the tree: what setuptools writes about it.
WRITTEN = r"PKG-INFO|setup\.cfg|mmkernels\.egg-info/[\w.-]+"


def test_sdist_holds_the_tree_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packed = {name for name in found if not re.fullmatch(WRITTEN, name)}
    assert packed == tree() - LEFT_OUT
    assert sources() < packed and tree() > LEFT_OUT


def test_wheel_is_pure_python_and_holds_the_package_only(wheel):
    assert wheel.name == f"mmkernels-{mmkernels.__version__}-py3-none-any.whl"
    assert contents(wheel) == sources() | DESCRIPTION
    assert {"mmkernels/__init__.py", "mmkernels/py.typed"} < sources()


def test_a_build_without_torch_says_why_it_compiles_nothing(build):
    (line,) = set(re.findall(r"mmkernels: extension .*", build[1]))
    assert "not built: torch does not import here" in line
    assert "--no-build-isolation" in line


def test_a_build_without_torch_fails_where_an_extension_is_demanded(build, sdist, tmp_path):
    pip = [*PIP, "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", tmp_path, sdist]
    wanted = {**os.environ, "MMKERNELS_BUILD_CUDA": "1"}
    done = subprocess.run(pip, env=wanted, capture_output=True, text=True)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    assert "mmkernels: extension not built: torch" in done.stderr


def test_twine_finds_no_fault(sdist, wheel, tmp_path):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=tmp_path)


def test_metadata(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("mmkernels", mmkernels.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert (
        metadata.get_payload(decode=True).decode().strip()
        == (ROOT / "README.md").read_text().strip()
    )


def test_classifiers_exist(metadata):
    known = pytest.importorskip("trove_classifiers").classifiers
    assert set(metadata.get_all("Classifier")) <= known


def test_base_dependencies_are_torch_and_numpy(metadata):
    base = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(base) == ["numpy", "torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_extras(metadata):
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS


def test_installed_wheel_imports_and_runs(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # torch comes from this environment, behind the throw-away one.
    code = f"""
import sys
sys.path.append({sysconfig.get_paths()["purelib"]!r})
import torch
import mmkernels as mm
q, k, v = (torch.randn(1, 5, 2, 8) for _ in "qkv")
print(mm.__file__, tuple(mm.attention(q, k, v).shape))
"""
    file, shape = run(python, "-c", code, cwd=tmp_path).strip().split(" ", 1)
    assert Path(file).is_relative_to(tmp_path)
    assert shape == "(1, 5, 2, 8)"


def constraints() -> list[str]:
    """The lines of constraints.txt that are not comments."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_constraints_are_exact():
    inexact = [
        line for line in constraints() if not re.fullmatch(r"[a-z0-9-]+==[\w.]+(; .+)?", line)
    ]
    assert constraints()
    assert inexact == []


def test_constraints_pin_each_name_once_for_every_python():
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        pinned = [
            requirement.name
            for requirement in map(Requirement, constraints())
            if requirement.marker is None or requirement.marker.evaluate(environment)
        ]
        assert len(pinned) == len(set(pinned)), python
        assert {"torch", "triton", "numpy", "transformers", "pytest", "mypy"} <= set(pinned)


def test_constraints_pin_every_dependency(metadata):
    pinned = {Requirement(line).name for line in constraints()}
    wanted = {Requirement(r).name for r in metadata.get_all("Requires-Dist")} - {"mmkernels"}
    assert wanted <= pinned
