"""Tile sizes of the Triton attention kernels: one table, estimates that it fits, what a user tuned.

`configuration` is asked at every launch, never measures, and takes the first of: an `override`, the
value that `python -m mmkernels tune` saved for this GPU, the table's row. Each is made to fit the
GPU's shared memory and registers before it is used, so a GPU with less of them gets smaller tiles
instead of a failed launch.
"""

import contextvars
import functools
import itertools
import warnings

import torch

from mmkernels._core import tuning_store
from mmkernels._core.tile_fit import (
    KERNELS,
    Config,
    Problem,
    fits,
    fitted,
    max_decode_rows,
    registers,
    shared_bytes,
    split_dim,
)
from mmkernels._core.triton_runtime import KIB, KNOWN_GPUS, Gpu, input_precision

__all__ = [
    "KERNELS", "Config", "Problem", "candidates", "configuration", "default", "family", "fits",
    "forget", "key", "max_decode_rows", "note", "overridden", "override", "registers",
    "shared_bytes", "split_dim",
]  # fmt: skip


# Kernels of the patch embedding; their table is in `patch_embed/triton_config.py`.
PATCH_KERNELS = ("patch_forward", "patch_weight")

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
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "small",
    "sm_89": "small",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_120": "small",
    "gfx942": "gfx942",
}  # fmt: skip


def family(gpu: Gpu) -> str:
    """Rows of TABLE for a GPU; for an unknown one those of the nearest."""
    if gpu.arch in FAMILIES:
        return FAMILIES[gpu.arch]
    if gpu.arch.startswith("gfx"):
        return "gfx942"
    if gpu.shared < KNOWN_GPUS["sm_80"].shared:
        return "small"
    major = int(gpu.arch[3:-1])
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def default(problem: Problem, gpu: Gpu) -> Config:
    """The table's configuration, made to fit."""
    rows = TABLE["float32" if problem.dtype == torch.float32 else family(gpu)][problem.kernel]
    width = max(sum(split_dim(problem.head_dim)), sum(split_dim(problem.value_dim)))
    column = next(i for i, most in enumerate(WIDTHS) if width <= most or most == WIDTHS[-1])
    return fitted(problem, rows[column], gpu)


def candidates(problem: Problem, gpu: Gpu) -> list[Config]:
    """Every configuration worth measuring; all fit, and the table's is the first."""
    half, kernel = problem.dtype != torch.float32, problem.kernel
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
    first = default(problem, gpu)
    every = (Config(*values) for values in itertools.product(queries, keys, (4, 8), stages))
    return [first, *(c for c in every if c != first and fits(problem, c, gpu))]


def key(problem: Problem) -> str:
    """How a problem is called in the file of tuned configurations, at torch's present precision."""
    kernel, head_dim, value_dim, dtype, masked, bias = problem
    masked = masked or kernel == "decode"  # lengths are a mask
    bias = bias or kernel == "backward_bias"
    words = [kernel, f"D{head_dim}", f"Dv{value_dim}", str(dtype).removeprefix("torch.")]
    words += ["tf32"] * (input_precision(dtype) == "tf32")
    return " ".join(words + ["masked"] * masked + ["bias"] * bias)


# Innermost last. Of a context, and so of a thread: what one tries is not another's.
_overrides: contextvars.ContextVar[tuple["override", ...]] = contextvars.ContextVar(
    "overrides", default=()
)


class override:
    """Within it a kernel runs with this configuration, whether it is estimated to fit or not.

    It holds in the thread that enters it alone, so not in a backward pass that autograd runs on a
    GPU, which has a thread of its own there; one that an op of `_core/ops.py` runs is reached.

    Attributes:
        used: the kernel has asked for its configuration since.
    """

    def __init__(self, kernel: str, config: Config) -> None:
        known = (*KERNELS, *PATCH_KERNELS)
        if kernel not in known:
            raise ValueError(f"override: kernel is {kernel!r}; it must be one of {known}")
        self.kernel, self.config, self.used = kernel, config, False

    def __enter__(self) -> "override":
        _overrides.set((*_overrides.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        installed = list(reversed(_overrides.get()))
        installed.remove(self)  # the last time that it was entered
        _overrides.set(tuple(reversed(installed)))


def overridden(kernel: str) -> Config | None:
    """The configuration that an `override` asks for."""
    asked = next((o for o in reversed(_overrides.get()) if o.kernel == kernel), None)
    if asked is None:
        return None
    asked.used = True
    return asked.config


def configuration(problem: Problem, gpu: Gpu) -> Config:
    """The configuration to launch a kernel with."""
    precision = input_precision(problem.dtype)
    return overridden(problem.kernel) or _chosen(problem, gpu, precision)


@functools.cache
def _chosen(problem: Problem, gpu: Gpu, precision: str) -> Config:
    entry = tuning_store.load(gpu.name).entries.get(key(problem))
    if entry is not None:
        tuned = Config(*(entry["config"][field] for field in Config._fields))
        if fits(problem, tuned, gpu):
            return tuned
        warnings.warn(
            f"the tuned configuration of {key(problem)!r}, {tuned}, does not fit {gpu.name} and is "
            "not used; run python -m mmkernels tune",
            stacklevel=2,
        )
    return default(problem, gpu)


def forget() -> None:
    """Reads the file of tuned configurations again at the next launch."""
    tuning_store.load.cache_clear()
    _chosen.cache_clear()


def note(gpu: Gpu) -> str | None:
    """What a user should know of the choice for this GPU: a foreign row, a file not used."""
    foreign = None
    if gpu.arch not in KNOWN_GPUS:
        foreign = (
            f"{gpu.arch} is not in the table of configurations; those of {family(gpu)}, fitted to "
            f"{gpu.shared // KIB} KiB, serve; measure with python -m mmkernels tune"
        )
    return "; ".join(filter(None, (foreign, tuning_store.load(gpu.name).note))) or None
