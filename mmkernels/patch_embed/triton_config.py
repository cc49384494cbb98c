"""Tile sizes of the Triton patch embedding kernels: the built-in table, and what is measured.

BLOCK_M rows of tokens by BLOCK_N of their values; for the weight's gradient BLOCK_M values of a
token by BLOCK_N of a patch. Nothing is measured at a call.

Which tile the forward pass takes depends on how many of them a call has: 150 large ones on 132
multiprocessors take two turns, the second nearly empty. So a call takes the tile size with the
least

    turns of the GPU * values of a tile * time of a value

and only the last factor, the pace of a tile size, is the GPU's own. `tune` measures it, for each
tile size with the warps and stages that are fastest: milliseconds of one call, the same for all, of
so many turns that a nearly empty one is no matter. While a tile size was not measured, a formula
that assumes what copies cost gives the pace of all.

Both kernels are tuned for what their code depends on most: dtypes, and how many values of a patch
one step of the product takes, which is 64 for patches of 8, 16, 32 and long frames, 32 for one of
14, and 16 for those of 4 and 7. Channels, widths of a token and strides make the loop longer, or
there are more tiles: that is assumed to change nothing in which configuration is best.
"""

import itertools
from typing import NamedTuple

import torch

from mmkernels._core import tuning_choice
from mmkernels._core.triton_runtime import Gpu, input_precision
from mmkernels._core.tuning_choice import Config
from mmkernels.patch_embed import triton_fit


class Row(NamedTuple):
    """Configurations of one family of GPUs.

    Attributes:
        forward: one of each tile size, the largest first.
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


class Problem(NamedTuple):
    """What a configuration depends on.

    Attributes:
        kernel: "patch_forward" or "patch_weight".
        step: values of a patch in one step of the forward pass's product: 16, 32 or 64.
        pixels: dtype of the pixels, as a kernel reads them.
        dtype: of the weight.
        tile: BLOCK_M and BLOCK_N, of "patch_forward", a problem each; None: these are chosen, too.
    """

    kernel: str
    step: int
    pixels: torch.dtype
    dtype: torch.dtype
    tile: tuple[int, int] | None = None

    def key(self) -> str:
        """How it is called in files, at torch's present precision."""
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (self.pixels, self.dtype))
        words = [self.kernel, f"K{self.step}", *dtypes]
        words += ["tf32"] * (input_precision(self.dtype) == "tf32")
        if self.tile is not None:
            words.append("x".join(map(str, self.tile)))
        return " ".join(words)

    def default(self, gpu: Gpu) -> Config:
        """The table's configuration, with as many fewer stages as it takes to fit."""
        found = row(self.dtype, gpu)
        config = found.weight
        if self.tile is not None:
            config = next(c for c in found.forward if c[:2] == self.tile)
        while config.num_stages > 1 and triton_fit.shared_bytes(self, config, gpu) > gpu.shared:
            config = config._replace(num_stages=config.num_stages - 1)
        return config

    def candidates(self, gpu: Gpu) -> list[Config]:
        """Every configuration worth measuring; all fit, and the table's is the first."""
        sides = (64, 128) if self.dtype != torch.float32 else (32, 64)
        tiles = itertools.product(sides, sides) if self.tile is None else [self.tile]
        stages = (1, 2) if gpu.arch.startswith("gfx") else (2, 3, 4)
        first = self.default(gpu)
        every = (Config(*t, *rest) for t in tiles for rest in itertools.product((4, 8), stages))
        return [first, *(c for c in every if c != first and self.fits(c, gpu))]

    def fits(self, config: Config, gpu: Gpu) -> bool:
        """Whether it is of this tile, and shared memory and registers suffice by an estimate."""
        return self.tile in (None, config[:2]) and triton_fit.fits(self, config, gpu)


def row(dtype: torch.dtype, gpu: Gpu) -> Row:
    """The table's row for a GPU and the weight's dtype."""
    return TABLE["float32" if dtype == torch.float32 else tuning_choice.family(gpu)]


def by_tile(problem: Problem, gpu: Gpu) -> list[Problem]:
    """The forward pass's problem, once for each tile size of the table."""
    return [problem._replace(tile=c[:2]) for c in row(problem.dtype, gpu).forward]


def tile_count(config: Config, rows: int, columns: int) -> int:
    """Tiles of rows x columns."""
    return -(-rows // config.BLOCK_M) * -(-columns // config.BLOCK_N)


@tuning_choice.remembered
def paced(problem: Problem, gpu: Gpu, precision: str) -> list[tuple[Config, float]]:
    """Of each tile size its configuration, and the time of an output in units that they share."""
    choices = [tuning_choice.choice(one, gpu, precision) for one in by_tile(problem, gpu)]
    measured = [(config, time) for config, time in choices if time is not None]
    if len(measured) == len(choices):
        return measured
    return [(c, 1 + COPY_COST * (1 / c.BLOCK_M + 1 / c.BLOCK_N)) for c, _ in choices]


def forward(problem: Problem, rows: int, dim: int, gpu: Gpu) -> Config:
    """Configuration for so many rows of `dim` values; the problem's tile is None."""
    if (asked := tuning_choice.overridden("patch_forward")) is not None:
        return asked
    slots = gpu.processors * row(problem.dtype, gpu).resident

    def cost(option: tuple[Config, float]) -> float:
        config, pace = option
        turns = -(-tile_count(config, rows, dim) // slots)
        return turns * config.BLOCK_M * config.BLOCK_N * pace

    return min(paced(problem, gpu, input_precision(problem.dtype)), key=cost)[0]
