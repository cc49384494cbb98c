"""`python -m tools.cuda_pipes`: rewrites what docs/cuda-kernels.md says of each kernel's load.

The CUDA kernels' PTX, as nvcc makes it, runs in the emulator that MMKERNELS_PTXSIM points to, which
counts instructions. `tools/pipes.py` does the same for the Triton kernels.
"""

import functools
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention.interval import IntervalMask
from tools.generated import ROOT, replaced, table

PAGE = ROOT / "docs" / "cuda-kernels.md"
BLOCK = "cuda pipes"
HEADER = [
    "kernel", "for", "head dim", "S", "mask", "useful share of MMA FLOPs", "issue ÷ tensor",
    "exp2 ÷ tensor", "shared memory ÷ tensor", "ceiling, TFLOP/s", "serial, TFLOP/s",
]  # fmt: skip
NAMES = {"sm_80": "8.0 and newer", "sm_90a": "Hopper"}


class Case(NamedTuple):
    """One head of a kernel's call, in bfloat16."""

    kernel: str
    arch: str
    head_dim: int
    length: int
    mask: str


CASES = [
    Case("forward", arch, head_dim, length, mask)
    for arch, head_dim, length in (
        *(("sm_80", head_dim, 1024) for head_dim in (64, 128)),
        *(("sm_90a", head_dim, 1024) for head_dim in (64, 80, 96, 128)),
        *(("sm_90a", head_dim, 2048) for head_dim in (64, 128)),
    )
    for mask in ("full", "causal")
]
CASES += [
    Case(kernel, arch, head_dim, 1024, mask)
    for kernel, arch, head_dims in (
        ("backward", "sm_80", (64, 128)),
        ("backward", "sm_90a", (64, 80, 96, 128)),
        ("backward, any order", "sm_90a", (64, 128)),
    )
    for head_dim in head_dims
    for mask in ("full", "causal")
]


def bounds(case: Case) -> IntervalMask | None:
    """The mask of a case."""
    return None if case.mask == "full" else mm.masks.causal(case.length)


def visible_pairs(case: Case) -> int:
    """Pairs of row and key."""
    mask = bounds(case)
    return case.length**2 if mask is None else int((mask.end - mask.start).sum())


def _forward(case: Case) -> list[tuple[Any, int]]:
    from tests import cuda_harness

    length = case.length
    qkv = testing.make_qkv(1, length, length, 1, 1, case.head_dim, dtype=torch.bfloat16)
    tensors, mask = [cuda_harness.on_device(x) for x in qkv], bounds(case)
    ends = () if mask is None else map(cuda_harness.on_device, (mask.start, mask.end))
    result = cuda_harness.attention_forward(*tensors, *ends, arch=case.arch)[2]
    return [(result, 4 * case.head_dim * visible_pairs(case))]


def _backward(case: Case) -> list[tuple[Any, int]]:
    from tests.attention import cuda_backward

    shape = (1, case.length, case.length, 1, 1)
    problem = cuda_backward.problem(shape, case.head_dim, mask=bounds(case))
    keys, queries = cuda_backward.run(problem, arch=case.arch)[1]
    pairs = visible_pairs(case)
    # Five products are asked for; the second kernel makes two of them again for the fifth.
    return [(keys, 8 * case.head_dim * pairs), (queries, 2 * case.head_dim * pairs)]


def _backward_in_any_order(case: Case) -> list[tuple[Any, int]]:
    from tests.attention import cuda_backward

    shape = (1, case.length, case.length, 1, 1)
    problem = cuda_backward.problem(shape, case.head_dim, mask=bounds(case))
    keys = cuda_backward.run(problem, arch=case.arch, deterministic=False)[1][0]
    # What is left to the other kernels multiplies nothing.
    return [(keys, 10 * case.head_dim * visible_pairs(case))]


# Of a kernel: what the emulator counted of each launch, and the FLOPs asked of it.
COUNTED: dict[str, Callable[[Case], list[tuple[Any, int]]]] = {
    "forward": _forward,
    "backward": _backward,
    "backward, any order": _backward_in_any_order,
}


def row(case: Case) -> list[str]:
    """The table's row of a case; of several launches the clocks are added."""
    launches = [
        result.pipes(flops) | {"flops": flops} for result, flops in COUNTED[case.kernel](case)
    ]
    flops = sum(pipes["flops"] for pipes in launches)

    def clocks(pipe: str) -> float:
        return sum(pipes[pipe] for pipes in launches)

    tensor = clocks("tensor cores (wgmma rate)")
    share = flops / (tensor * 4096)
    ratios = [
        clocks(pipe) / tensor
        for pipe in ("issue slots", "exp2 and other MUFU", "shared memory wavefronts")
    ]
    rates = [
        flops / sum(pipes["flops"] / pipes[rate] for pipes in launches)
        for rate in ("ceiling, TFLOP/s", "serial, TFLOP/s")
    ]
    cells = [case.kernel, NAMES[case.arch], str(case.head_dim), str(case.length), case.mask]
    figures = [*(f"{x:.2f}" for x in (share, *ratios)), *(f"{x:.0f}" for x in rates)]
    return cells + figures


@functools.cache
def compiler() -> str:
    """nvcc and its version, on which all counts depend."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', text)[1]}"


def block() -> str:
    """What stands between the comments."""
    head = (
        f"bfloat16, one head, {compiler()}; counted in an emulator of the kernels' instructions, "
        "beside the clocks that an H100's tensor cores need at the rate of `wgmma`; not measured "
        "on a GPU."
    )
    return f"{head}\n\n{table(HEADER, [row(case) for case in CASES])}"


def main() -> None:
    """Rewrites the block in docs/cuda-kernels.md."""
    PAGE.write_text(replaced(PAGE.read_text(), BLOCK, block()))


if __name__ == "__main__":
    main()
