"""Attention's forward and backward pass under the masks of real models, at their shapes."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmkernels.bench import attention_masks as masks
from mmkernels.bench.attention_masks import BenchMask
from mmkernels.bench.attention_peers import peers
from mmkernels.bench.attention_problem import AttentionProblem, Size
from mmkernels.bench.case import Case


class Shape(NamedTuple):
    """Of one model's attention."""

    size: Size
    mask: BenchMask


class Model(NamedTuple):
    """A model at a size that fills a GPU, at one for a CPU, and at one for a smoke test."""

    name: str
    gpu: Shape
    cpu: Shape
    toy: Shape


def _vision(name: str, batch: int, *size: int) -> Model:
    """Bidirectional; `size`: S, H, D."""
    shapes = [
        Shape(Size(b, s, h, h, d), masks.full())
        for b, s, h, d in ((batch, *size), (1, *size), (1, 50, 2, 16))
    ]
    return Model(name, *shapes)


# Patches of 14 × 14 of images whose sides are multiples of 28, as the model merges 2 × 2 of them.
PHOTOS = (32 * 48, 40 * 40, 24 * 24, 76 * 42, 16 * 20, 48 * 64, 30 * 52, 64 * 36)
FEW_PHOTOS = (24 * 32, 16 * 20, 24 * 20)
# Prompts of a batch, as unequal as they come.
PROMPTS = tuple(128 + 28 * i for i in range(32))

# The most telling first.
MODELS = (
    Model(
        "PaliGemma 3B 448",  # 1024 tokens of image and 64 of prompt, then the answer
        Shape(Size(16, 1216, 8, 1, 256), masks.prefix_lm(1088, 1216)),
        Shape(Size(1, 1216, 8, 1, 256), masks.prefix_lm(1088, 1216)),
        Shape(Size(1, 64, 2, 1, 16), masks.prefix_lm(40, 64)),
    ),
    Model(
        "Qwen2.5-VL vision",
        Shape(Size(1, sum(PHOTOS), 16, 16, 80), masks.packed("images", PHOTOS)),
        Shape(Size(1, sum(FEW_PHOTOS), 16, 16, 80), masks.packed("images", FEW_PHOTOS)),
        Shape(Size(1, 48, 2, 2, 16), masks.packed("images", (24, 8, 16))),
    ),
    Model(
        "Gemma 3 4B, local layer",
        Shape(Size(2, 8192, 8, 4, 256), masks.window(1024, 8192)),
        Shape(Size(1, 4096, 8, 4, 256), masks.window(1024, 4096)),
        Shape(Size(1, 64, 4, 2, 16), masks.window(16, 64)),
    ),
    Model(
        "Gemma 3 4B, images in text",
        Shape(Size(2, 4096, 8, 4, 256), masks.image_spans(4, 256, 4096)),
        Shape(Size(1, 1536, 8, 4, 256), masks.image_spans(2, 256, 1536)),
        Shape(Size(1, 64, 4, 2, 16), masks.image_spans(2, 16, 64)),
    ),
    Model(
        "SmolLM2-135M, batch of prompts",
        Shape(Size(32, 1024, 9, 3, 64), masks.left_padding(PROMPTS, 1024)),
        Shape(Size(4, 512, 9, 3, 64), masks.left_padding((512, 380, 200, 96), 512)),
        Shape(Size(2, 64, 3, 1, 16), masks.left_padding((64, 40), 64)),
    ),
    _vision("SigLIP-so400m/14 384", 32, 729, 16, 72),
    Model(
        "Qwen2.5-7B",
        Shape(Size(2, 4096, 28, 4, 128), masks.causal(4096)),
        Shape(Size(1, 1024, 28, 4, 128), masks.causal(1024)),
        Shape(Size(1, 64, 4, 2, 16), masks.causal(64)),
    ),
    Model(
        "Qwen2.5-VL vision, windowed layer",  # windows of 8 × 8 patches
        Shape(Size(1, 12288, 16, 16, 80), masks.packed("windows", (64,) * 192)),
        Shape(Size(1, 1536, 16, 16, 80), masks.packed("windows", (64,) * 24)),
        Shape(Size(1, 64, 2, 2, 16), masks.packed("windows", (16,) * 4)),
    ),
    _vision("ViT-B/16 224", 128, 197, 12, 64),
    _vision("DINOv2-L/14 518", 16, 1370, 16, 64),
    _vision("Whisper-large-v3 encoder", 16, 1500, 20, 64),
)
BY_NAME = {model.name: model for model in MODELS}
QUICK = (
    "PaliGemma 3B 448", "Qwen2.5-VL vision", "Gemma 3 4B, local layer", "SigLIP-so400m/14 384",
    "Qwen2.5-7B",
)  # fmt: skip
# Where the peers that are slow to time or to compile take part on a CPU.
TELLING = ("PaliGemma 3B 448", "Qwen2.5-VL vision")
# Of each mask one.
DIFFERENT = (*QUICK, "Gemma 3 4B, images in text", "SmolLM2-135M, batch of prompts")
TRAINED_ON_CPU = ("PaliGemma 3B 448", "Qwen2.5-7B", "Qwen2.5-VL vision, windowed layer")

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"


class Choice(NamedTuple):
    """One case: a model's name, dtype and mode, and whether slow peers and FlexAttention join."""

    name: str
    dtype: torch.dtype
    mode: str
    telling: bool = False
    with_flex: bool = False


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The suite; as `mmkernels.bench.suites.cases`."""
    on_gpu = device.type == "cuda"
    size = "gpu" if on_gpu else "toy" if quick else "cpu"
    plan = {
        "gpu": _gpu_quick() if quick else _gpu(),
        "cpu": _cpu(),
        "toy": _toy(),
    }[size]
    return [_case(choice, size, device) for choice in plan]


def _gpu() -> Iterator[Choice]:
    for name in BY_NAME:
        for mode in (FORWARD, BOTH, BACKWARD):
            yield Choice(name, torch.bfloat16, mode, mode != BACKWARD, True)
    for name in DIFFERENT:
        yield Choice(name, torch.float32, FORWARD)


def _gpu_quick() -> Iterator[Choice]:
    for name in QUICK:
        first = name in TELLING[:1]
        yield Choice(name, torch.bfloat16, FORWARD, first, True)
        yield Choice(name, torch.bfloat16, BOTH, False, first)


def _cpu() -> Iterator[Choice]:
    for name in BY_NAME:
        yield Choice(name, torch.bfloat16, FORWARD, name in TELLING, name in DIFFERENT)
    for name in DIFFERENT:
        yield Choice(name, torch.float32, FORWARD)
    for name in TRAINED_ON_CPU:
        yield Choice(name, torch.float32, BOTH)


def _toy() -> Iterator[Choice]:
    for name in DIFFERENT:
        yield Choice(name, torch.bfloat16, FORWARD)
    for name in TELLING:
        yield Choice(name, torch.float32, BOTH)


def _case(choice: Choice, at: str, device: torch.device) -> Case:
    name, dtype, mode, telling, with_flex = choice
    size, mask = getattr(BY_NAME[name], at)

    def make() -> AttentionProblem:
        beside = peers(mask, size, device, telling, with_flex)
        return AttentionProblem(size, mask, dtype, mode, device, beside)

    return Case("attention", name, str(size), mask.name, dtype, mode, make)
