"""Which configuration a Triton kernel is launched with: what is the same for all of them.

`configuration` is asked at every launch, never measures, and takes the first of: an `override`;
what `python -m mmkernels tune` saved for this GPU; what was measured on such a GPU and ships with
the package; the row of the built-in table. A measured one that is estimated not to fit the GPU's
shared memory and registers is passed over.
"""

import contextvars
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from mmkernels._core import tuning_store
from mmkernels._core.triton_runtime import KIB, KNOWN_GPUS, Gpu, input_precision

P = ParamSpec("P")
T = TypeVar("T")

ATTENTION_KERNELS = ("forward", "backward_keys", "backward_queries", "backward_bias", "decode")
PATCH_KERNELS = ("patch_forward", "patch_weight")
ALL_KERNELS = (*ATTENTION_KERNELS, *PATCH_KERNELS)
# Whose rows of a table serve a GPU.
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "small",
    "sm_89": "small",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_120": "small",
    "gfx942": "gfx942",
}  # fmt: skip


class Config(NamedTuple):
    """Compile-time choices of a kernel: BLOCK_M rows and BLOCK_N columns in a tile."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Problem(Protocol):
    """What a kernel's configuration depends on, and what it may be. Hashable."""

    @property
    def kernel(self) -> str:
        """One of ALL_KERNELS."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products' operands."""

    def key(self) -> str:
        """How it is called in files, at torch's present precision; begins with the kernel."""

    def default(self, gpu: Gpu) -> Config:
        """The built-in table's configuration, made to fit."""

    def candidates(self, gpu: Gpu) -> list[Config]:
        """Every configuration worth measuring; all fit, and the table's is the first."""

    def fits(self, config: Config, gpu: Gpu) -> bool:
        """Whether the kernel can be launched with it, by an estimate."""


class Choice(NamedTuple):
    """A configuration, and how long it took `tune`'s call; None: the table's, never measured."""

    config: Config
    milliseconds: float | None


def family(gpu: Gpu) -> str:
    """Rows of the tables for a GPU; for an unknown one those of the nearest."""
    if gpu.arch in FAMILIES:
        return FAMILIES[gpu.arch]
    if gpu.arch.startswith("gfx"):
        return "gfx942"
    if gpu.shared < KNOWN_GPUS["sm_80"].shared:
        return "small"
    major = int(gpu.arch[3:-1])
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


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
        if kernel not in ALL_KERNELS:
            raise ValueError(f"override: kernel is {kernel!r}; it must be one of {ALL_KERNELS}")
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


_forgotten: list[Callable[[], None]] = []


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """functools.cache, until `forget`."""
    cached = functools.cache(function)
    _forgotten.append(cached.cache_clear)
    return cached  # type: ignore[return-value]  # it takes hashable arguments alone


def forget() -> None:
    """Reads the files of tuned configurations again at the next launch."""
    for clear in (tuning_store.load.cache_clear, tuning_store.shipped.cache_clear, *_forgotten):
        clear()


def configuration(problem: Problem, gpu: Gpu) -> Config:
    """The configuration to launch a kernel with."""
    precision = input_precision(problem.dtype)
    return overridden(problem.kernel) or choice(problem, gpu, precision).config


@remembered
def choice(problem: Problem, gpu: Gpu, precision: str) -> Choice:
    """The configuration without an `override`; precision is `input_precision`'s, as in the key."""
    own = _stored(tuning_store.load(gpu.name), problem, gpu)
    return own or shipped(problem, gpu) or Choice(problem.default(gpu), None)


def shipped(problem: Problem, gpu: Gpu) -> Choice | None:
    """What ships for the problem, if anything does."""
    return _stored(tuning_store.shipped(gpu.name), problem, gpu)


def _stored(stored: tuning_store.Stored, problem: Problem, gpu: Gpu) -> Choice | None:
    key = problem.key()
    if (entry := stored.entries.get(key)) is None:
        return None
    tuned = Config(*(entry["config"][field] for field in Config._fields))
    if problem.fits(tuned, gpu):
        return Choice(tuned, entry.get("milliseconds"))
    warnings.warn(
        f"the tuned configuration of {key!r}, {tuned}, does not fit {gpu.name} and is not "
        "used; run python -m mmkernels tune",
        stacklevel=2,
    )
    return None


def serving(gpu: Gpu) -> str:
    """Which tables serve this GPU, the first that has a problem before the others."""
    tables = []
    own, shipped = tuning_store.load(gpu.name), tuning_store.shipped(gpu.name)
    if own.entries:
        tables.append(f"{len(own.entries)} measured here, in {tuning_store.path(gpu.name)}")
    if shipped.entries:
        tables.append(f"{len(shipped.entries)} shipped, in {tuning_store.shipped_path(gpu.name)}")
    return "; ".join([*tables, f"the built-in table of {family(gpu)}, never measured"])


def note(gpu: Gpu) -> str | None:
    """What a user should know of the choice for this GPU: a foreign row, a file not of today."""
    own, shipped = tuning_store.load(gpu.name), tuning_store.shipped(gpu.name)
    parts = [own.note, shipped.note]
    if gpu.arch not in KNOWN_GPUS:
        parts.insert(
            0,
            f"{gpu.arch} is not in the table of configurations; those of {family(gpu)}, fitted to "
            f"{gpu.shared // KIB} KiB, serve; measure with python -m mmkernels tune",
        )
    served = [entry for key, entry in shipped.entries.items() if key not in own.entries]
    if old := sum(not tuning_store.is_of_these_kernels(entry) for entry in served):
        parts.append(
            f"{old} shipped configurations were measured with another triton or other kernels and "
            "serve all the same; python -m mmkernels tune measures them anew"
        )
    return "; ".join(filter(None, parts)) or None
