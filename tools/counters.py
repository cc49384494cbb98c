"""What the emulator counts in a fixed set of kernels: the part of `make bench-check` that is exact.

Counts depend on the sources and on the compiler that made PTX of them, and on nothing else: two
runs, and two machines, give the same. The emulator is found through MMKERNELS_PTXSIM.
"""

import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import triton_runtime
from tools import cuda_pipes, patch_pipes, pipes

# The emulator's name of a counter -> the baseline's. Sectors are 32 bytes of global memory.
COUNTERS = {
    "warp_insts": "warp instructions",
    "gld_sectors": "sectors read",
    "gst_sectors": "sectors written",
    "tma_ld_bytes": "TMA bytes read",
    "tma_st_bytes": "TMA bytes written",
    "lds_conflict": "load bank conflicts",
    "sts_conflict": "store bank conflicts",
    "mma_flops": "MMA FLOPs",
}
PROCESSES = 2
LENGTH = 512
MASKS = {
    "full": lambda: None,
    "causal": lambda: mm.masks.causal(LENGTH),
    "window 128": lambda: mm.masks.window(LENGTH, window_size=(127, 0)),
}
EMBEDDINGS = [
    patch_pipes.Case("patches of 16, bytes", 4, 112, 16, 384, 1, torch.uint8),
    patch_pipes.Case("patches of 14, bfloat16", 3, 112, 14, 384, 0, torch.bfloat16),
]

# kernel -> counter -> its value.
Counts = dict[str, dict[str, int]]
# case -> what it counts.
Baseline = dict[str, Counts]
# Kernels of one call and what the emulator counted in each.
Launches = list[tuple[str, Mapping[str, Any]]]


def _attention(arch: str, head_dim: int, mask: str) -> Launches:
    made = testing.make_qkv(1, LENGTH, LENGTH, 2, 1, head_dim, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in made]

    def call() -> None:
        out = mm.attention(*leaves, mask=MASKS[mask](), backend="triton")
        out.backward(torch.ones_like(out))

    return [(done.kernel, done.result) for done in pipes.emulated(call, arch)]


def _decode(arch: str, page_size: int | None) -> Launches:
    lengths, heads, kv_heads, head_dim = torch.tensor([512, 301]).int(), 8, 2, 128
    q = torch.zeros(2, 1, heads, head_dim, dtype=torch.bfloat16)
    pages = 1 if page_size is None else LENGTH // page_size
    cache = torch.zeros(2 * pages, LENGTH // pages, kv_heads, head_dim, dtype=torch.bfloat16)
    table = None if page_size is None else torch.arange(2 * pages).int().view(2, pages)

    def call() -> None:
        mm.attention_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, block_table=table, backend="triton"
        )

    return [(done.kernel, done.result) for done in pipes.emulated(call, arch)]


def _patches(arch: str, embedding: patch_pipes.Case) -> Launches:
    return [(done.kernel, done.result) for done in patch_pipes.launches(embedding, arch)]


def _cuda_attention(case: cuda_pipes.Case) -> Launches:
    return [(_name(result), result) for result, _ in cuda_pipes.COUNTED[case.kernel](case)]


def _cuda_patches(arch: str, embedding: patch_pipes.Case) -> Launches:
    from tests.patch_embed import cases, cuda_harness

    run = cuda_harness.run(cases.Case(*embedding.arguments()), arch=arch)
    return [(_name(result), result) for result in run.launches]


def _name(result: Mapping[str, Any]) -> str:
    """The function's name in a mangled one."""
    return re.findall(r"\d([a-z_]+_kernel)", result["kernel"])[-1]


def _triton_cases() -> Iterator[tuple[str, Callable[[], Launches]]]:
    for arch in ("sm_90", "sm_80"):
        for head_dim, mask in ((64, "causal"), (128, "full"), (80, "window 128")):
            name = f"attention, {arch}, D{head_dim}, {mask}"
            yield name, lambda a=arch, d=head_dim, m=mask: _attention(a, d, m)
        for page_size in (None, 64):
            name = f"decode, {arch}, {'contiguous' if page_size is None else 'pages of 64'}"
            yield name, lambda a=arch, p=page_size: _decode(a, p)
        for embedding in EMBEDDINGS:
            name = f"patch embedding, {arch}, {embedding.name}"
            yield name, lambda a=arch, e=embedding: _patches(a, e)


def _cuda_cases() -> Iterator[tuple[str, Callable[[], Launches]]]:
    for kernel, arch, head_dim, mask in (
        *(("backward", arch, 128, "full") for arch in ("sm_90a", "sm_80")),
        *(("backward", arch, 64, "causal") for arch in ("sm_90a", "sm_80")),
        ("backward, any order", "sm_90a", 64, "causal"),
        *(("forward", arch, 128, "full") for arch in ("sm_90a", "sm_80")),
        *(("forward", arch, 64, "causal") for arch in ("sm_90a", "sm_80")),
        *(("forward", arch, 80, "causal") for arch in ("sm_90a", "sm_80")),
    ):
        case = cuda_pipes.Case(kernel, arch, head_dim, LENGTH, mask)
        name = f"attention {kernel}, {arch}, D{head_dim}, {mask}"
        yield name, lambda c=case: _cuda_attention(c)
    for arch in ("sm_90a", "sm_80"):
        for embedding in EMBEDDINGS:
            name = f"patch embedding, {arch}, {embedding.name}"
            yield name, lambda a=arch, e=embedding: _cuda_patches(a, e)


class Part(NamedTuple):
    """The kernels that one compiler makes.

    Attributes:
        cases: by name, what runs one in the emulator.
        compiler: names it, with its version.
        missing: why it cannot be run here; None if it can.
    """

    cases: dict[str, Callable[[], Launches]]
    compiler: Callable[[], str]
    missing: Callable[[], str | None]


def _no_triton() -> str | None:
    if triton_runtime.interpreted():
        return "TRITON_INTERPRET is set; run the same with TRITON_INTERPRET=0"
    return triton_runtime.import_error()


def _no_nvcc() -> str | None:
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


PARTS = {
    "Triton": Part(dict(_triton_cases()), pipes.triton_version, _no_triton),
    "CUDA": Part(dict(_cuda_cases()), cuda_pipes.compiler, _no_nvcc),
}


def missing(part: str) -> str | None:
    """Why the kernels of a part of PARTS cannot be counted here; None if they can."""
    folder = os.environ.get("MMKERNELS_PTXSIM")
    if not folder or not Path(folder).is_dir():
        return f"MMKERNELS_PTXSIM is {folder or 'not set'}; it must be the emulator's folder"
    return PARTS[part].missing()


def counted(part: str, case: str) -> Counts:
    """The counters of each kernel that a case of a part launches."""
    counts: Counts = {}
    for kernel, result in PARTS[part].cases[case]():
        name, again = kernel, 1
        while name in counts:
            again += 1
            name = f"{kernel} {again}"
        counts[name] = {ours: result[theirs] for theirs, ours in COUNTERS.items()}
    return counts


def counted_all(part: str, step: Callable[[str], None]) -> Baseline:
    """`counted` of every case of a part, in PROCESSES processes; `step` hears of each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        futures = {case: pool.submit(counted, part, case) for case in PARTS[part].cases}
        baseline = {}
        for case, future in futures.items():
            try:
                baseline[case] = future.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{part}, {case}: {error}") from error
            step(case)
    return baseline
