"""`make gpu`: what only a GPU can show, unattended, with torch, triton, numpy and pytest alone.

    python -m tools.gpu [step ...]      steps: tests, sanitize; all of them by default

It takes the compiled extension from a wheel in `dist/`, else builds it if nvcc is there, and writes
into the folder that OUT names (default: benchmarks/results/<GPU>): `gpu.json`, anew after every
part, so that what is done is kept if it is cut off, and the output of every part as text.
"""

import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What was never run before goes first, and what the rest builds on before it.
TESTS = (
    "tests/attention/test_gpu.py",
    "tests/patch_embed/test_gpu.py",
    "tests/attention/test_triton_decode.py",
    "tests/integrations/test_torch_flash.py",
)
PART_SECONDS = 400
# compute-sanitizer slows a kernel down a hundredfold. Its tools, and the tests of each file.
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = {
    "tests/attention/test_gpu.py": (
        "real_tiles and none and bfloat16 and (64 or 128) or same_bits and documents and 80"
    ),
    "tests/patch_embed/test_gpu.py": "same_bits",
}


def run(command: list[str], log: Path, seconds: int) -> tuple[int, str]:
    """A command's exit status (124: it took longer) and its output, which `log` holds, too."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=seconds
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    return status, log.read_text(errors="replace")


def counts(output: str) -> dict[str, int]:
    """{"passed": 3, "failed": 1} of pytest's last line."""
    last = output.splitlines()[-1] if output else ""
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)
    return {name: int(number) for number, name in found}


class Report:
    """gpu.json, which grows part by part."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.parts: dict[str, Any] = {"environment": environment()}
        self.write()

    def write(self) -> None:
        """Writes what there is."""
        (self.folder / "gpu.json").write_text(json.dumps(self.parts, indent=1) + "\n")

    def add(self, name: str, command: list[str], seconds: int = PART_SECONDS) -> str:
        """Runs a part; its output."""
        began = time.monotonic()
        status, output = run(command, self.folder / f"{name}.txt", seconds)
        took = round(time.monotonic() - began, 1)
        self.parts[name] = {"command": command, "status": status, "seconds": took}
        if "pytest" in command:
            self.parts[name] |= counts(output)
        self.write()
        return output


def environment() -> dict[str, str]:
    """The GPU, versions and commit."""
    import torch
    import triton

    git = ["git", "describe", "--always", "--dirty"]
    commit = "unknown: git is not on PATH"
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def install(report: Report) -> None:
    """Puts the extension beside the package: from dist/, or built."""
    package = ROOT / "mmkernels"
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    for wheel in reversed(wheels):
        with zipfile.ZipFile(wheel) as archive:
            names = [
                name for name in archive.namelist() if re.fullmatch(r"mmkernels/_C\S*\.so", name)
            ]
            for name in names:
                archive.extract(name, ROOT)
        if names:
            newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
            old = ", OLDER THAN THE SOURCES" if wheel.stat().st_mtime < newest else ""
            report.parts["extension"] = wheel.name + old
            return
    if not list(package.glob("_C*.so")) and shutil.which("nvcc"):
        report.add("build", [sys.executable, "setup.py", "build_ext", "--inplace"])


def tests(report: Report) -> None:
    """The tests that need a GPU, file by file."""
    for path in TESTS:
        name = "tests-" + path.removeprefix("tests/").removesuffix(".py").replace("/", "-")
        command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", path]
        report.add(name, [sys.executable, *command])


def sanitize(report: Report) -> None:
    """compute-sanitizer's checks of some tests."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.parts["sanitize"] = "compute-sanitizer is not on PATH"
        return
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    for check, (path, tests), kernels in itertools.product(
        TOOLS, SANITIZED.items(), ("cuda", "triton")
    ):
        command = [tool, "--tool", check, "--error-exitcode", "9", *pytest, path]
        name = f"sanitize-{check}-{path.split('/')[1]}-{kernels}"
        report.add(name, [*command, "-k", f"({tests}) and {kernels}"])


STEPS = {"tests": tests, "sanitize": sanitize}


def main(steps: list[str]) -> int:
    """Runs the steps and prints a table; 1 if a part failed."""
    if unknown := set(steps) - set(STEPS):
        print(
            f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}", file=sys.stderr
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print("torch sees no GPU: nothing is run", file=sys.stderr)
        return 1
    default = ROOT / "benchmarks" / "results" / torch.cuda.get_device_name().replace(" ", "-")
    report = Report(Path(os.environ.get("OUT") or default))
    install(report)
    for step in steps or STEPS:
        STEPS[step](report)
        report.write()
    bad = 0
    for name, part in report.parts.items():
        if isinstance(part, dict) and "status" in part:
            figures = {key: value for key, value in part.items() if key != "command"}
            bad += part["status"] != 0
            print(f"{name:<44}", *(f"{key} {value}" for key, value in figures.items()))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
