"""setup.py: what it builds, for which GPUs, and that every refusal is one line with its reason.

It runs in this process, in front of a setup() that only notes what it is given.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import mmkernels

ROOT = Path(mmkernels.__file__).parent.parent

setuptools = pytest.importorskip("setuptools", minversion="77")

if not (ROOT / "setup.py").exists():
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


def toolkit(folder: Path, answer: str) -> str:
    """A CUDA_HOME whose nvcc knows one answer."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{answer}'\n")
    nvcc.chmod(0o755)
    return str(folder)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """One that has all it takes to build."""
    for name in ("CUDA_HOME", "MAX_JOBS", "PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that setup.py's are taken back
    for name in ("MMKERNELS_BUILD_CUDA", "MMKERNELS_INSTANCES", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path / "cuda", "release 13.0, V13.0.88"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/bin/{name}")
    return monkeypatch


@pytest.fixture
def plan(machine, capfd):
    """Runs setup.py, or another tree's; returns the line that it printed and the extension."""

    def run(tree: Path = ROOT) -> tuple[str, Any]:
        given: dict[str, Any] = {}
        machine.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(tree / "setup.py"))
        (line,) = capfd.readouterr().err.splitlines()
        return line, next(iter(given["ext_modules"]), None)

    return run


def broken_torch(machine: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "torch.py").write_text("raise ImportError('a file\\n\\nis missing')")
    machine.delitem(sys.modules, "torch")
    machine.syspath_prepend(folder)


REFUSALS = {
    "it is built on Linux only, and this is darwin": (
        lambda machine, _: machine.setattr(sys, "platform", "darwin")
    ),
    "torch does not import here (a file is missing); install it and use --no-build-isolation": (
        broken_torch
    ),
    "torch is 2.10.1+cu128; 2.11 or newer is needed": (
        lambda machine, _: machine.setattr(torch, "__version__", "2.10.1+cu128")
    ),
    "ninja is not installed; pip install ninja": (
        lambda machine, _: machine.setattr(shutil, "which", lambda name, **_: None)
    ),
    "nvcc was not found; install the CUDA toolkit or set CUDA_HOME": (
        lambda machine, _: machine.setenv("CUDA_HOME", "/nowhere")
    ),
    "nvcc is of CUDA unknown; 12.5 or newer is needed": (
        lambda machine, path: machine.setenv("CUDA_HOME", toolkit(path / "broken", "error"))
    ),
    "nvcc is of CUDA 12.4; 12.5 or newer is needed": (
        lambda machine, path: machine.setenv("CUDA_HOME", toolkit(path / "old", "release 12.4, V"))
    ),
    "nvcc is of CUDA 12.9, torch of CUDA 13.0; set CUDA_HOME to the latter": (
        lambda machine, path: machine.setenv("CUDA_HOME", toolkit(path / "12", "release 12.9, V"))
    ),
    "TORCH_CUDA_ARCH_LIST=7.0 7.5+PTX names no GPU from 8.0 on": (
        lambda machine, _: machine.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX")
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_every_refusal_to_build_is_one_line_with_its_reason(reason, machine, plan, tmp_path):
    REFUSALS[reason](machine, tmp_path)
    line, extension = plan()
    assert line.startswith("mmkernels: extension not built: ") and reason in line
    assert extension is None

    machine.setenv("MMKERNELS_BUILD_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        plan()
    (line,) = str(error.value).splitlines()
    assert "MMKERNELS_BUILD_CUDA=1" in line and reason in line


def test_nothing_is_built_or_looked_for_where_that_is_wished(machine, plan):
    machine.setenv("MMKERNELS_BUILD_CUDA", "0")
    machine.setitem(sys.modules, "torch", None)
    assert plan() == ("mmkernels: extension not built: MMKERNELS_BUILD_CUDA=0", None)


@pytest.mark.parametrize(
    ("name", "known"), [("MMKERNELS_BUILD_CUDA", "auto, 0, 1"), ("MMKERNELS_INSTANCES", "all, ci")]
)
def test_a_wrong_choice_is_refused(name, known, machine, plan):
    machine.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name}=yes is not one of {known}"):
        plan()


@pytest.mark.parametrize(
    ("wanted", "compiled"),
    [
        (None, "8.0+PTX 9.0a"),
        ("", "8.0+PTX 9.0a"),
        ("8.0;9.0", "8.0 9.0a"),
        ("8.6 9.0+PTX", "8.6 9.0a 8.0+PTX"),
        ("7.0;7.5;8.6;9.0a;10.0+PTX", "8.6 9.0a 10.0+PTX"),
        ("Ampere", "Ampere"),
    ],
)
def test_gpus_to_compile_for(wanted, compiled, machine, plan):
    """And torch, which makes flags for nvcc of the list, takes it."""
    if wanted is not None:
        machine.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    line, _ = plan()
    assert line.startswith(f"mmkernels: extension built for {compiled}")
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    for name in compiled.replace("Ampere", "8.0 8.6+PTX").split():
        number = name.removesuffix("+PTX").replace(".", "")
        assert f"code=sm_{number}" in flags
        assert (f"code=compute_{number}" in flags) == name.endswith("+PTX")


def compiled(extension: Any) -> set[str]:
    return {Path(source).stem for source in extension.sources if source.endswith(".cu")}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree with one kernel more, for Hopper."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "csrc" / "attention" / "hopper_test_64_bf16.cu").touch()
    return tree


@pytest.mark.parametrize(
    ("wanted", "hopper"),
    [("8.0+PTX;9.0a", True), ("9.0", True), ("8.0;9.0+PTX", True), ("8.0;10.0", False)],
)
def test_hopper_kernels_are_built_for_9_0a_only(wanted, hopper, machine, plan, tree):
    machine.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    line, extension = plan(tree)
    assert ("hopper_test_64_bf16" in compiled(extension)) == hopper
    left_out = ", without the Hopper kernels: TORCH_CUDA_ARCH_LIST does not name 9.0a"
    assert line.endswith(left_out) == (not hopper)
    everything = {path.stem for path in (tree / "csrc").glob("*/*.cu")}
    assert {name for name in everything if not name.startswith("hopper_")} <= compiled(extension)


def test_ci_builds_one_dtype_and_the_common_sizes(machine, plan):
    everything = compiled(plan()[1])
    assert everything == {path.stem for path in (ROOT / "csrc").glob("*/*.cu")}
    machine.setenv("MMKERNELS_INSTANCES", "ci")
    few = compiled(plan()[1])
    assert few < everything and "forward_64_bf16" in few
    assert not [name for name in few if "fp16" in name or "_80_" in name]
