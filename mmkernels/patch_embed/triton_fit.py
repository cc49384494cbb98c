"""Do tiles of the Triton patch embedding kernels fit a GPU? Estimates, made without compiling.

As `_core/tile_fit.py` does for attention; fitted to what Triton 3.8 makes of these kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from mmkernels._core.tile_fit import MAX_REGISTERS, SCRATCH, has_wgmma, lanes
from mmkernels._core.triton_runtime import KIB, Gpu
from mmkernels._core.tuning_choice import Config

if TYPE_CHECKING:
    from mmkernels.patch_embed.triton_config import Problem

BLOCK_P = {2: 64, 4: 32}  # patches of one step of `weight_kernel`, by the bytes of a weight
# float32 products are unrolled: more multiply-adds of a thread in one step than this spill.
MAX_UNROLLED = {"patch_forward": 1024, "patch_weight": 512}


class _Operands(NamedTuple):
    """Elements of one step's operands, and how many a product sums over."""

    pixels: int
    other: int
    depth: int


def _operands(problem: Problem, config: Config) -> _Operands:
    if problem.kernel == "patch_forward":
        depth = problem.step
        return _Operands(config.BLOCK_M * depth, config.BLOCK_N * depth, depth)
    depth = BLOCK_P[problem.dtype.itemsize]
    return _Operands(config.BLOCK_N * depth, config.BLOCK_M * depth, depth)


def shared_bytes(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Upper bound of the shared memory that Triton gives a block."""
    pixels, other, _ = _operands(problem, config)
    size, pixel_size, stages = problem.dtype.itemsize, problem.pixels.itemsize, config.num_stages
    buffers = stages if has_wgmma(gpu) and size == 2 else max(stages - 1, 1)
    made = config.BLOCK_M * config.BLOCK_N
    if gpu.arch.startswith("gfx"):  # pixels are converted before they are stored; out passes, too
        made *= size * (problem.kernel == "patch_forward")
        return max(buffers * (pixels + other) * size, made, 16 * KIB) + SCRATCH
    # dweight passes through, in float32.
    made *= 4 * (problem.kernel == "patch_weight" and not has_wgmma(gpu))
    converted = pixels * size * (problem.pixels != problem.dtype)
    return max(buffers * (pixels * pixel_size + other * size) + converted, made) + SCRATCH


def registers(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Estimate of the 32-bit registers that a thread needs in the loop over products."""
    pixels, other, _ = _operands(problem, config)
    size = problem.dtype.itemsize
    words = config.BLOCK_M * config.BLOCK_N + pixels * size // 4
    fixed = 60  # addresses and bounds of what is copied
    if not has_wgmma(gpu):  # both operands come through registers
        words += other * size // 4
        fixed = 140 if problem.kernel == "patch_forward" else 145
    return -(-words // (config.num_warps * lanes(gpu))) + fixed


def fits(problem: Problem, config: Config, gpu: Gpu) -> bool:
    """Whether shared memory and registers suffice."""
    products = config.BLOCK_M * config.BLOCK_N * _operands(problem, config).depth
    if problem.dtype == torch.float32:
        unrolled = products // (config.num_warps * lanes(gpu))
        if unrolled > MAX_UNROLLED[problem.kernel]:
            return False
    if registers(problem, config, gpu) > MAX_REGISTERS[gpu.arch[:2]]:
        return False
    return shared_bytes(problem, config, gpu) <= gpu.shared
