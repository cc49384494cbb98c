"""Decoding: one new token a sequence against a KV cache, contiguous or paged."""

from collections.abc import Iterator

import torch

from mmkernels.bench.case import Case
from mmkernels.bench.decode_peers import peers
from mmkernels.bench.decode_problem import CacheSize, DecodeProblem

# Query heads, key heads, head dim.
MODELS = {
    "Llama-3-8B": (32, 8, 128),
    "Qwen2.5-7B": (28, 4, 128),
    "SmolLM2-135M": (9, 3, 64),
}
# Model, batch, longest sequence, paged, dtype.
Plan = Iterator[tuple[str, int, int, bool, torch.dtype]]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The suite; as `mmkernels.bench.suites.cases`."""
    if device.type == "cuda":
        plan = _gpu_quick() if quick else _gpu()
    else:
        plan = _toy() if quick else _cpu()
    found = []
    for index, (model, batch, seqlen, paged, dtype) in enumerate(plan):
        compiles = not quick and (device.type == "cuda" or index == 0)
        size = CacheSize(batch, seqlen, *MODELS[model])
        found.append(_case(model, size, paged, dtype, device, compiles))
    return found


def _gpu() -> Plan:
    for model in MODELS:
        for batch, seqlen in ((32, 4096), (32, 16384), (1, 4096), (1, 16384)):
            for paged in (True, False):
                yield model, batch, seqlen, paged, torch.bfloat16


def _gpu_quick() -> Plan:
    yield "Llama-3-8B", 32, 4096, True, torch.bfloat16
    yield "Llama-3-8B", 1, 16384, False, torch.bfloat16


def _cpu() -> Plan:
    for model in MODELS:
        yield model, 4, 2048, True, torch.float32
        yield model, 4, 2048, False, torch.bfloat16
        yield model, 1, 4096, False, torch.float32


def _toy() -> Plan:
    yield "SmolLM2-135M", 2, 64, True, torch.float32
    yield "SmolLM2-135M", 2, 64, False, torch.bfloat16
    yield "SmolLM2-135M", 1, 64, False, torch.float32


def _case(
    model: str,
    size: CacheSize,
    paged: bool,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
) -> Case:
    name = f"{model}, paged" if paged else model

    def make() -> DecodeProblem:
        beside = peers(size.batch, paged, device, compiles)
        return DecodeProblem(size, dtype, device, paged, beside)

    return Case("decode", name, str(size), "", dtype, "decode", make)
