"""Builds the compiled extension `mmkernels/_C.so` where that is possible; metadata: pyproject.toml.

The extension keeps to LibTorch's stable ABI and holds no Python, so one file serves every Python
and every torch from TARGET on, built for CUDA or not. Without it the package is pure Python.

    MMKERNELS_BUILD_CUDA    auto (default): build if torch, ninja and nvcc are at hand; 0: never;
                            1: fail if they are not
    MMKERNELS_INSTANCES     all (default), or ci: bfloat16 kernels of head dims 64 and 128 only
    TORCH_CUDA_ARCH_LIST    GPUs to compile for
    CUDA_HOME, MAX_JOBS     as for every extension of torch
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
ARCHITECTURES = "8.0;9.0+PTX"
CI_INSTANCES = r"_(64|128|14|16)_bf16$"
CSRC = Path(__file__).parent / "csrc"


def version(text: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def cuda_home() -> str | None:
    """The CUDA toolkit; nvcc on PATH may be a script that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return "/usr/local/cuda"
    if shutil.which("nvcc"):
        command = ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
        lines = subprocess.run(command, capture_output=True, text=True).stderr
        if found := re.search(r"^#\$ TOP=(.+)$", lines, re.M):
            return str(Path(found[1]).resolve())
    return None


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    try:
        import torch
    except Exception as error:
        return f"torch does not import here ({error}); install it and use --no-build-isolation"
    if version(torch.__version__) < TARGET:
        return f"torch is {torch.__version__}; {'.'.join(map(str, TARGET))} or newer is needed"
    if (
        shutil.which("ninja") is None
        and shutil.which("ninja", path=Path(sys.executable).parent) is None
    ):
        return "ninja is not installed; pip install ninja"
    home = cuda_home()
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = version(re.search(r"release ([\d.]+)", text)[1])
    built_for = torch.version.cuda
    if built_for and release[0] != version(built_for)[0]:
        return (
            f"nvcc is of CUDA {release[0]}, torch of CUDA {built_for}; set CUDA_HOME to the latter"
        )
    return None


def extension() -> tuple[list, dict]:
    """The extension module and the command that builds it."""
    home = cuda_home()
    os.environ["CUDA_HOME"] = home
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # None in a torch built without CUDA
    kernels = sorted(path.relative_to(CSRC.parent) for path in CSRC.glob("*/*.cu"))
    ops = sorted(path.relative_to(CSRC.parent) for path in CSRC.glob("*/*.cpp"))
    if os.environ.get("MMKERNELS_INSTANCES", "all") == "ci":
        kernels = [path for path in kernels if re.search(CI_INSTANCES, path.stem)]
    target = f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"
    module = cpp_extension.CppExtension(
        "mmkernels._C",
        ["csrc/ops.cpp", *map(str, ops), *map(str, kernels)],
        include_dirs=[str(CSRC), f"{home}/include"],
        library_dirs=[f"{home}/lib64"],
        extra_compile_args={
            "cxx": ["-O2", "-std=c++17", "-Wall", "-fvisibility=hidden", target],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    module.libraries = ["torch_cpu", "cudart_static", "rt", "dl", "pthread"]
    build = cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)
    return [module], {"build_ext": build}


class Wheel(bdist_wheel):
    """Any Python 3: the extension calls none of Python's functions."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none with the platform, which is "any" for the pure wheel."""
        return "py3", "none", super().get_tag()[2]


wanted = os.environ.get("MMKERNELS_BUILD_CUDA", "auto")
if wanted not in ("auto", "0", "1"):
    sys.exit(f"MMKERNELS_BUILD_CUDA is {wanted!r}; it must be auto, 0 or 1")
reason = "MMKERNELS_BUILD_CUDA=0" if wanted == "0" else why_not()
if reason and wanted == "1":
    sys.exit(f"mmkernels: MMKERNELS_BUILD_CUDA=1, but the extension cannot be built: {reason}")
print(
    f"mmkernels: extension {f'not built: {reason}' if reason else 'will be built'}", file=sys.stderr
)
modules, commands = ([], {}) if reason else extension()
setup(ext_modules=modules, cmdclass={"bdist_wheel": Wheel, **commands})
