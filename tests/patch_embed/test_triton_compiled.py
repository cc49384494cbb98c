"""Does every configuration of the patch embedding compile for its GPUs, fit, and spill nothing?"""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels._core import tuning
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from mmkernels._core.tuning_choice import Config
from mmkernels.patch_embed import triton_arguments, triton_config
from tests.triton_harness import Launch, recording_launcher, resources
from tests.triton_sass import disassembled, product_loops

pytestmark = pytest.mark.compiled
slow = pytest.mark.slow
bf16, fp32, u8 = torch.bfloat16, torch.float32, torch.uint8


class Shape(NamedTuple):
    """The embedding of a model: width, channels, patch, step, image, prefix tokens, statistics."""

    dim: int
    channels: int
    patch: tuple[int, ...]
    size: tuple[int, ...]
    stride: int | None = None
    prefix: int = 0
    std: tuple[float, ...] | None = None


SHAPES = {
    "ViT-B/16": Shape(768, 3, (16, 16), (224, 224), prefix=1, std=(0.5,) * 3),
    "SigLIP-so400m/14": Shape(1152, 3, (14, 14), (384, 384), std=(0.5,) * 3),
    "DINOv2-B/14": Shape(768, 3, (14, 14), (224, 224), prefix=1, std=(0.229, 0.224, 0.225)),
    "AST": Shape(768, 1, (16, 16), (128, 1024), stride=10, prefix=2),
    "VideoMAE-B": Shape(768, 3, (2, 16, 16), (16, 224, 224)),
    "audio frames": Shape(640, 1, (640,), (64000,)),
}


class Row(NamedTuple):
    """A kernel for a model's embedding, with tiles of the table for one GPU."""

    arch: str
    shape: str
    weight: torch.dtype
    pixels: torch.dtype
    kernel: str
    config: Config

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.pixels, self.weight)]
        return f"{self.arch} {self.kernel} {self.shape} {' to '.join(dtypes)} {self.config[:2]}"


def configs(arch: str, weight: torch.dtype) -> list[tuple[str, Config]]:
    row = triton_config.row(weight, KNOWN_GPUS[arch])
    return [*(("forward", config) for config in row.forward), ("weight", row.weight)]


def rows(archs: tuple[str, ...]) -> list[Row]:
    dtypes = ((bf16, bf16), (bf16, u8), (bf16, fp32), (fp32, fp32), (fp32, u8))
    return [
        Row(arch, shape, weight, pixels, kernel, config)
        for arch, shape, (weight, pixels) in itertools.product(archs, SHAPES, dtypes)
        for kernel, config in configs(arch, weight)
        # A spectrogram or video of bytes takes the same way as an image.
        if pixels != u8 or SHAPES[shape].std is not None
    ]


ROWS = rows(("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"))
AMD_ROWS = rows(("gfx942",))


def is_quick(row: Row) -> bool:
    """In the normal run: two families, 16 bit, and the shapes that most models have."""
    return (
        row.arch in ("sm_80", "sm_90")
        and row.weight == bf16
        and row.pixels in (bf16, u8)
        and row.shape in ("ViT-B/16", "SigLIP-so400m/14")
    )


def marked(made: list[Row]) -> list:
    return [pytest.param(row, id=str(row), marks=() if is_quick(row) else slow) for row in made]


@functools.lru_cache(maxsize=16)
def launches(row: Row) -> tuple[Launch, ...]:
    """Of a forward and backward call, with as many samples as every tile size is for."""
    shape = SHAPES[row.shape]
    pixels = torch.empty(1, shape.channels, *shape.size, dtype=row.pixels).expand(
        64, *(-1,) * (1 + len(shape.size))
    )
    weight = torch.empty(shape.dim, shape.channels, *shape.patch, dtype=row.weight)
    weight.requires_grad_()
    options = {"bias": torch.empty(shape.dim, dtype=row.weight), "stride": shape.stride}
    if shape.prefix:
        options["prefix_tokens"] = torch.empty(shape.prefix, shape.dim, dtype=row.weight)
    grid = [
        (n - k) // (shape.stride or k) + 1 for n, k in zip(shape.size, shape.patch, strict=True)
    ]
    tokens = shape.prefix + torch.Size(grid).numel()
    options["pos_embed"] = torch.empty(tokens, shape.dim, dtype=row.weight)
    if shape.std is not None and row.pixels != row.weight:
        options |= {"pixel_mean": shape.std, "pixel_std": shape.std}
    launcher = recording_launcher(KNOWN_GPUS[row.arch])
    emulate(launcher)
    try:
        with tuning.override(f"patch_{row.kernel}", row.config):
            out = mm.patch_embed(pixels, weight, backend="triton", **options)
            out.backward(torch.empty_like(out))
    finally:
        emulate(None)
    return tuple(launcher.run.launches)


