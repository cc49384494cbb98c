"""Do tiles of the Triton attention kernels fit a GPU? Estimates, made without compiling.

Every coefficient was fitted to what Triton 3.8 makes of the kernels for the GPUs of
`triton_runtime.KNOWN_GPUS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from mmkernels._core.triton_runtime import KIB, KNOWN_GPUS, Gpu
from mmkernels._core.tuning_choice import Config

if TYPE_CHECKING:
    from mmkernels._core.tuning import Problem

MIN_BLOCK = 16  # of the hardware's products
SCRATCH = KIB + 512  # reductions across warps, barriers
# Per thread, by the first letters of the architecture.
MAX_REGISTERS = {"sm": 255, "gf": 512}
# float32 products are unrolled into one multiply-add each: more than this spill, and compile long.
MAX_UNROLLED = 1100


def split_dim(dim: int) -> tuple[int, int]:
    """The two widths, powers of two, in which a kernel holds a head: 80 is 64 + 16, not 128."""
    padded = max(16, 1 << (dim - 1).bit_length())
    lower = padded // 2
    rest = max(16, 1 << max(0, dim - lower - 1).bit_length())
    return (lower, rest) if dim < padded and lower >= 16 and lower + rest < padded else (padded, 0)


def lanes(gpu: Gpu) -> int:
    return 64 if gpu.arch.startswith("gfx9") else 32


def max_decode_rows(dtype: torch.dtype) -> int:
    """Queries of one key head that a tile of the decode kernel may hold."""
    return 32 if dtype == torch.float32 else 64


class _Tiles(NamedTuple):
    """Elements that a block holds. Estimates of memory and registers read nothing else.

    Attributes:
        resident: each operand that stays for the whole loop.
        streamed: each operand of one step of the loop.
        accumulators: results, in float32.
        scores: tiles of scores, in float32.
        products: multiply-adds of one step.
    """

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    accumulators: int
    scores: int
    products: int


def _tiles(problem: Problem, config: Config) -> _Tiles:
    m, n = config.BLOCK_M, config.BLOCK_N
    d, dv = sum(split_dim(problem.head_dim)), sum(split_dim(problem.value_dim))
    if problem.kernel == "backward_keys":
        return _Tiles((n * d, n * dv), (m * d, m * dv), n * (d + dv), 2, 2 * m * n * (d + dv))
    if problem.kernel == "backward_queries":
        return _Tiles((m * d, m * dv), (n * d, n * dv), m * d, 2, m * n * (2 * d + dv))
    if problem.kernel == "backward_bias":
        # Its two products come one after the other, in the same memory.
        streamed = (m * max(d, dv), n * max(d, dv))
        return _Tiles((), streamed, m * n, 2, m * n * (d + dv))
    return _Tiles((m * d,), (n * d, n * dv), m * dv, 1, m * n * (d + dv))


def has_wgmma(gpu: Gpu) -> bool:
    """Products read both operands from shared memory; elsewhere warps load them into registers."""
    return gpu.arch.startswith(("sm_90", "sm_10"))


def shared_bytes(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Upper bound of the shared memory that Triton gives a block."""
    size, stages = problem.dtype.itemsize, config.num_stages
    if problem.kernel == "decode":
        config = config._replace(BLOCK_M=max_decode_rows(problem.dtype))
    if problem.kernel == "backward_bias":
        stages = 1  # nothing is prefetched past its test for an empty tile
    tiles, scores = _tiles(problem, config), config.BLOCK_M * config.BLOCK_N
    resident, stage = sum(tiles.resident), sum(tiles.streamed)
    backward, half = problem.kernel.startswith("backward"), size == 2
    buffers = stages if has_wgmma(gpu) and half else max(stages - 1, 1)
    if gpu.arch.startswith("sm_10") and backward and stages > 1:
        buffers += 1  # transposed copies
    # Beside what is streamed: probabilities between two products, or operands in a second layout.
    second = scores
    if not half and gpu.tma and problem.kernel == "backward_queries":
        second = max(scores, stage)
    elif not half or stages == 1:
        second = scores + max(tiles.streamed)
    elements = stage * buffers + second
    rows = 4 * config.BLOCK_M * buffers  # lse, delta, start and end
    extra = 4 * (rows * backward + scores * max(stages - 1, 1) * problem.bias)
    if gpu.arch.startswith("gfx"):  # what is resident passes through, and stays in registers
        return max(max(tiles.resident, default=0) * size, elements * size + extra + SCRATCH)
    stored = tiles.accumulators * size
    return max((resident + elements) * size + extra, stored) + SCRATCH


def registers(problem: Problem, config: Config, gpu: Gpu = KNOWN_GPUS["sm_90"]) -> int:
    """Estimate of the 32-bit registers that a thread needs in the loops over full tiles."""
    tiles, scores = _tiles(problem, config), config.BLOCK_M * config.BLOCK_N
    size = problem.dtype.itemsize
    words = tiles.accumulators + scores * tiles.scores + scores * size // 4
    if problem.bias:
        words += 2 * scores  # an address for every element
    other = 30  # pointers, bounds, row maxima and sums
    if not has_wgmma(gpu):
        other += 30  # an address for every element copied
        if problem.kernel != "backward_keys":
            words += sum(tiles.resident) * size // 4
    return -(-words // (config.num_warps * lanes(gpu))) + other


def _short_of(problem: Problem, config: Config, gpu: Gpu) -> str | None:
    if registers(problem, config, gpu) > MAX_REGISTERS[gpu.arch[:2]]:
        return "registers"
    unrolled = _tiles(problem, config).products / (config.num_warps * lanes(gpu))
    if problem.dtype == torch.float32 and unrolled > MAX_UNROLLED:
        return "code"
    return "shared memory" if shared_bytes(problem, config, gpu) > gpu.shared else None


def fits(problem: Problem, config: Config, gpu: Gpu) -> bool:
    return _short_of(problem, config, gpu) is None


def fitted(problem: Problem, config: Config, gpu: Gpu) -> Config:
    """The configuration with as many fewer stages, then smaller tiles, as it takes to fit."""
    streamed, resident = ("BLOCK_N", "BLOCK_M")
    if problem.kernel == "backward_keys":
        streamed, resident = resident, streamed
    while (short := _short_of(problem, config, gpu)) is not None:
        if short == "shared memory" and config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        elif (block := getattr(config, streamed)) > MIN_BLOCK:
            config = config._replace(**{streamed: block // 2})
        elif (block := getattr(config, resident)) > MIN_BLOCK:
            config = config._replace(**{resident: block // 2})
        elif config.num_stages > 1:
            config = config._replace(num_stages=1)
        else:
            break  # the smallest there is: let the compiler decide
    return config
