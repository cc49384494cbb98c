"""Is the CUDA patch embedding's forward pass for Hopper right? Its PTX runs in the emulator.

A GPU of so many multiprocessors runs as many blocks, which take the tiles in turn, and in each of
them two warpgroups do.
"""

from typing import Any

import pytest
import torch

from tests.cuda_harness import on_device
from tests.patch_embed.cases import EQUAL, IMAGENET, Case, image_bytes, normal
from tests.patch_embed.cuda_harness import run, useful_flops
from tests.patch_embed.test_cuda_ptx import bf16, case, channels_last, check_out, fp16, images

pytestmark = [pytest.mark.nvcc, pytest.mark.ptxsim]
PATCHES = pytest.mark.parametrize("patch", [14, 16])
KINDS = {"floats": {}, "plain": {}, "one std": EQUAL, "several stds": IMAGENET}


def check(made: Case, dtype: torch.dtype = bf16, processors: int = 2, **emulation: Any) -> Any:
    """Holds out to the error rule; what the emulator counted of the Hopper kernel."""
    launch = check_out(made, dtype, arch="sm_90a", processors=processors, **emulation)
    assert "hopper" in launch["kernel"]
    return launch


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize(("patch", "kind"), [(14, "floats"), *((16, kind) for kind in KINDS)])
def test_every_kind_of_pixels(kind, dtype, patch):
    made = case(images(patch, raw=kind != "floats"), patch, **KINDS[kind])
    check(made, dtype)


def test_bytes_in_patches_of_14_are_the_portable_kernels():
    made = case(images(14, raw=True), 14, **IMAGENET)
    assert "hopper" not in check_out(made, bf16, arch="sm_90a")["kernel"]


@PATCHES
@pytest.mark.parametrize("processors", [1, 2, 3, 5, 132])
def test_every_share_of_the_tiles(processors, patch):
    """Ten tiles: a block has from none to ten of them, an odd number or an even one."""
    check(case(images(patch), patch, 264 if patch == 16 else 136), processors=processors)


@PATCHES
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
def test_every_number_of_steps(channels, patch):
    """Of 14 x 14 patches 4, 8, 12 or 16 values are left for a last step, or more; three tiles."""
    check(case(images(patch, 3, channels), patch, 264), processors=1)


@PATCHES
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("pos", ["none", "tokens", "all"])
def test_prefix_and_positions(prefix, pos, patch):
    check(case(images(patch, 4), patch, 72, prefix, pos))


@PATCHES
@pytest.mark.parametrize(
    ("batch", "rows", "columns"), [(1, 1, 1), (127, 1, 1), (1, 1, 128), (43, 3, 1), (3, 11, 7)]
)
def test_rows_around_a_tile(batch, rows, columns, patch):
    check(case(normal(batch, 1, rows * patch, columns * patch), patch, 24, prefix=0, pos="none"))


@PATCHES
@pytest.mark.parametrize("dim", [8, 64, 120, 128, 264])
def test_values_of_a_token_around_a_tile(dim, patch):
    check(case(images(patch, 2, 1), patch, dim))


@pytest.mark.parametrize(("patch", "raw"), [(14, False), (16, False), (16, True)])
def test_strides(raw, patch):
    x = images(patch, 2, raw=raw)
    wide = x.new_full((3, 5, x.shape[2] + 2, x.shape[3] + 48), 255 if raw else torch.nan)
    wide[1:, 2:, 2:, 32:-16] = x
    check(case(on_device(wide)[1:, 2:, 2:, 32:-16], patch, 40, **(IMAGENET if raw else {})))
    check(case(on_device(x[:1]).expand(3, -1, -1, -1), patch, 40, **(IMAGENET if raw else {})))


@pytest.mark.parametrize(("patch", "raw"), [(14, False), (16, False), (16, True)])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_last(channels, raw, patch):
    x = channels_last(images(patch, 3, channels, raw=raw))
    check(case(x, patch, 40, **({"pixel_mean": 0.4, "pixel_std": 0.5} if raw else {})))


@pytest.mark.parametrize(("patch", "stride"), [(16, 8), (14, 10)])
def test_patches_that_overlap(patch, stride):
    check(case(normal(2, 3, 70, 96), patch, 40, stride=stride))


@PATCHES
def test_nan_reaches_its_own_token_and_no_other(patch):
    clean = case(images(patch, 2), patch, 40).to(bf16)
    dirty = clean.pixels.clone()
    dirty[1, 2, 3 * patch - 1, patch] = torch.nan
    got, wanted = (
        run(Case(x, clean.options), backward=False, arch="sm_90a").results["out"]
        for x in (dirty, clean.pixels)
    )
    touched = torch.zeros(wanted.shape[:2], dtype=torch.bool)
    touched[1, 2 + 2 * 6 + 1] = True
    assert torch.equal(got[~touched], wanted[~touched])
    assert got[touched].isnan().all()


@pytest.mark.parametrize(("patch", "raw"), [(14, False), (16, False), (16, True)])
def test_every_order_of_warps_gives_the_same_bits(raw, patch):
    made = case(images(patch, raw=raw), patch, **(IMAGENET if raw else {})).to(bf16)
    first, *others = (
        run(made, backward=False, arch="sm_90a", processors=1, seed=seed).results["out"]
        for seed in (0, 7, 1234)
    )
    assert all(torch.equal(first, other) for other in others)


def test_the_portable_kernel_gives_the_same_bits():
    """Both add in the order of the values: here the emulator is exact, a GPU need not be."""
    made = case(images(16), 16).to(bf16)
    out = [run(made, backward=False, arch=arch).results["out"] for arch in ("sm_80", "sm_90a")]
    assert torch.equal(*out)


# Sectors of global memory that are asked for, parameters among them, beside the least of pixels.
SECTORS = {(16, False): 1.05, (16, True): 1.10, (14, False): 2.26}


@pytest.mark.parametrize(("patch", "raw"), SECTORS)
def test_nothing_is_moved_or_computed_twice(raw, patch):
    """Of 256 rows and 256 values: two tiles by two. 588 values of a patch are 592."""
    side = 8 * patch
    pixels = image_bytes(4, 3, side, side) if raw else normal(4, 3, side, side)
    made = case(pixels, patch, 256, prefix=0, pos="none").to(bf16)
    del made.options["bias"]
    (launch,) = run(made, backward=False, arch="sm_90a", processors=1).launches
    values = 3 * patch * patch
    assert launch["mma_flops"] == useful_flops(made) * -(-values // 16) * 16 // values
    assert launch["lds_conflict"] == launch["sts_conflict"] == 0
    least = 2 * pixels.numel() * (1 if raw else 2) / 32
    assert launch["gld_sectors"] <= SECTORS[patch, raw] * least
    assert launch["tma_ld_bytes"] == 4 * 128 * 2 * -(-values // 64) * 64
    assert launch["gst_sectors"] == 256 * 256 * 2 / 32