@pytest.mark.parametrize("row", marked(ROWS))
def test_the_table_compiles_fits_and_spills_nothing(row):
    launch = next(x for x in launches(row) if x.kernel.__name__ == f"{row.kernel}_kernel")
    compiled = launch.compile(row.arch)
    used = resources(compiled)
    loops = product_loops(disassembled(compiled))
    wrong = []
    if used.shared > KNOWN_GPUS[row.arch].shared:
        wrong.append(f"{used.shared} bytes of shared memory")
    if not loops:
        wrong.append("no loop with products")
    wrong += [f"a loop with {loop.spills} spills" for loop in loops if loop.spills]
    if row.arch == "sm_90" and row.weight == bf16:
        if not used.hgmma:
            wrong.append("no products of four warps")
        if row.kernel == "forward" and not used.tma:
            wrong.append("no tensor map for the weight")
    assert not wrong, f"{row}: {'; '.join(wrong)}\n{used} {loops}"


@pytest.mark.parametrize("row", marked(AMD_ROWS))
def test_the_table_compiles_for_amd_and_fits(row):
    launch = next(x for x in launches(row) if x.kernel.__name__ == f"{row.kernel}_kernel")
    used = resources(launch.compile(row.arch))
    assert used.shared <= KNOWN_GPUS[row.arch].shared


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", ["ViT-B/16", "SigLIP-so400m/14"])
def test_no_division_in_the_loop_over_a_patch(shape, arch):
    """Where a patch lies is found outside: a division is some forty instructions of its own."""
    config = triton_config.row(bf16, KNOWN_GPUS[arch]).forward[0]
    row = Row(arch, shape, bf16, bf16, "forward", config)
    launch = next(x for x in launches(row) if x.kernel.__name__ == "forward_kernel")
    (loop,) = product_loops(disassembled(launch.compile(arch)))
    assert loop.special == 0  # a division begins with a reciprocal


def test_float64_pixels_are_narrowed_before_a_tile_holds_them():
    """Tiles of them would need more shared memory than any GPU has."""
    launcher = recording_launcher(KNOWN_GPUS["sm_90"])
    emulate(launcher)
    try:
        weight = torch.empty(768, 3, 16, 16, dtype=bf16, requires_grad=True)
        pixels = torch.empty(64, 3, 224, 224, dtype=torch.float64, requires_grad=True)
        out = mm.patch_embed(pixels, weight, backend="triton")
        out.backward(torch.empty_like(out))
    finally:
        emulate(None)
    read = [x.arguments["p_x"].dtype for x in launcher.run.launches if "p_x" in x.arguments]
    assert read == [fp32, fp32]
    assert pixels.grad.dtype == torch.float64


@pytest.mark.parametrize(
    ("rows", "dim", "wanted"),
    [(256 * 197, 768, (128, 256)), (32 * 197, 768, (128, 128)), (197, 768, (64, 64))],
)
def test_tiles_are_chosen_by_the_waves_that_they_make(rows, dim, wanted):
    """On 132 multiprocessors 150 of the largest tiles take two turns, the second nearly empty."""
    problem = triton_config.Problem("patch_forward", 64, bf16, bf16)
    assert triton_config.forward(problem, rows, dim, KNOWN_GPUS["sm_90"])[:2] == wanted


@pytest.mark.parametrize(
    ("patch", "wanted"),
    [
        ((16, 16), (16, 1, 4)),
        ((14, 14), (16, 1, 2)),
        ((8, 8), (8, 1, 8)),
        ((32, 32), (32, 1, 2)),
        ((4, 4), (4, 1, 4)),
        ((2, 2), (8, 1, 2)),
        ((7, 7), (16, 1, 1)),
        ((1, 640), (64, 10, 1)),
        ((1, 80), (32, 3, 1)),
        ((1, 3), (16, 1, 1)),
    ],
)
def test_layout(patch, wanted):
    """A row of a patch is filled up to a power of two; a step takes whole rows of it."""
    assert triton_arguments.layout(torch.Size((8, 3, 1, *patch))) == wanted
