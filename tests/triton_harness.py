"""Triton launches without a GPU: compiled for any target, run on CPU tensors, or only recorded.

Needs triton, and a process in which TRITON_INTERPRET is not set. The emulator of PTX is found
through MMKERNELS_PTXSIM.
"""

import functools
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._core.triton_runtime import Gpu, Launcher

# Findings of the emulator in code that Triton itself made, harmless on the hardware.
TOLERATED = {"missing-proxy-fence-cp.async", "same-value-write"}
# Warps that hold the same rows store them by one instruction; of stmatrix the emulator does not see
# that the values are equal.
_SAME_STMATRIX = re.compile(
    r"after the write by warp \d+ \(PTX line (\d+),.* PTX line \1 \(stmatrix"
)
# Bytes of a row of shared memory that TMA permutes, by the driver's number of that mode.
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}


def _target(arch: str) -> GPUTarget:
    """GPUTarget of "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


@functools.cache
def _backend(arch: str) -> Any:
    return make_backend(_target(arch))


@functools.cache
def _specialiser(kernel: Any, arch: str) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def signature_of(
    kernel: Any, arguments: dict[str, Any], arch: str = "sm_90"
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list]]:
    """What Triton's own runtime would compile the kernel for.

    Returns:
        signature: by parameter "*bf16", "i32", "fp32", "tensordesc<bf16[64, 128]>", "constexpr".
        constexprs: values by the parameter's path, None and 1 among them.
        attrs: divisibility by 16 by the parameter's path.
    """
    if missing := [name for name in kernel.arg_names if name not in arguments]:
        raise TypeError(f"{kernel.__name__}: the launch lacks {', '.join(missing)}")
    bound, specialisation, _ = _specialiser(kernel, arch)(**arguments)
    packed = kernel._pack_args(_backend(arch), {}, bound, specialisation, {})
    return packed[1], packed[2], packed[3]


_compiled: dict[tuple, Any] = {}


def compile_launch(
    kernel: Any, options: dict[str, int], arguments: dict[str, Any], arch: str
) -> Any:
    """Triton's CompiledKernel for a launch (asm, metadata), from this process's cache if there."""
    signature, constexprs, attrs = signature_of(kernel, arguments, arch)
    parts = (signature, constexprs, attrs, options)
    key = (kernel, arch, *(repr(sorted(part.items())) for part in parts))
    if key not in _compiled:
        source = ASTSource(kernel, signature, constexprs, attrs)
        _compiled[key] = triton.compile(source, target=_target(arch), options=options)
    return _compiled[key]


class Resources(NamedTuple):
    """What one block of a compiled kernel takes, and which units it uses.

    Attributes:
        shared: bytes of shared memory that the launch asks for.
        registers: per thread.
        stack: bytes per thread; spilled registers lie here.
        local: further bytes of local memory per thread; on AMD the number of spilled registers.
        hgmma: has products of four warps together (wgmma).
        tma: copies by tensor maps.
    """

    shared: int
    registers: int
    stack: int
    local: int
    hgmma: bool
    tma: bool


def resources(compiled: Any) -> Resources:
    """Of a kernel from `compile_launch`, as the assembler reports them."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        used = [int(re.search(rf"^ *\.{name}: +(\d+)", text, re.M)[1]) for name in names]
        return Resources(shared, *used, hgmma=False, tma=False)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = [int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")]
    ptx = compiled.asm["ptx"]
    return Resources(shared, *used, "wgmma.mma_async" in ptx, "cp.async.bulk.tensor" in ptx)


class Launch(NamedTuple):
    """The arguments of one `triton_runtime.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, int]
    arguments: dict[str, Any]

    def compile(self, arch: str) -> Any:
        return compile_launch(self.kernel, self.options, self.arguments, arch)


class Recorder:
    """Keeps launches and runs nothing, so outputs stay as they were allocated."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        self.launches.append(Launch(kernel, grid, options, arguments))


def recording_launcher(gpu: Gpu) -> Launcher:
    """For `emulate`; what it saw is in `.run.launches`."""
    return Launcher(Recorder(), gpu, "the recorder of launches")


@functools.cache
def _ptxsim() -> Any:
    """The emulator."""
    if (folder := os.environ["MMKERNELS_PTXSIM"]) not in sys.path:
        sys.path.insert(0, folder)
    import ptxsim

    return ptxsim


@functools.cache
def _module(ptx: str) -> Any:
    return _ptxsim().Module(ptx)


def _tensor_map(descriptor: TensorDescriptor, meta: dict[str, Any]) -> Any:
    """The tensor map that Triton's launcher would make."""
    x = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    nan = descriptor.padding == "nan"
    return _ptxsim().tensor_map(x, meta["block_size"], SWIZZLES[meta["swizzle"]], oob_nan=nan)


def _kernel_parameters(compiled: Any, arguments: dict[str, Any], blocks: int) -> list[Any]:
    """What the compiled kernel takes, in its order; null scratch is left to the emulator."""
    metas = iter(compiled.metadata.tensordesc_meta or ())
    values: list[Any] = []
    for name, kind in compiled.src.signature.items():
        argument = arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(argument, TensorDescriptor):
            meta = next(metas, None)
            if meta is None:
                raise NotImplementedError(f"{name}: {compiled.metadata.target} has no tensor maps")
            values += [_tensor_map(argument, meta), *argument.shape, *argument.strides]
        else:
            values.append(argument)
    if (size := compiled.metadata.global_scratch_size * blocks) > 0:
        values.append(_ptxsim().aligned(torch.zeros(size, dtype=torch.uint8)))
    return values


def _serious(issue: dict[str, Any]) -> bool:
    """Is a finding of the emulator more than what Triton's own code always has?"""
    if issue["kind"] == "race":
        return _SAME_STMATRIX.search(issue["message"]) is None
    return issue["kind"] not in TOLERATED


class Emulation(NamedTuple):
    """One launch's results: the emulator's counters, `pipes(useful_flops)` and `table()`."""

    kernel: str
    result: Any


class Emulator:
    """Runs launches in the emulator, in place on their CPU tensors."""

    def __init__(self, arch: str, check: bool, seed: int) -> None:
        self.arch = arch
        self.check = check
        self.seed = seed
        self.results: list[Emulation] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: dict[str, Any]
    ) -> None:
        if (blocks := math.prod(grid)) == 0:
            return
        compiled = compile_launch(kernel, options, arguments, self.arch)
        meta = compiled.metadata
        result = _module(compiled.asm["ptx"]).launch(
            meta.name,
            grid,
            meta.num_warps * 32,
            _kernel_parameters(compiled, arguments, blocks),
            shared=meta.shared,
            check="report" if self.check else False,
            seed=self.seed,
        )
        self.results.append(Emulation(kernel.__name__, result))
        if found := [issue["message"] for issue in result.issues if _serious(issue)]:
            raise AssertionError(f"{kernel.__name__}: " + "\n".join(found))


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy placed as on a GPU: aligned, and what lies around it may not be read."""
    return _ptxsim().aligned(x)


def ptxsim_launcher(gpu: Gpu, check: bool = True, seed: int = 0) -> Launcher:
    """For `emulate`; counters are in `.run.results`.

    Args:
        gpu: an NVIDIA one; the emulator knows the instructions of sm_80 and sm_90.
        check: look for races and for reads of uninitialised shared memory, too.
        seed: another one lets warps take turns in another order.
    """
    return Launcher(Emulator(gpu.arch, check, seed), gpu, "the emulator of PTX")
