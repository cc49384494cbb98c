"""`TRITON_INTERPRET=0 python -m tools.pipes`: rewrites what docs/performance.md says of each pipe.

The kernels' PTX for an H100 runs in the emulator that MMKERNELS_PTXSIM points to, which counts
instructions. From the clocks that each pipe of a multiprocessor needs for them follow two rates:
with all pipes overlapped, and with products and exponentials one after the other.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import triton_runtime
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from mmkernels.attention.interval import IntervalMask
from tools.generated import ROOT, replaced, table

PAGE = ROOT / "docs" / "performance.md"
BLOCK = "pipes"
LENGTH, HEADS = 2048, 2
MASKS = {
    "full": lambda: None,
    "causal": lambda: mm.masks.causal(LENGTH),
    "prefix-LM, prefix S/4": lambda: mm.masks.prefix_lm(LENGTH // 4, LENGTH),
    "window 256": lambda: mm.masks.window(LENGTH, window_size=(255, 0)),
    "8 packed documents": lambda: mm.masks.packed(torch.arange(9) * (LENGTH // 8)),
}
# Function of a kernel -> its name here, and its FLOPs a visible pair and head dim: 2 a product.
KERNELS = {
    "forward_kernel": ("forward", 4),
    "keys_kernel": ("backward, dk and dv", 8),
    "queries_kernel": ("backward, dq", 6),
}
BOTH, BOTH_FLOPS = "backward, both", 10  # five products, as publications count
HEADER = [
    "kernel", "mask", "D", "useful share of MMA FLOPs", "issue ÷ tensor", "ceiling, TFLOP/s",
    "serial, TFLOP/s",
]  # fmt: skip


class Case(NamedTuple):
    """One call, of which the forward kernel or those of the backward pass are looked at."""

    backward: bool
    mask: str
    head_dim: int


CASES = [
    *(Case(False, mask, dim) for mask in ("full", "causal") for dim in (64, 128)),
    *(Case(False, mask, 128) for mask in list(MASKS)[2:]),
    *(Case(True, mask, dim) for mask in ("full", "causal") for dim in (64, 128)),
]


def visible_pairs(mask: IntervalMask | None) -> int:
    """Pairs of row and key, over all heads."""
    pairs = LENGTH**2 if mask is None else int((mask.end - mask.start).sum())
    return pairs * HEADS


def emulated(call: Callable[[], object], arch: str = "sm_90") -> list[Any]:
    """The `kernel` and the `result` of every Triton launch of a call on CPU tensors.

    Args:
        call: uses the backend "triton" by name.
        arch: what the kernels are compiled for.

    Raises:
        RuntimeError: this process interprets Triton kernels.
    """
    if triton_runtime.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; run the same with TRITON_INTERPRET=0")
    from tests.triton_harness import ptxsim_launcher

    launcher = ptxsim_launcher(KNOWN_GPUS[arch], check=False)
    emulate(launcher)
    try:
        call()
    finally:
        emulate(None)
    return launcher.run.results


@functools.cache
def counted(case: Case) -> list[tuple[str, dict[str, float]]]:
    """The clocks and rates of the pipes of each kernel."""
    qkv = testing.make_qkv(1, LENGTH, LENGTH, HEADS, HEADS, case.head_dim, dtype=torch.bfloat16)
    leaves = [x.requires_grad_(case.backward) for x in qkv]
    mask = MASKS[case.mask]()

    def call() -> None:
        out = mm.attention(*leaves, mask=mask, backend="triton")
        if case.backward:
            out.backward(torch.ones_like(out))

    pairs = visible_pairs(mask)
    kernels = []
    for done in emulated(call):
        name, flops = KERNELS.get(done.kernel, ("", 0))
        if name.startswith("backward" if case.backward else "forward"):
            kernels.append((name, done.result.pipes(flops * case.head_dim * pairs)))
    return kernels


def rows(case: Case) -> list[list[str]]:
    """The table's rows of a case: one a kernel, and for the backward pass one of both."""
    kernels = counted(case)
    rates = ("ceiling, TFLOP/s", "serial, TFLOP/s")
    lines = []
    for name, pipes in kernels:
        ratio = pipes["issue slots"] / pipes["tensor cores (wgmma rate)"]
        share = pipes["useful share of MMA FLOPs"]
        cells = [f"{share:.2f}", f"{ratio:.2f}", *(f"{pipes[rate]:.0f}" for rate in rates)]
        lines.append([name, case.mask, str(case.head_dim), *cells])
    if case.backward:
        flops = dict(KERNELS.values())
        cells = [
            f"{BOTH_FLOPS / sum(flops[name] / pipes[rate] for name, pipes in kernels):.0f}"
            for rate in rates
        ]
        lines.append([BOTH, case.mask, str(case.head_dim), "", "", *cells])
    return lines


def triton_version() -> str:
    """Of the compiler, on which all counts depend."""
    return f"Triton {importlib.metadata.version('triton')}"


def block() -> str:
    """What stands between the comments."""
    head = (
        f"bfloat16, B1 H{HEADS} S{LENGTH}, the table's configurations for an H100, "
        f"{triton_version()}; counted in an emulator of its instructions, not measured on a GPU."
    )
    formula = (
        "Useful FLOPs are 2·D a product and visible pair: two products in the forward pass (4·D), "
        "four for dk and dv (8·D), three for dq (6·D). “Both” divides the five products that "
        "publications count (10·D) by the clocks of the two kernels together."
    )
    lines = [line for case in CASES for line in rows(case)]
    return "\n\n".join((head, table(HEADER, lines), formula))


def main() -> None:
    """Rewrites the block in docs/performance.md."""
    PAGE.write_text(replaced(PAGE.read_text(), BLOCK, block()))


if __name__ == "__main__":
    main()
