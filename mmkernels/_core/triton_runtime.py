"""What all Triton kernels share on the host: may they run, on what, and how one is launched.

Importable without triton, which is asked for only when a call could use it.
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Oldest GPU that Triton's NVIDIA compiler has tensor-core products for.
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """What the choice of a configuration needs to know.

    Attributes:
        arch: "sm_90" or "gfx942": what Triton compiles for.
        shared: bytes of shared memory that one block may have.
        processors: number of multiprocessors.
        l2: bytes of the second-level cache.
        tma: copies tiles by tensor descriptors.
        name: as the driver gives it.
    """

    arch: str
    shared: int
    processors: int
    l2: int
    tma: bool
    name: str

    @property
    def is_hopper(self) -> bool:
        """Has products that are issued by four warps together (wgmma)."""
        return self.arch == "sm_90"


KIB = 1024
# By architecture, for compiling without a GPU: shared memory, multiprocessors, L2.
KNOWN_GPUS = {
    "sm_80": Gpu("sm_80", 163 * KIB, 108, 40 << 20, False, "NVIDIA A100"),
    "sm_86": Gpu("sm_86", 99 * KIB, 84, 6 << 20, False, "NVIDIA RTX A6000"),
    "sm_89": Gpu("sm_89", 99 * KIB, 142, 96 << 20, False, "NVIDIA L40S"),
    "sm_90": Gpu("sm_90", 227 * KIB, 132, 50 << 20, True, "NVIDIA H100"),
    "sm_100": Gpu("sm_100", 227 * KIB, 148, 126 << 20, True, "NVIDIA B200"),
    "sm_120": Gpu("sm_120", 99 * KIB, 188, 128 << 20, True, "NVIDIA RTX PRO 6000"),
    "gfx942": Gpu("gfx942", 64 * KIB, 304, 4 << 20, False, "AMD Instinct MI300X"),
}


class Launcher(NamedTuple):
    """Runs kernels in another way than on a GPU; tests put one in with `emulate`.

    Attributes:
        run: takes kernel, grid, options and the kernel's arguments by name.
        gpu: the one to choose configurations for.
        name: for messages.
    """

    run: Callable[..., None]
    gpu: Gpu
    name: str


_emulator: Launcher | None = None


def emulate(launcher: Launcher | None) -> None:
    """Sends all launches on CPU tensors to `launcher`; None ends that."""
    global _emulator
    _emulator = launcher


def interpreted() -> bool:
    """Does Triton's interpreter run the kernels? Fixed before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def import_error() -> str | None:
    """Why triton cannot be imported, or None."""
    try:
        import triton
    except Exception as error:  # a broken installation raises all kinds
        return f'triton does not import: {error}; pip install "mmkernels[triton]"'
    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is not None and tuple(map(int, version.groups())) < (3, 6):
        return f"triton {triton.__version__} is too old; these kernels need 3.6 or newer"
    return None


@functools.cache
def _device_why_not(index: int) -> str | None:
    if torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            f"Triton needs {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    return None


def why_not(x: Tensor, name: str = "q") -> str | None:
    """Why Triton kernels cannot run where x lies, or None; `name` is its name in the reason."""
    if (reason := import_error()) is not None:
        return reason
    if x.device.type == "cuda":
        # Fake tensors say "cuda" on machines without a GPU, too.
        return _device_why_not(x.device.index or 0) if torch.cuda.is_available() else None
    if x.device.type != "cpu":
        return f"{name} is on {x.device}; Triton kernels run on CUDA and ROCm devices"
    if _emulator is not None:
        return None
    if not interpreted():
        return f"{name} is on cpu; Triton kernels run on a GPU"
    if x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; it serves float16 and float32"
    return None


def only_by_name(x: Tensor) -> str | None:
    """Why `auto` passes Triton over for a call that it could serve."""
    if x.device.type == "cpu":
        how = _emulator.name if _emulator is not None else "Triton's interpreter"
        return f"only by name on CPU tensors: {how} is for tests, and slow"
    return None


@functools.cache
def _gpu(index: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * KIB)
    return Gpu(
        arch,
        shared,
        properties.multi_processor_count,
        properties.L2_cache_size,
        not torch.version.hip and properties.major >= 9,
        properties.name,
    )


def gpu_of(x: Tensor) -> Gpu:
    """The GPU that x lies on; for CPU tensors the one that the emulator stands for."""
    if x.device.type == "cuda" and torch.cuda.is_available():
        return _gpu(x.device.index or 0)
    return _emulator.gpu if _emulator is not None else KNOWN_GPUS["sm_90"]


def input_precision(dtype: torch.dtype) -> str:
    """Triton's precision for products: float32 is IEEE unless torch was told to allow TF32.

    `torch.backends.cuda.matmul.fp32_precision` ("tf32") and its older names, `allow_tf32` and
    `torch.set_float32_matmul_precision`, ask for it.
    """
    if dtype != torch.float32:
        return "ieee"  # has no effect on 16-bit inputs
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked else "ieee"


def launch(
    kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Runs a kernel; `arguments` are its parameters by name, constexprs among them."""
    if _emulator is not None and not _on_gpu(arguments):
        _emulator.run(kernel, grid, {"num_warps": num_warps, "num_stages": num_stages}, arguments)
        return
    with torch.cuda.device(_device(arguments)):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def _on_gpu(arguments: dict[str, Any]) -> bool:
    return _device(arguments) >= 0


def _device(arguments: dict[str, Any]) -> int:
    """Index of the first tensor's GPU, -1 for the CPU, which torch.cuda.device ignores."""
    first = next(x for x in arguments.values() if isinstance(x, Tensor))
    return first.device.index if first.device.type == "cuda" else -1
