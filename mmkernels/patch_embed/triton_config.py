"""Tile sizes of the Triton patch embedding kernels: one table.

BLOCK_M rows of tokens by BLOCK_N of their values; for the weight's gradient BLOCK_M values of a
token by BLOCK_N of a patch. Nothing is measured at a call.
"""

from typing import NamedTuple

import torch
import triton

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import Gpu
from mmkernels._core.tuning import Config


class Row(NamedTuple):
    """Configurations of one family of GPUs.

    Attributes:
        forward: the largest tiles first.
        weight: of the weight's gradient.
        resident: programs that a multiprocessor runs at once.
    """

    forward: tuple[Config, ...]
    weight: Config
    resident: int


TABLE = {
    "sm_90": Row(
        (Config(128, 256, 8, 3), Config(128, 128, 8, 3), Config(64, 64, 4, 4)),
        Config(128, 128, 8, 3),
        1,
    ),
    "sm_100": Row(
        (Config(128, 256, 8, 3), Config(128, 128, 8, 3), Config(64, 64, 4, 4)),
        Config(128, 128, 8, 3),
        1,
    ),
    "sm_80": Row((Config(128, 128, 8, 3), Config(64, 64, 4, 3)), Config(128, 128, 8, 3), 1),
    "small": Row((Config(128, 64, 4, 3), Config(64, 64, 4, 3)), Config(64, 128, 8, 2), 2),
    "gfx942": Row((Config(128, 128, 4, 2), Config(64, 64, 4, 2)), Config(128, 128, 4, 2), 1),
    # IEEE float32 has no tensor cores: its unrolled FMAs grow with the tile, so tiles stay small.
    "float32": Row((Config(64, 64, 8, 2), Config(32, 32, 4, 2)), Config(64, 64, 8, 2), 2),
}


# So many products take as long as to copy one value of an operand: assumed, not measured.
COPY_COST = 40

# Of the sums over samples: a read of dout and no more, so rows are few and long.
SUMS = Config(2, 256, 4, 1)


def row(dtype: torch.dtype, gpu: Gpu) -> Row:
    """The table's row for a GPU and the weight's dtype."""
    return TABLE["float32" if dtype == torch.float32 else tuning.family(gpu)]


def tile_count(config: Config, rows: int, columns: int) -> int:
    """Tiles of rows x columns."""
    return triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(columns, config.BLOCK_N)


def forward(rows: int, dim: int, dtype: torch.dtype, gpu: Gpu) -> Config:
    """Configuration for so many rows of `dim` values."""
    if (asked := tuning.overridden("patch_forward")) is not None:
        return asked
    found = row(dtype, gpu)
    slots = gpu.processors * found.resident

    def cost(config: Config) -> int:
        """Turns that the GPU takes, times the work of a tile: its products, and its copies."""
        turns = triton.cdiv(tile_count(config, rows, dim), slots)
        m, n = config.BLOCK_M, config.BLOCK_N
        return turns * (m * n + COPY_COST * (m + n))

    return min(found.forward, key=cost)


def weight_gradient(dtype: torch.dtype, gpu: Gpu) -> Config:
    """Configuration of the weight's gradient."""
    return tuning.overridden("patch_weight") or row(dtype, gpu).weight
