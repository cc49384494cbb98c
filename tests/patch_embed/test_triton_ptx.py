"""Are the compiled patch embedding kernels right? Their PTX runs in the emulator, both passes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import tuning
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from mmkernels.patch_embed import triton_config
from tests.patch_embed.cases import (
    CASES,
    EQUAL,
    IMAGENET,
    Case,
    check,
    image_bytes,
    normal,
    weights,
)
from tests.triton_harness import Emulation, on_device, ptxsim_launcher

pytestmark = [pytest.mark.compiled, pytest.mark.ptxsim]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def placed(x: Any) -> Any:
    """As on a GPU: what lies around a tensor may not be read. Strides other than dense are kept."""
    return on_device(x) if isinstance(x, Tensor) and x.is_contiguous() else x


def emulated(
    case: Case, arch: str, processors: int | None = None
) -> tuple[dict[str, Tensor], list[Emulation]]:
    """The case's results by the emulator, and what that counted."""
    gpu = KNOWN_GPUS[arch]
    if processors is not None:
        gpu = dataclasses.replace(gpu, processors=processors)
    launcher = ptxsim_launcher(gpu)
    emulate(launcher)
    try:
        options = {name: placed(x) for name, x in case.options.items()}
        results = Case(placed(case.pixels), options).results(mm.patch_embed, backend="triton")
    finally:
        emulate(None)
    return results, launcher.run.results


def cases() -> Iterator[Any]:
    """In bfloat16 every case for Hopper; elsewhere what takes another way through the kernels."""
    yield from (pytest.param("sm_90", name, bf16) for name in CASES)
    ampere = ("vit", "masked", "gathered", "normalized", "image", "image_stds", "padded", "video")
    yield from (pytest.param("sm_80", name, bf16) for name in ampere)
    yield from (pytest.param("sm_90", name, fp16) for name in ("vit", "image_stds"))
    yield from (pytest.param("sm_80", name, fp32) for name in ("vit", "image_stds", "padded"))
    rest = (name for name in CASES if name not in ampere)
    yield from (pytest.param("sm_80", name, bf16, marks=pytest.mark.slow) for name in rest)


@pytest.mark.parametrize(("arch", "name", "dtype"), list(cases()))
def test_error_rule(arch, name, dtype):
    check(CASES[name](), dtype, lambda case: emulated(case, arch)[0])


def large(pixels: Tensor, patch: int, **options: Any) -> Case:
    """More rows, and more values of a token, than one of the largest tiles holds."""
    tokens = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    tail = {
        "prefix_tokens": normal(2, 320, seed=5),
        "pos_embed": normal(tokens + 2, 320, seed=6),
    }
    return Case(pixels, weights(320, 3, patch, patch) | tail | options)


LARGE = {
    "floats, patch 16": lambda: large(normal(5, 3, 96, 80), 16),
    "floats, patch 14": lambda: large(normal(5, 3, 84, 70), 14),
    "normalised floats": lambda: large(normal(5, 3, 84, 70), 14, **IMAGENET),
    "bytes, patch 16": lambda: large(image_bytes(5, 3, 96, 80), 16, **EQUAL),
    "bytes, patch 14": lambda: large(image_bytes(5, 3, 84, 70), 14, **IMAGENET),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", LARGE)
def test_large_tiles_and_more_tiles_than_programs(name, arch):
    row = triton_config.TABLE[arch]

    def run(case: Case) -> dict[str, Tensor]:
        with tuning.override("patch_forward", row.forward[0]) as used:
            results, _ = emulated(case, arch, processors=2)
        assert used.used
        return results

    check(LARGE[name](), bf16, run)


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_closer_than_eager(dtype):
    """Position and bias are added before the only rounding; eager rounds three times."""
    case = large(normal(2, 3, 96, 80), 16).to(dtype)
    got = emulated(case, "sm_90")[0]["out"].double()
    exact = case.to(torch.float64).results(mm.patch_embed, backend="reference")["out"]
    eager = case.results(testing.eager_patch_embed)["out"].double()
    error, allowed = ((x - exact).abs().mean() for x in (got, eager))
    assert error < allowed


def test_bytes_are_fetched_as_bytes():
    """An image of bytes costs a quarter of what one of float32 does."""
    pixels = image_bytes(4, 3, 64, 64)
    options = {"weight": normal(64, 3, 16, 16).to(bf16)}
    read = {}
    for name, x in (("bytes", pixels), ("floats", pixels.float() / 255)):
        _, launches = emulated(Case(x, options), "sm_90")
        forward = next(one for one in launches if one.kernel == "forward_kernel")
        read[name] = forward.result["gld_bytes"] + forward.result["cpasync_bytes"]
    assert read["bytes"] * 3.5 < read["floats"]


def test_weights_come_by_tma_on_hopper():
    _, launches = emulated(CASES["vit"]().to(bf16), "sm_90")
    forward = next(one for one in launches if one.kernel == "forward_kernel")
    assert forward.result["tma_ld_bytes"] > 0
