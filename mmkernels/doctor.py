"""`python -m mmkernels doctor`: what is installed, which backend would run, and why not the others.

The report always prints, also where torch is absent or broken: this module imports nothing but the
standard library, and every probe keeps the text of the exception it met.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmkernels._core.selftest import BackendFact


@dataclass
class Fact:
    """Something about this machine.

    Attributes:
        value: what was found; None if nothing was.
        problem: why nothing was.
        remedy: what the user can do about the problem, if it is one.
    """

    value: str | None = None
    problem: str | None = None
    remedy: str | None = None


@dataclass
class Report:
    """What the doctor found.

    Attributes:
        environment: name -> fact.
        variables: the environment variables MMKERNELS_* that are set.
        samples: dtype and device of a sample call -> operation -> backend -> fact.
        problem: why the operations could not be examined.
    """

    environment: dict[str, Fact]
    variables: dict[str, str]
    samples: dict[str, dict[str, dict[str, "BackendFact"]]] = field(default_factory=dict)
    problem: str | None = None

    def backends(self) -> list["BackendFact"]:
        """All backends of all operations of all samples."""
        operations = (op for sample in self.samples.values() for op in sample.values())
        return [backend for op in operations for backend in op.values()]

    def healthy(self) -> bool:
        """False if mmkernels does not work at all or a self-test failed."""
        return self.problem is None and all(fact.passed is not False for fact in self.backends())


def examine(check: bool = False) -> Report:
    """Looks at this machine.

    Args:
        check: also run every backend on tiny inputs and compare it with the reference.

    Returns:
        The report, whatever is broken: no exception leaves this function.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith("MMKERNELS_")}
    report = Report(
        environment={name: _guarded(probe) for name, probe in PROBES.items()},
        variables=dict(sorted(variables.items())),
    )
    try:
        _import_torch()
        from mmkernels._core import selftest

        report.samples = selftest.examine(check)
    except Exception as error:
        report.problem = _text(error)
    return report


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _guarded(probe: Callable[[], Fact]) -> Fact:
    try:
        return probe()
    except Exception as error:
        return Fact(problem=_text(error))


def _output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()


def _mmkernels() -> Fact:
    import mmkernels

    return Fact(f"{mmkernels.__version__} in {Path(__file__).parent}")


def _python() -> Fact:
    return Fact(f"{platform.python_version()} at {sys.executable}")


def _system() -> Fact:
    return Fact(platform.platform())


def _cpu() -> Fact:
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found[1]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Fact(f"{model}, {usable} cores")


def _import_torch() -> ModuleType:
    """torch, or the exception that its first import raised; a second one fails in other ways."""
    import mmkernels

    if mmkernels.torch_error:
        raise mmkernels.torch_error
    import torch

    return torch


def _torch() -> Fact:
    try:
        torch = _import_torch()
    except ModuleNotFoundError as error:
        return Fact(problem=_text(error), remedy='pip install "torch>=2.11"')
    except Exception as error:
        return Fact(problem=_text(error), remedy="pip install --force-reinstall torch")
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Fact(f"{torch.__version__}, {built_for}")


def _imported(module: str, remedy: str) -> Callable[[], Fact]:
    def probe() -> Fact:
        try:
            return Fact(importlib.import_module(module).__version__)
        except ModuleNotFoundError as error:
            return Fact(problem=_text(error), remedy=remedy)

    return probe


def _installed(distribution: str, remedy: str) -> Callable[[], Fact]:
    def probe() -> Fact:
        try:
            return Fact(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            return Fact(problem="not installed", remedy=remedy)

    return probe


def _gpu() -> Fact:
    torch = _import_torch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        names = (
            f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, capability))})"
            for index in range(torch.cuda.device_count())
            for capability in [torch.cuda.get_device_capability(index)]
        )
        return Fact(", ".join(names))
    if caught:
        return Fact(problem=str(caught[0].message))
    if not torch.version.cuda:
        remedy = "on a machine with a GPU: https://pytorch.org/get-started/locally"
        return Fact(problem="this torch is built without CUDA", remedy=remedy)
    return Fact(problem="torch sees no GPU")


