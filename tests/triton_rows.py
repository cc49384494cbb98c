"""`python -m tests.triton_rows sm_90 bfloat16`: what the table's configurations compile to.

One row is one kernel as a call of `mm.attention` or `mm.attention_with_kvcache` launches it on one
GPU, with the configuration that the table gives. Needs triton, and TRITON_INTERPRET=0.
"""

import functools
import itertools
import sys
from typing import Any, NamedTuple

import torch
from triton.compiler.errors import CompilationError

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import tuning
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from tests.triton_harness import Launch, Resources, recording_launcher, resources
from tests.triton_sass import Loop, disassembled, product_loops

# Kernel of the table -> its function.
FUNCTIONS = {
    "forward": "forward_kernel",
    "backward_keys": "keys_kernel",
    "backward_queries": "queries_kernel",
    "backward_bias": "bias_kernel",
    "decode": "decode_kernel",
}
# Whose last loop runs only where a NaN was found, with a bias or a mask that may hide it.
CAREFUL = ("forward", "backward_queries")
# What changes the code of a kernel: of decode also pages, and more queries than one.
VARIANTS = ("bias", "ALiBi", "softcap", "dropout", "sinks")
DECODE_VARIANTS = ("pages", "queries", "ALiBi", "softcap", "sinks")
LENGTH, HEADS, KV_HEADS, PAGE_SIZE = 512, 4, 2, 128


class Row(NamedTuple):
    """A kernel and what its code depends on."""

    arch: str
    kernel: str
    head_dim: int
    dtype: torch.dtype
    masked: bool
    variant: str = "plain"

    def __str__(self) -> str:
        words = [
            self.arch,
            self.kernel,
            f"D{self.head_dim}",
            str(self.dtype).removeprefix("torch."),
        ]
        words += ["mask"] * self.masked
        return " ".join(words + [self.variant] * (self.variant != "plain"))

    @property
    def has_bias(self) -> bool:
        return self.variant == "bias" or self.kernel == "backward_bias"

    @property
    def problem(self) -> tuning.Problem:
        return tuning.Problem(
            self.kernel, self.head_dim, self.head_dim, self.dtype, self.masked, self.has_bias
        )

    @property
    def config(self) -> tuning.Config:
        return self.problem.default(KNOWN_GPUS[self.arch])


class Report(NamedTuple):
    """What became of a row.

    Attributes:
        config: as launched.
        resources: of a block.
        estimate: of its shared memory, by the table.
        loops: those that run in every call; not looked at on AMD.
        careful: the one that only a NaN starts, if the kernel has one.
    """

    config: tuning.Config
    resources: Resources
    estimate: int
    loops: list[Loop]
    careful: Loop | None

    def __str__(self) -> str:
        parts = [
            f"{'x'.join(map(str, self.config)):12}",
            f"shared {self.resources.shared:6} of {self.estimate:6}",
            f"registers {self.resources.registers:3}",
            f"stack {self.resources.stack:4}",
            " ".join(["wgmma"] * self.resources.hgmma + ["TMA"] * self.resources.tma),
        ]
        for loop in self.loops:
            parts.append(
                f"[{loop.products} products, {loop.spills} STL, {loop.reloads} LDL of "
                f"{loop.instructions}]"
            )
        if self.careful is not None:
            parts.append(f"careful: {self.careful.spills} STL, {self.careful.reloads} LDL")
        return "  ".join(parts)


def _options(variant: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "plain": lambda: {},
        "bias": lambda: {"bias": torch.zeros(1, HEADS, LENGTH, LENGTH, dtype=dtype)},
        "ALiBi": lambda: {"alibi_slopes": torch.ones(HEADS)},
        "softcap": lambda: {"softcap": 30.0},
        "dropout": lambda: {"dropout_p": 0.1},
        "sinks": lambda: {"sinks": torch.zeros(HEADS)},
    }.get(variant, lambda: {})()


