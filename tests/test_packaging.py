"""The sdist, the wheel built from it, their metadata, and the pinned versions."""

import email
import os
import re
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmkernels
from tests.distributions import PIP, ROOT, build_sdist, run

EXTRAS = {"triton", "transformers", "models", "serve", "bench", "dev"}

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


def sources() -> set[str]:
    """The package's files in the source tree, relative to it."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mmkernels").rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }


def test_sdist_holds_what_a_developer_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() <= names
    compiled = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {Path(name).suffix for name in compiled} == {".cpp", ".cu", ".cuh", ".h"}
    assert compiled | {"setup.py"} <= names
    assert {"LICENSE", "Makefile", "constraints.txt", "tests/test_packaging.py"} <= names


def test_wheel_is_pure_python_and_holds_the_package_only(wheel):
    assert wheel.name == f"mmkernels-{mmkernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "mmkernels/py.typed" in names
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == sources()


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