def _driver() -> Fact:
    if not shutil.which("nvidia-smi"):
        return Fact(problem="nvidia-smi is not on PATH")
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Fact(query.splitlines()[0])


def _nvcc() -> Fact:
    path = shutil.which("nvcc")
    if not path:
        return Fact(problem="not on PATH")
    release = re.search(r"release ([\d.]+)", _output(path, "--version"))
    return Fact(f"{release[1]} at {path}" if release else path)


def _extension() -> Fact:
    from mmkernels._core import library

    error = library.load_error()
    return Fact(problem=error) if error else Fact("loaded")


def _tile_sizes() -> Fact:
    """Which tables serve the Triton kernels on each kind of GPU, and what to know of them."""
    torch = _import_torch()
    from mmkernels._core import triton_runtime, tuning_choice, tuning_store

    if not torch.cuda.is_available():
        return Fact(problem="torch sees no GPU to choose them for")
    places = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    gpus = {
        gpu.name: gpu for gpu in (triton_runtime.gpu_of(torch.empty(0, device=x)) for x in places)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the note says the same
        texts = [
            "; ".join(filter(None, (tuning_choice.serving(gpu), tuning_choice.note(gpu))))
            for gpu in gpus.values()
        ]
        tuned = all(tuning_store.load(name).entries for name in gpus)
    value = " | ".join(f"{name}: {text}" for name, text in zip(gpus, texts, strict=True))
    return Fact(value, remedy=None if tuned else "python -m mmkernels tune")


PROBES: dict[str, Callable[[], Fact]] = {
    "mmkernels": _mmkernels,
    "python": _python,
    "system": _system,
    "cpu": _cpu,
    "torch": _torch,
    "numpy": _imported("numpy", "pip install numpy"),
    "triton": _imported("triton", "pip install triton"),
    "transformers": _installed("transformers", "pip install transformers"),
    "timm": _installed("timm", "pip install timm"),
    "gpu": _gpu,
    "driver": _driver,
    "nvcc": _nvcc,
    "extension": _extension,
    "tile sizes": _tile_sizes,
}


def render(report: Report, color: bool = False) -> str:
    """The report as text.

    Args:
        report: what `examine` returned.
        color: mark what works and what does not with terminal colours.
    """
    green, red, dim, plain = ("\033[32m", "\033[31m", "\033[2m", "\033[0m") if color else [""] * 4

    def remedy(fact: "Fact | BackendFact") -> str:
        return f"  {dim}fix:{plain} {fact.remedy}" if fact.remedy else ""

    lines = ["environment"]
    width = max(map(len, report.environment))
    for name, fact in report.environment.items():
        text = fact.value if fact.value is not None else f"{dim}{fact.problem}{plain}"
        lines.append(f"  {name:<{width}}  {text}{remedy(fact)}")
    lines += ["", "environment variables"]
    lines += [f"  {name}={value}" for name, value in report.variables.items()]
    if not report.variables:
        lines.append(f"  {dim}no MMKERNELS_* is set{plain}")
    for sample, operations in report.samples.items():
        lines += ["", f"operations, {sample}"]
        for op, backends in operations.items():
            lines.append(f"  {op}")
            for name, backend in backends.items():
                state = "chosen" if backend.chosen else "available"
                text = f"{green}{state:<9}{plain}" if backend.available else str(backend.problem)
                if backend.passed is not None:
                    mark = f"{green}passed{plain}" if backend.passed else f"{red}FAILED{plain}"
                    text += f"  {mark}: {backend.detail}"
                lines.append(f"    {name:<9}  {text}{remedy(backend)}")
    if report.problem:
        lines += ["", f"{red}mmkernels cannot run: {report.problem}{plain}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m mmkernels doctor`.

    Args:
        argv: its arguments; None: the process's.

    Returns:
        The exit code: with --check 1 if something does not work, otherwise 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels doctor",
        description="What is installed, which backend would run, and why not the others.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every backend and compare it with the reference; exit code 1 if one fails",
    )
    arguments = parser.parse_args(argv)
    report = examine(arguments.check)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(render(report, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return 1 if arguments.check and not report.healthy() else 0
