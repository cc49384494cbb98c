"""How time and memory of attention grow when the sequence doubles."""

import torch

from mmkernels.bench import attention_masks as masks
from mmkernels.bench.attention_masks import BenchMask
from mmkernels.bench.attention_peers import peers
from mmkernels.bench.attention_problem import AttentionProblem, Size
from mmkernels.bench.case import OURS, Case

# (quick, full); the quick ones of a CPU are a smoke test.
GPU_SEQLENS = ((2048, 8192, 32768), (1024, 2048, 4096, 8192, 16384, 32768))
CPU_SEQLENS = ((64, 128), (512, 1024, 2048, 4096, 8192))
# Up to here the peer that writes every score down takes part.
EAGER_SEQLEN = 4096
# mmkernels and SDPA in any form, and one more.
CHOSEN = (OURS, "SDPA", "SDPA (is_causal)", "SDPA (dense mask)")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The suite; as `mmkernels.bench.suites.cases`."""
    on_gpu = device.type == "cuda"
    seqlens: tuple[int, ...] = (GPU_SEQLENS if on_gpu else CPU_SEQLENS)[not quick]
    heads, window, dtype = (16, 128), 1024, torch.bfloat16
    if not on_gpu:
        heads, window, dtype = (2, 64), 32 if quick else 256, torch.float32
    by_length = (
        [masks.window(window, seqlen) for seqlen in seqlens],
        [masks.causal(seqlen) for seqlen in seqlens],
        [masks.full() for _ in seqlens],
    )
    return [
        _case(Size(1, seqlen, heads[0], *heads), mask, dtype, device, quick)
        for kind in by_length
        for seqlen, mask in zip(seqlens, kind, strict=True)
    ]


def _case(
    size: Size, mask: BenchMask, dtype: torch.dtype, device: torch.device, quick: bool
) -> Case:
    def make() -> AttentionProblem:
        third = "eager"
        if mask.dense and device.type == "cuda" and not quick:  # it compiles for every length
            third = "FlexAttention"
        chosen = {*CHOSEN, third} if third != "eager" or size.seqlen <= EAGER_SEQLEN else {*CHOSEN}
        every = peers(mask, size, device, telling=True)
        beside = {name: prepare for name, prepare in every.items() if name in chosen}
        return AttentionProblem(size, mask, dtype, "forward", device, beside)

    return Case(
        "scaling", "attention", str(size), mask.name, dtype, "forward", make, scale=size.seqlen
    )