@functools.lru_cache(maxsize=8)
def _launches(
    arch: str, head_dim: int, dtype: torch.dtype, masked: bool, variant: str
) -> list[Launch]:
    """Of one forward and backward call."""
    qkv = testing.make_qkv(1, LENGTH, LENGTH, HEADS, KV_HEADS, head_dim, dtype=dtype)
    leaves = [x.requires_grad_() for x in qkv]
    options = _options(variant, dtype)
    options = {name: x.requires_grad_() if name == "bias" else x for name, x in options.items()}
    launcher = recording_launcher(KNOWN_GPUS[arch])
    emulate(launcher)
    try:
        mask = mm.masks.causal(LENGTH) if masked else None
        out = mm.attention(*leaves, mask=mask, backend="triton", **options)
        out.backward(torch.zeros_like(out))
    finally:
        emulate(None)
    return launcher.run.launches


def _decode_launches(arch: str, head_dim: int, dtype: torch.dtype, variant: str) -> list[Launch]:
    """Of one call, whose few heads leave the GPU room for shares of the keys."""
    length = 8 if variant == "queries" else 1
    q, k, v = testing.make_qkv(1, length, LENGTH, HEADS, KV_HEADS, head_dim, dtype=dtype)
    options = _options(variant, dtype)
    if variant == "pages":
        k, v = (x.view(-1, PAGE_SIZE, KV_HEADS, head_dim) for x in (k, v))
        options["block_table"] = torch.arange(LENGTH // PAGE_SIZE, dtype=torch.int32)[None]
    launcher = recording_launcher(KNOWN_GPUS[arch])
    emulate(launcher)
    try:
        mm.attention_with_kvcache(q, k, v, cache_seqlens=LENGTH, backend="triton", **options)
    finally:
        emulate(None)
    return launcher.run.launches


def launch_of(row: Row) -> Launch:
    """The launch of the row's kernel in a call with its variant."""
    if row.kernel == "decode":
        made = _decode_launches(row.arch, row.head_dim, row.dtype, row.variant)
        return next(x for x in made if x.kernel.__name__ == FUNCTIONS[row.kernel])
    variant = "bias" if row.has_bias else row.variant
    made = _launches(row.arch, row.head_dim, row.dtype, row.masked, variant)
    return next(x for x in made if x.kernel.__name__ == FUNCTIONS[row.kernel])


@functools.cache
def report(row: Row) -> Report:
    """Compiles the row's kernel and looks at the result."""
    launch = launch_of(row)
    compiled = launch.compile(row.arch)
    loops: list[Loop] = []
    careful = None
    if "cubin" in compiled.asm:
        loops = product_loops(disassembled(compiled))
        if row.kernel in CAREFUL and (row.masked or row.has_bias):
            *loops, careful = loops
    launched = {**launch.options, **launch.arguments}
    config = tuning.Config(*(launched[field] for field in tuning.Config._fields))
    # Pages take more stages, but no more buffers.
    counted = config._replace(num_stages=row.config.num_stages)
    estimate = tuning.shared_bytes(row.problem, counted, KNOWN_GPUS[row.arch])
    return Report(config, resources(compiled), estimate, loops, careful)


def root_cause(error: BaseException) -> str:
    """The last line of the first of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1]


def rows(archs: list[str], dtypes: list[torch.dtype], head_dims: list[int]) -> list[Row]:
    """Every row of these, the variants left out; decode's lengths are a mask."""
    every = itertools.product(archs, dtypes, head_dims, FUNCTIONS, (False, True))
    return [
        Row(arch, kernel, dim, dtype, masked)
        for arch, dtype, dim, kernel, masked in every
        if masked or kernel != "decode"
    ]


def main(arch: str, dtype: str = "bfloat16", *head_dims: str) -> None:
    """Prints a line a row."""
    dims = [int(dim) for dim in head_dims] or [64, 80, 96, 128, 256]
    for row in rows([arch], [getattr(torch, dtype)], dims):
        try:
            found = str(report(row))
        except CompilationError as error:
            found = f"does not compile: {root_cause(error)}"
        print(f"{row!s:45} {found}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
