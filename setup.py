"""Builds the compiled extension `mmkernels/_C.so` where that is possible; metadata: pyproject.toml.

It keeps to LibTorch's stable ABI and holds no Python: one file for every Python and every torch
from TARGET on, built for CUDA or not. README, "Install", has the environment variables;
MMKERNELS_INSTANCES=ci is for tests: the common sizes in bfloat16.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

TARGET = (2, 11)  # oldest torch that the extension loads into
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = "8.0+PTX;9.0a"
# Beside code for 9.0 and 9.0a the driver would choose what runs; PTX of 9.0a runs on nothing else.
MEANING = {"9.0": ["9.0a"], "9.0+PTX": ["9.0a", "8.0+PTX"]}
CSRC = Path(__file__).parent / "csrc"


def version(text: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def cuda_home() -> str:
    """The CUDA toolkit, if it is there; nvcc on PATH may be a script that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    if not Path("/usr/local/cuda/bin/nvcc").exists() and shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
        lines = subprocess.run(command, capture_output=True, text=True).stderr
        if found := re.search(r"^#\$ TOP=(.+)$", lines, re.M):
            return str(Path(found[1]).resolve())
    return "/usr/local/cuda"


def architectures() -> list[str]:
    """What to compile for, in torch's spelling."""
    named = re.split("[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    usable = (name for name in named if not name[:1].isdigit() or version(name) >= (8, 0))
    return [meant for name in usable for meant in MEANING.get(name, [name])]


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    try:
        import torch
    except Exception as error:
        text = f"torch does not import here ({error}); install it and use --no-build-isolation"
        return " ".join(text.split())
    if version(torch.__version__) < TARGET:
        return f"torch is {torch.__version__}; 2.11 or newer is needed"
    if not any(shutil.which("ninja", path=path) for path in (None, Path(sys.executable).parent)):
        return "ninja is not installed; pip install ninja"
    home = cuda_home()
    if not (Path(home) / "bin" / "nvcc").exists():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text) or ["", "unknown"]
    if version(found[1]) < (12, 5):  # the first with cudaGetDriverEntryPointByVersion
        return f"nvcc is of CUDA {found[1]}; 12.5 or newer is needed"
    if (built := torch.version.cuda) and version(found[1])[0] != version(built)[0]:
        return f"nvcc is of CUDA {found[1]}, torch of CUDA {built}; set CUDA_HOME to the latter"
    if not architectures():
        return f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']} names no GPU from 8.0 on"
    return None


def extension() -> tuple[list, dict]:
    """The extension module and the command that builds it; prints what that is built for."""
    home, names, left_out = cuda_home(), architectures(), ""
    paths = sorted(path.relative_to(CSRC.parent) for path in CSRC.rglob("*.c[pu]*"))
    sources = [str(path) for path in paths if path.suffix != ".cuh"]
    if os.environ.get("MMKERNELS_INSTANCES") == "ci":
        sources = [x for x in sources if re.search(r"\.cpp$|_(64|128|14|16|delta)_bf16\.cu$", x)]
    if "9.0a" not in " ".join(names):
        sources = [source for source in sources if "/hopper_" not in source]
        left_out = ", without the Hopper kernels: TORCH_CUDA_ARCH_LIST does not name 9.0a"
    print(f"mmkernels: extension built for {' '.join(names)}{left_out}", file=sys.stderr)
    os.environ.update(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=";".join(names))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # None in a torch built without CUDA
    module = cpp_extension.CppExtension(
        name="mmkernels._C",
        sources=sources,
        include_dirs=[str(CSRC), f"{home}/include"],
        library_dirs=[f"{home}/lib64", f"{home}/lib"],
        extra_compile_args={
            "cxx": ["-O2", "-std=c++17", "-fvisibility=hidden", TARGET_VERSION],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        # libtorch leads to libtorch_cuda, if there is one, where the current stream is found.
        extra_link_args=["-Wl,--no-as-needed,-ltorch,--as-needed", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    module.libraries = ["torch_cpu", "cudart_static", "rt", "dl", "pthread"]
    build = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)
    return [module], {"build_ext": build}


class Wheel(bdist_wheel):
    """Any Python 3: the extension calls none of Python's functions."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform is "any" for the pure wheel."""
        return "py3", "none", super().get_tag()[2]


CHOICES = {"MMKERNELS_BUILD_CUDA": ("auto", "0", "1"), "MMKERNELS_INSTANCES": ("all", "ci")}
for name, known in CHOICES.items():
    if (given := os.environ.get(name, known[0])) not in known:
        sys.exit(f"mmkernels: {name}={given} is not one of {', '.join(known)}")
wanted = os.environ.get("MMKERNELS_BUILD_CUDA", "auto")
if reason := "MMKERNELS_BUILD_CUDA=0" if wanted == "0" else why_not():
    reason = f"mmkernels: extension not built: {reason}"
    if wanted == "1":
        sys.exit(f"{reason}, and MMKERNELS_BUILD_CUDA=1")
    print(reason, file=sys.stderr)
modules, commands = ([], {}) if reason else extension()
setup(ext_modules=modules, cmdclass={"bdist_wheel": Wheel, **commands})
