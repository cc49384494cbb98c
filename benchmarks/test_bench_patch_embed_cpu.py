"""Patch embedding on a CPU beside torch's and timm's, at the shapes of real models."""

import functools

import pytest
import torch

from benchmarks import patch_peers
from benchmarks.patch_peers import PatchProblem, Shape
from benchmarks.timing import clock, interleaved, speedup, summary

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    # The compiler warns of what is its own affair.
    pytest.mark.filterwarnings("default:::torch"),
]

PAIRS, QUICK_PAIRS = 9, 2
SHAPES = {
    "ViT-B/16 224, B1": Shape(1, 3, (224, 224), (16, 16), 768, prefix=1),
    "ViT-B/16 224, B8": Shape(8, 3, (224, 224), (16, 16), 768, prefix=1),
    "CLIP-L/14 336, B2": Shape(2, 3, (336, 336), (14, 14), 1024, prefix=1, bias=False),
    "SigLIP-so400m/14 384, B2": Shape(2, 3, (384, 384), (14, 14), 1152),
    "DINOv2-B/14 224, B8": Shape(8, 3, (224, 224), (14, 14), 768, prefix=1),
    "AST 128×1024, 16 / 10, B4": Shape(
        4, 1, (128, 1024), (16, 16), 768, prefix=2, stride=(10, 10), transposed=True
    ),
    "Qwen2-VL, 1024 patches 2×14×14": Shape(
        1024, 3, (2, 14, 14), (2, 14, 14), 1280, bias=False, positions=False, flattened=True
    ),
    "VideoMAE-B 16×224, 2×16×16, B1": Shape(1, 3, (16, 224, 224), (2, 16, 16), 768),
}
# Name -> the parameters' dtype, and whether pixels are bytes.
DTYPES = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "uint8 to float32": (torch.float32, True),
    "uint8 to bfloat16": (torch.bfloat16, True),
}
TRAINED = ("ViT-B/16 224, B8", "AST 128×1024, 16 / 10, B4", "VideoMAE-B 16×224, 2×16×16, B1")


def is_of_bytes(shape: str) -> bool:
    """Whether a model's pixels may be bytes: no spectrogram, and nothing that is cut out."""
    return SHAPES[shape].channels == 3 and not SHAPES[shape].flattened


CASES = [
    (shape, dtype, mode)
    for shape in SHAPES
    for dtype, (_, image_bytes) in DTYPES.items()
    for mode in ("forward", "forward + backward")
    if (is_of_bytes(shape) or not image_bytes) and (mode == "forward" or shape in TRAINED)
]


def target(shape: str, dtype: str) -> float:
    """The ratio to eager PyTorch to reach."""
    bfloat16_vit = dtype == "bfloat16" and shape.startswith("ViT")
    return 1.3 if bfloat16_vit or dtype.startswith("uint8") else 0.95


@functools.lru_cache(maxsize=1)
def problem(shape: Shape, dtype: str) -> PatchProblem:
    return PatchProblem(shape, *DTYPES[dtype])


@pytest.mark.parametrize(("shape", "dtype", "mode"), CASES)
def test_patch_embedding(benchmark, quick, shape, dtype, mode):
    pairs = QUICK_PAIRS if quick else PAIRS
    this = problem(SHAPES[shape].quick() if quick else SHAPES[shape], dtype)
    compiled = mode == "forward" and not quick and not patch_peers.why_not_compiled()
    solvers = this.solvers(mode != "forward", compiled)
    errors = {name: this.check(name, solver()) for name, solver in solvers.items()}
    times = interleaved(solvers, pairs)
    ours = times.pop("mmkernels")
    benchmark.extra_info.update(
        kind="patch embedding",
        shape=shape,
        dtype=dtype,
        mode=mode,
        target=target(shape, dtype),
        max_error=errors,
        ours=summary(ours),
        peers={name: {**summary(peer), **speedup(ours, peer)} for name, peer in times.items()},
    )
    clock.replay(benchmark, ours)
