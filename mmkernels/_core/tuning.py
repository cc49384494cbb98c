"""Tile sizes of the Triton attention kernels: the built-in table, and what is worth measuring.

How a launch finds its configuration is told in `tuning_choice.py`, whether one fits is estimated in
`tile_fit.py`. A GPU with less shared memory or registers gets smaller tiles instead of a failed
launch.
"""

import itertools
from typing import NamedTuple

import torch

from mmkernels._core import tile_fit
from mmkernels._core.tile_fit import max_decode_rows, registers, shared_bytes, split_dim
from mmkernels._core.triton_runtime import Gpu, input_precision
from mmkernels._core.tuning_choice import (
    ATTENTION_KERNELS,
    Config,
    configuration,
    family,
    forget,
    note,
    overridden,
    override,
)

__all__ = [
    "KERNELS", "Config", "Problem", "configuration", "family", "forget", "max_decode_rows", "note",
    "overridden", "override", "registers", "shared_bytes", "split_dim",
]  # fmt: skip

KERNELS = ATTENTION_KERNELS
# Columns: heads of at most 64, 128 and 256. Values: BLOCK_M, BLOCK_N, num_warps, num_stages.
# Chosen so that Triton 3.8 spills nothing, or next to nothing, in the loops over full tiles.
WIDTHS = (64, 128, 256)
# fmt: off
TABLE: dict[str, dict[str, tuple[Config, Config, Config]]] = {
    # wgmma wants 64 rows for every four warps; 227 KiB hold wide tiles.
    "sm_90": {
        "forward":          (Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
        "backward_keys":    (Config(64, 128, 8, 3),  Config(64, 128, 8, 2),  Config(32, 64, 8, 2)),
        "backward_queries": (Config(128, 64, 8, 3),  Config(128, 64, 8, 2),  Config(64, 32, 8, 2)),
        "backward_bias":    (Config(64, 64, 8, 1),   Config(64, 64, 8, 1),   Config(64, 64, 8, 1)),
        "decode":           (Config(16, 128, 4, 3),  Config(16, 64, 4, 4),   Config(16, 64, 4, 2)),
    },
    # Accumulators lie in tensor memory, and come through registers to be scaled.
    "sm_100": {
        "forward":          (Config(128, 64, 8, 3),  Config(128, 64, 8, 3),  Config(64, 64, 8, 2)),
        "backward_keys":    (Config(64, 128, 8, 2),  Config(64, 128, 8, 2),  Config(32, 64, 8, 2)),
        "backward_queries": (Config(128, 64, 8, 3),  Config(128, 64, 8, 2),  Config(64, 32, 8, 2)),
        "backward_bias":    (Config(64, 64, 8, 1),   Config(64, 64, 8, 1),   Config(64, 64, 8, 1)),
        "decode":           (Config(16, 128, 4, 3),  Config(16, 64, 4, 4),   Config(16, 64, 4, 2)),
    },
    # mma.sync keeps operands in registers; 163 KiB, and one buffer less than there are stages.
    "sm_80": {
        "forward":          (Config(128, 64, 8, 3),  Config(128, 64, 8, 3),  Config(64, 32, 8, 2)),
        "backward_keys":    (Config(64, 128, 8, 2),  Config(32, 128, 8, 2),  Config(32, 64, 8, 2)),
        "backward_queries": (Config(128, 64, 8, 2),  Config(64, 64, 8, 2),   Config(64, 32, 8, 2)),
        "backward_bias":    (Config(64, 64, 8, 1),   Config(64, 32, 8, 1),   Config(32, 32, 4, 1)),
        "decode":           (Config(16, 128, 4, 3),  Config(16, 64, 4, 3),   Config(16, 32, 4, 3)),
    },
    # The same products with 99 KiB: consumer GPUs and L40S.
    "small": {
        "forward":          (Config(128, 64, 8, 3),  Config(64, 64, 8, 2),   Config(64, 32, 8, 2)),
        "backward_keys":    (Config(32, 128, 8, 2),   Config(32, 64, 8, 2),   Config(16, 64, 8, 2)),
        "backward_queries": (Config(128, 32, 8, 2),  Config(64, 64, 8, 2),   Config(64, 16, 8, 2)),
        "backward_bias":    (Config(64, 64, 8, 1),   Config(64, 32, 8, 1),   Config(32, 32, 4, 1)),
        "decode":           (Config(16, 64, 4, 3),   Config(16, 64, 4, 2),   Config(16, 32, 4, 2)),
    },
    # Warps of 64 lanes; 64 KiB, and two stages are one buffer.
    "gfx942": {
        "forward":          (Config(128, 64, 4, 2),  Config(64, 64, 4, 2),   Config(64, 32, 4, 2)),
        "backward_keys":    (Config(32, 64, 4, 2),   Config(16, 64, 4, 2),   Config(16, 32, 4, 2)),
        "backward_queries": (Config(64, 32, 4, 2),   Config(64, 16, 4, 2),   Config(32, 16, 4, 2)),
        "backward_bias":    (Config(64, 64, 4, 1),   Config(32, 32, 4, 1),   Config(32, 32, 4, 1)),
        "decode":           (Config(16, 64, 4, 2),   Config(16, 32, 4, 2),   Config(16, 16, 4, 2)),
    },
    # IEEE float32 has no tensor cores: its unrolled FMAs grow with the tile, so tiles stay small.
    "float32": {
        "forward":          (Config(32, 32, 8, 2),   Config(16, 16, 8, 2),   Config(16, 16, 8, 2)),
        "backward_keys":    (Config(32, 32, 8, 2),   Config(16, 32, 8, 2),   Config(16, 16, 8, 2)),
        "backward_queries": (Config(32, 32, 8, 2),   Config(16, 16, 8, 2),   Config(16, 16, 8, 2)),
        "backward_bias":    (Config(32, 32, 8, 1),   Config(32, 32, 8, 1),   Config(16, 16, 8, 1)),
        "decode":           (Config(16, 32, 4, 2),   Config(16, 16, 4, 2),   Config(16, 16, 4, 2)),
    },
}
# fmt: on


class Problem(NamedTuple):
    """What a configuration depends on.

    Attributes:
        kernel: one of KERNELS; "backward_keys" makes dk and dv, "backward_queries" dq.
        head_dim: of q and k, as it is.
        value_dim: of v, as it is.
        dtype: of q, k and v.
        masked: there is an interval mask.
        bias: tiles of a bias are loaded, too.
    """

    kernel: str
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    masked: bool
    bias: bool = False

    def key(self) -> str:
        """How it is called in files, at torch's present precision."""
        kernel, head_dim, value_dim, dtype, masked, bias = self
        masked = masked or kernel == "decode"  # lengths are a mask
        bias = bias or kernel == "backward_bias"
        words = [kernel, f"D{head_dim}", f"Dv{value_dim}", str(dtype).removeprefix("torch.")]
        words += ["tf32"] * (input_precision(dtype) == "tf32")
        return " ".join(words + ["masked"] * masked + ["bias"] * bias)

    def default(self, gpu: Gpu) -> Config:
        """The table's configuration, made to fit."""
        rows = TABLE["float32" if self.dtype == torch.float32 else family(gpu)][self.kernel]
        width = max(sum(split_dim(self.head_dim)), sum(split_dim(self.value_dim)))
        column = next(i for i, most in enumerate(WIDTHS) if width <= most or most == WIDTHS[-1])
        return tile_fit.fitted(self, rows[column], gpu)

    def candidates(self, gpu: Gpu) -> list[Config]:
        """Every configuration worth measuring; all fit, and the table's is the first."""
        half, kernel = self.dtype != torch.float32, self.kernel
        queries: tuple[int, ...] = (64, 128) if half else (16, 32, 64)
        keys: tuple[int, ...] = (32, 64, 128) if half else (16, 32, 64)
        stages: tuple[int, ...] = (2, 3, 4) if half else (2, 3)
        if kernel == "decode":
            queries = (16,)
        elif kernel == "backward_keys" and half:
            queries, keys = (32, 64, 128), (64, 128)  # the rows of its products are keys
        if kernel == "backward_bias":
            stages = (1,)
        elif gpu.arch.startswith("gfx"):
            stages = (1, 2)
        first = self.default(gpu)
        every = (Config(*values) for values in itertools.product(queries, keys, (4, 8), stages))
        return [first, *(c for c in every if c != first and self.fits(c, gpu))]

    def fits(self, config: Config, gpu: Gpu) -> bool:
        """Whether shared memory and registers suffice, by an estimate."""
        return tile_fit.fits(self, config, gpu)
