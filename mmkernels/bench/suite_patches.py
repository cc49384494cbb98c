"""The suite of patch embeddings: images, spectrograms, videos and patches that come cut out."""

import functools
from typing import NamedTuple

import torch

from mmkernels.bench.case import Case
from mmkernels.bench.patch_problem import PatchProblem, Shape

FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"
SIDES = ((224, 224), (160, 256), (384, 288), (112, 336), (320, 320), (192, 128), (256, 416))


class Model(NamedTuple):
    """An embedding, and how many samples it is measured with.

    Attributes:
        shape: of one sample.
        gpu: samples that fill a GPU.
        cpu: samples for a few cores.
    """

    shape: Shape
    gpu: int
    cpu: int


class Choice(NamedTuple):
    """What is measured of a model.

    Attributes:
        model: of MODELS.
        dtype: of the parameters, and of the pixels if those are no bytes.
        image_bytes: whether pixels are uint8, to be normalised.
        mode: FORWARD or FORWARD_BACKWARD.
    """

    model: str
    dtype: torch.dtype
    image_bytes: bool = False
    mode: str = FORWARD


VIT, SIGLIP, AST = "ViT-B/16 224", "SigLIP-so400m/14 384", "AST 128×1024"
VIDEO, CUT_OUT, MIXED = "VideoMAE-B 16×224", "Qwen2-VL", "ViT-B/16, images of mixed size"
MODELS = {
    VIT: Model(Shape(3, (224, 224), (16, 16), 768, prefix=1), 256, 4),
    SIGLIP: Model(Shape(3, (384, 384), (14, 14), 1152), 128, 2),
    "CLIP-L/14 336": Model(Shape(3, (336, 336), (14, 14), 1024, prefix=1, bias=False), 128, 2),
    "DINOv2-B/14 224": Model(Shape(3, (224, 224), (14, 14), 768, prefix=1), 256, 4),
    AST: Model(
        Shape(1, (128, 1024), (16, 16), 768, prefix=2, stride=(10, 10), transposed=True), 64, 2
    ),
    VIDEO: Model(Shape(3, (16, 224, 224), (2, 16, 16), 768), 32, 1),
    # What its processor makes of 16 images of 448 × 448, or of one.
    CUT_OUT: Model(
        Shape(3, (2, 14, 14), (2, 14, 14), 1280, bias=False, positions=False, flattened=True),
        16384,
        1024,
    ),
    MIXED: Model(Shape(3, SIDES[0], (16, 16), 768, mixed=SIDES), 4, 1),
}
HALF, SINGLE = torch.bfloat16, torch.float32
# The few that tell most, with torch.compile where it takes long.
COMPILED = [Choice(VIT, HALF, True), Choice(VIT, HALF, False, FORWARD_BACKWARD)]
QUICK = [
    *COMPILED,
    Choice(SIGLIP, HALF),
    Choice(MIXED, HALF),
    Choice(AST, SINGLE),
    Choice(VIDEO, HALF),
    Choice(CUT_OUT, HALF),
]
BYTES = (VIT, SIGLIP, VIDEO, MIXED)
TRAINED = (VIT, AST, VIDEO, MIXED)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases, the most telling first; see `suites.cases`."""
    chosen = QUICK if quick else QUICK + _all()
    if device.type == "cpu":
        chosen = [_for_a_cpu(choice) for choice in chosen]
    chosen = list(dict.fromkeys(chosen))
    return [_case(choice, device, quick) for choice in chosen]


def _all() -> list[Choice]:
    return [
        Choice(model, dtype, image_bytes, mode)
        for mode in (FORWARD, FORWARD_BACKWARD)
        for model in MODELS
        for image_bytes in (False, True)
        for dtype in (HALF, SINGLE)
        if not (image_bytes and model not in BYTES)
        and not (mode == FORWARD_BACKWARD and (image_bytes or model not in TRAINED))
    ]


def _for_a_cpu(choice: Choice) -> Choice:
    """In float32, if it is a convolution that takes seconds on CPUs that know no bfloat16."""
    slow = choice.dtype == HALF and len(MODELS[choice.model].shape.kernel) == 3
    return choice._replace(dtype=SINGLE) if slow else choice


def _case(choice: Choice, device: torch.device, quick: bool) -> Case:
    on_gpu = device.type == "cuda"
    model = MODELS[choice.model]
    batch = model.gpu if on_gpu else model.cpu
    shape = model.shape._replace(batch=batch, mixed=model.shape.mixed * batch)
    if quick and not on_gpu:
        shape = shape.quick()
    # All on a GPU; few where that takes too much of the time; none in a smoke test.
    compiled = (on_gpu and not quick) or ((on_gpu or not quick) and choice in COMPILED)
    make = functools.partial(
        PatchProblem, shape, choice.dtype, device, image_bytes=choice.image_bytes,
        backward=choice.mode == FORWARD_BACKWARD, compiled=compiled,
    )  # fmt: skip
    text = shape.text("uint8" if choice.image_bytes else "")
    return Case("patches", choice.model, text, "", choice.dtype, choice.mode, make)
