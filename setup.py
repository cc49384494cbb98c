"""Builds the compiled extension `mmkernels/_C.so` where that is possible; metadata: pyproject.toml.

The extension keeps to LibTorch's stable ABI and holds no Python, so one file serves every Python
and every torch from TARGET on, built for CUDA or not. Without it the package is pure Python.

    MMKERNELS_BUILD_CUDA    auto (default): build if torch, ninja and nvcc are at hand; 0: never;
                            1: fail if they are not
    MMKERNELS_INSTANCES     all (default), or ci: bfloat16 kernels of head dims 64 and 128 only
    TORCH_CUDA_ARCH_LIST    GPUs to compile for, as torch spells them, or native for those that are
                            here; older ones than 8.0 are passed over
    CUDA_HOME, MAX_JOBS     as for every extension of torch

By default the kernels are compiled for 8.0, which 8.6 and 8.9 run too, with its PTX for 10.0 and
newer, and for 9.0a, Hopper with instructions of its own. In the list 9.0 means 9.0a: beside code
for both, which of them runs would be the driver's choice. Code and PTX of 9.0a run on nothing else,
so 9.0+PTX means 9.0a and the PTX of 8.0. csrc/*/hopper_*.cu are compiled if the list names 9.0a.
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
ARCHITECTURES = "8.0+PTX;9.0a"
OLDEST_GPU = (8, 0)
OLDEST_CUDA = (12, 5)  # the first with cudaGetDriverEntryPointByVersion
CI_INSTANCES = r"_(64|128|14|16)_bf16$"
CSRC = Path(__file__).parent / "csrc"


def version(text: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def dotted(release: tuple[int, ...]) -> str:
    """The inverse."""
    return ".".join(map(str, release))


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


def architectures() -> list[str]:
    """What to compile for, in torch's spelling."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    if wanted == "native":
        import torch

        gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        names = sorted(set(map(dotted, gpus)))
    else:
        names = wanted.replace("Hopper", "9.0+PTX").replace(" ", ";").split(";")
    meaning = {"9.0": ["9.0a"], "9.0+PTX": ["9.0a", "8.0+PTX"]}
    return [
        name
        for given in names
        if re.match(r"[A-Z]", given) or version(given) >= OLDEST_GPU  # Ampere, say, or 8.6
        for name in meaning.get(given, [given])
    ]


def why_not() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    try:
        import torch
    except Exception as error:
        why = " ".join(str(error).split())
        return f"torch does not import here ({why}); install it and use --no-build-isolation"
    if version(torch.__version__) < TARGET:
        return f"torch is {torch.__version__}; {dotted(TARGET)} or newer is needed"
    if (
        shutil.which("ninja") is None
        and shutil.which("ninja", path=Path(sys.executable).parent) is None
    ):
        return "ninja is not installed; pip install ninja"
    home = cuda_home()
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    if (found := re.search(r"release ([\d.]+)", text)) is None:
        return f"{home}/bin/nvcc does not say its release"
    release = version(found[1])
    if release < OLDEST_CUDA:
        return f"nvcc is of CUDA {found[1]}; {dotted(OLDEST_CUDA)} or newer is needed"
    built_for = torch.version.cuda
    if built_for and release[0] != version(built_for)[0]:
        return (
            f"nvcc is of CUDA {release[0]}, torch of CUDA {built_for}; set CUDA_HOME to the latter"
        )
    if not architectures():
        named = os.environ["TORCH_CUDA_ARCH_LIST"]
        return f"TORCH_CUDA_ARCH_LIST={named} names no GPU from {dotted(OLDEST_GPU)} on"
    return None


def kernels(names: list[str]) -> tuple[list[Path], str]:
    """The .cu files to compile for these GPUs, and what to say about those left out."""
    paths = sorted(path.relative_to(CSRC.parent) for path in CSRC.glob("*/*.cu"))
    if os.environ.get("MMKERNELS_INSTANCES", "all") == "ci":
        paths = [path for path in paths if re.search(CI_INSTANCES, path.stem)]
    portable = [path for path in paths if not path.stem.startswith("hopper_")]
    if any(name.startswith("9.0a") for name in names) or portable == paths:
        return paths, ""
    return portable, ", without the Hopper kernels: TORCH_CUDA_ARCH_LIST does not name 9.0a"


def extension(sources: list[Path], names: list[str]) -> tuple[list, dict]:
    """The extension module and the command that builds it."""
    home = cuda_home()
    os.environ["CUDA_HOME"] = home
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names)
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # None in a torch built without CUDA
    ops = sorted(path.relative_to(CSRC.parent) for path in CSRC.glob("*/*.cpp"))
    target = f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"
    module = cpp_extension.CppExtension(
        "mmkernels._C",
        ["csrc/ops.cpp", *map(str, ops), *map(str, sources)],
        include_dirs=[str(CSRC), f"{home}/include"],
        library_dirs=[f"{home}/lib64", f"{home}/lib"],
        extra_compile_args={
            "cxx": ["-O2", "-std=c++17", "-Wall", "-fvisibility=hidden", target],
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        # libtorch gives no symbol itself, but in a torch for CUDA it leads to libtorch_cuda, where
        # the current stream is found; nothing else of torch's is visible to the extension.
        extra_link_args=["-Wl,--no-as-needed,-ltorch,--as-needed", "-Wl,--exclude-libs,ALL"],
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


def plan() -> tuple[list, dict]:
    """Extension modules and commands for setup(); prints what is built or why nothing is."""
    choices = {"MMKERNELS_BUILD_CUDA": ("auto", "0", "1"), "MMKERNELS_INSTANCES": ("all", "ci")}
    for name, known in choices.items():
        if (given := os.environ.get(name, known[0])) not in known:
            sys.exit(f"mmkernels: {name}={given} is not one of {', '.join(known)}")
    wanted = os.environ.get("MMKERNELS_BUILD_CUDA", "auto")
    if reason := "MMKERNELS_BUILD_CUDA=0" if wanted == "0" else why_not():
        if wanted == "1":
            sys.exit(f"mmkernels: MMKERNELS_BUILD_CUDA=1, but no extension can be built: {reason}")
        print(f"mmkernels: extension not built: {reason}", file=sys.stderr)
        return [], {}
    names = architectures()
    sources, left_out = kernels(names)
    print(f"mmkernels: extension built for {' '.join(names)}{left_out}", file=sys.stderr)
    return extension(sources, names)


modules, commands = plan()
setup(ext_modules=modules, cmdclass={"bdist_wheel": Wheel, **commands})
