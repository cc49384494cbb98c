"""Is the CUDA patch embedding right, both passes? Its launchers and PTX run in the emulator."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.patch_embed import cuda
from mmkernels.patch_embed.build import build
from tests import cuda_harness
from tests.patch_embed.cases import EQUAL, IMAGENET, Case, image_bytes, normal, weights
from tests.patch_embed.cases import check as check_case
from tests.patch_embed.cuda_harness import emulated, on_device, run, useful_flops

pytestmark = [pytest.mark.nvcc, pytest.mark.ptxsim]
slow = pytest.mark.slow
bf16, fp16 = torch.bfloat16, torch.float16
PATCHES = pytest.mark.parametrize("patch", [14, 16])


def case(
    pixels: Tensor, patch: int, dim: int = 136, prefix: int = 2, pos: str = "all", **options: Any
) -> Case:
    """A call with a bias, prefix tokens, and positions of `all` rows, of `tokens`, or `none`."""
    stride = options.get("stride", patch)
    height, width = ((n - patch) // stride + 1 for n in pixels.shape[2:])
    tail = {"prefix_tokens": normal(prefix, dim, seed=5)} if prefix else {}
    if pos != "none":
        slots = height * width + (prefix if pos == "all" else 0)
        tail["pos_embed"] = normal(slots, dim, seed=6)
    return Case(pixels, weights(dim, pixels.shape[1], patch, patch) | tail | options)


def check(made: Case, dtype: torch.dtype = bf16, **emulation: Any) -> list[Any]:
    """Holds out and all gradients to the error rule; what the emulator counted."""
    launches = []

    def results(cast: Case) -> dict[str, Tensor]:
        done = run(cast, **emulation)
        launches.extend(done.launches)
        return done.results

    check_case(made, dtype, results)
    return launches


def check_out(made: Case, dtype: torch.dtype = bf16, **emulation: Any) -> Any:
    """The same, of out alone."""
    cast = made.to(dtype)
    results, (launch,) = run(cast, backward=False, **emulation)
    exact = mm.patch_embed(**_arguments(cast.to(torch.float64)), backend="reference")
    eager = testing.eager_patch_embed(**_arguments(cast))
    testing.assert_accurate("out", results["out"], exact, eager)
    return launch


def _arguments(made: Case) -> dict[str, Any]:
    return {"pixels": made.pixels, **made.options}


def images(patch: int, batch: int = 5, channels: int = 3, *, raw: bool = False) -> Tensor:
    """Of 6 x 6 patches, and a rest that belongs to none."""
    shape = (batch, channels, 6 * patch + 3, 5 * patch + 16)
    return image_bytes(*shape) if raw else normal(*shape)


STATISTICS = {"plain": {}, "one std": EQUAL, "several stds": IMAGENET}


@PATCHES
@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("kind", ["floats", *STATISTICS])
def test_every_kind_of_pixels(kind, dtype, patch):
    """More rows, and more values of a token, than a tile holds."""
    raw = kind != "floats"
    check(case(images(patch, raw=raw), patch, **STATISTICS.get(kind, {})), dtype)


@PATCHES
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("pos", ["none", "tokens", "all"])
def test_prefix_and_positions(prefix, pos, patch):
    check(case(images(patch, 3), patch, 40, prefix, pos))


@PATCHES
def test_without_bias_and_with_the_mean_alone(patch):
    for raw in (False, True):
        made = case(images(patch, 2, raw=raw), patch, 40, **(EQUAL if raw else {}))
        del made.options["bias"]
        check(made)


def test_prefix_and_positions_of_each_sample():
    made = case(images(16, 3), 16, 40)
    own = {"prefix_tokens": normal(3, 2, 40, seed=5), "pos_embed": normal(3, 38, 40, seed=6)}
    check(Case(made.pixels, made.options | own))


@PATCHES
@pytest.mark.parametrize(
    ("batch", "rows", "columns"), [(1, 1, 1), (127, 1, 1), (1, 1, 128), (43, 3, 1), (3, 11, 7)]
)
def test_rows_around_a_tile(batch, rows, columns, patch):
    """1, 127, 128, 129 and 231 patches; their gradient in one share, and in two."""
    check(case(normal(batch, 1, rows * patch, columns * patch), patch, 24, prefix=0, pos="none"))


@PATCHES
@pytest.mark.parametrize("dim", [8, 120, 128, 264])
@pytest.mark.parametrize("channels", [1, 5])
def test_values_of_a_token_around_a_tile(channels, dim, patch):
    check(case(images(patch, 2, channels), patch, dim))


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) without gaps, its channels side by side."""
    return on_device(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@PATCHES
@pytest.mark.parametrize("kind", ["floats", "plain", "one std"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_last(channels, kind, patch):
    x = channels_last(images(patch, 3, channels, raw=kind != "floats"))
    options = {"pixel_mean": 0.4, "pixel_std": 0.5} if kind == "one std" else {}
    check(case(x, patch, 40, **options))
    wide = on_device(torch.cat((x, x), 3).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    check(case(wide[:, :, 1:, 16:-16], patch, 40, **options))


STRIDES = ["part of a wider image", "one image for all", "frames of a clip"]


@PATCHES
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind, raw, patch):
    x = images(patch, 2, raw=raw)
    if kind == "part of a wider image":
        wide = x.new_full((3, 5, x.shape[2] + 2, x.shape[3] + 48), 255 if raw else torch.nan)
        wide[1:, 2:, 2:, 32:-16] = x
        x = on_device(wide)[1:, 2:, 2:, 32:-16]
    elif kind == "one image for all":
        x = on_device(x[:1]).expand(3, -1, -1, -1)
    else:
        x = on_device(torch.stack((x, x.flip(0)), 2))[:, :, 1]
    assert not x.is_contiguous()
    check(case(x, patch, 40, **(IMAGENET if raw else {})))


@pytest.mark.parametrize(("patch", "stride"), [(16, 8), (16, 24), (14, 10), (14, 16)])
def test_patches_that_overlap_or_lie_apart(patch, stride):
    made = case(normal(2, 3, 70, 90), patch, 40, stride=stride)
    # A width of 90 is no multiple of 8 pixels.
    pixels = on_device(torch.nn.functional.pad(made.pixels, (0, 6)).to(bf16))[..., :90]
    check(Case(pixels, made.options))


@pytest.mark.parametrize("names", [("bias",), ("pos_embed",), ("prefix_tokens",), ()])
def test_arguments_in_float32(names):
    """As autocast leaves them: all but the weight, or one of them."""
    made = case(images(16, 2), 16, 40).to(bf16)
    wide = {name: x.float() for name, x in made.options.items() if name in names or not names}
    mixed = Case(made.pixels, made.options | wide | {"weight": made.options["weight"]})
    got = run(mixed).results
    exact = mixed.to(torch.float64).results(mm.patch_embed, backend="reference")
    eager = mixed.to(bf16).results(testing.eager_patch_embed)
    for name, x in got.items():
        testing.assert_accurate(name, x, exact[name], eager[name])
        wanted = mixed.options.get(name.removeprefix("d"), mixed.pixels)
        assert x.dtype == wanted.dtype


def test_arguments_that_cannot_be_copied_in_words():
    made = case(images(16, 2), 16, 40).to(bf16)
    odd = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in made.options.items()}
    check(Case(made.pixels, odd))


@PATCHES
def test_images_of_mixed_size(patch):
    shapes = [(3, rows * patch, 32 + 2 * patch) for rows in (2, 1, 5)]
    pixels = [on_device(normal(*shape, seed=shape[1]).to(bf16)) for shape in shapes]
    tokens = sum(x.shape[1] // patch * (x.shape[2] // patch) for x in pixels)
    tail = {"pos_embed": normal(tokens + 3, 40), "prefix_tokens": normal(1, 40)}
    options = {name: x.to(bf16) for name, x in (weights(40, 3, patch, patch) | tail).items()}
    dout = normal(tokens + 3, 40, seed=99).to(bf16)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in options.items()}
        images = [x.to(dtype) for x in pixels]
        out = mm.patch_embed_varlen(images, backend="reference", **leaves)[0]
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout.to(dtype))]

    call = build("patch_embed_varlen", [x[None] for x in pixels], **options)
    with emulated():
        out = cuda.forward(*call)
        _, *grads, _ = cuda.backward(dout, *call, [False, True, True, True, True, False])
    got = [out, *(x.reshape(y.shape) for x, y in zip(grads, options.values(), strict=True))]
    # The reference in bfloat16 computes in float32: a yardstick harder than eager torch.
    for name, *three in zip(
        ("out", *options), got, reference(torch.float64), reference(bf16), strict=True
    ):
        testing.assert_accurate(name, *three)


@PATCHES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_reaches_its_own_token_and_no_other(bad, patch):
    clean = case(images(patch, 2), patch, 40).to(bf16)
    dirty = clean.pixels.clone()
    dirty[1, 2, 3 * patch - 1, patch] = bad  # row 2, column 1 of the second sample
    dirty[0, :, 6 * patch :] = dirty[:, :, :, 6 * patch :] = bad  # in no patch
    got = run(Case(dirty, clean.options), backward=False).results["out"]
    wanted = run(clean, backward=False).results["out"]
    touched = torch.zeros(wanted.shape[:2], dtype=torch.bool)
    touched[1, 2 + 2 * 6 + 1] = True
    assert torch.equal(got[~touched], wanted[~touched])
    assert not got[touched].isfinite().any()


@PATCHES
@pytest.mark.parametrize("raw", [False, True])
def test_every_order_of_warps_gives_the_same_bits(raw, patch):
    made = case(images(patch, raw=raw), patch, **(IMAGENET if raw else {})).to(bf16)
    first, *others = (run(made, seed=seed).results for seed in (0, 7, 1234))
    for other in others:
        assert all(torch.equal(x, other[name]) for name, x in first.items())


@PATCHES
def test_code_for_hopper(patch):
    check(case(images(patch), patch), arch="sm_90")
    check(case(images(patch, raw=True), patch, **IMAGENET), arch="sm_90")


def test_no_samples():
    made = Case(normal(0, 3, 32, 32), weights(40, 3, 16, 16)).to(bf16)
    done = run(made)
    assert not done.launches and done.results["out"].numel() == 0
    assert not done.results["dweight"].any()


def weight_launch(dout: Tensor, pixels: Tensor, splits: int) -> Tensor:
    """(D, C, P, P), by so many shares of the patches."""
    shape = (dout.shape[1], pixels.shape[1], 16, 16)
    partial, dweight = torch.empty(splits, *shape), torch.empty(shape)
    with emulated() as ops:
        ops.patch_embed_weight(dout, pixels, None, partial, dweight, 16, 16)
    return dweight


def test_shares_of_the_patches():
    """231 patches are 8 steps: of one share, of several, and of more than there are steps."""
    pixels = on_device(normal(3, 1, 11 * 16, 7 * 16).to(bf16))
    dout = on_device(normal(3 * (2 + 77), 40, seed=9).to(bf16))
    one = weight_launch(dout, pixels, 1)
    rows = torch.nn.functional.unfold(pixels.float(), 16, stride=16).mT.flatten(0, 1)
    exact = dout.float().unflatten(0, (3, 79))[:, 2:].flatten(0, 1).T @ rows
    torch.testing.assert_close(one.flatten(1), exact, rtol=1e-4, atol=1e-4)
    for splits in (2, 3, 5, 8, 11):
        torch.testing.assert_close(weight_launch(dout, pixels, splits), one, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", ["pixels", "dout"])
def test_an_infinite_value_makes_no_nan_of_the_gradient(which):
    """Where the last step lacks patches the first one stands in for them, times 0: not of it."""
    pixels, dout = normal(3, 1, 11 * 16, 7 * 16), normal(3 * 77, 40, seed=9)
    (pixels[0, 0, 0] if which == "pixels" else dout[0])[0] = torch.inf
    dweight = weight_launch(on_device(dout.to(bf16)), on_device(pixels.to(bf16)), 2)
    assert dweight.isinf().any() and not dweight.isnan().any()


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_shares_fill_the_gpu_and_none_is_short(processors):
    for patches, dim, values in ((49, 768, 768), (6272, 768, 768), (23328, 1152, 588)):
        splits = cuda._splits(patches, (dim, values), processors)
        tiles = -(-dim // 128) * -(-values // 128)
        assert splits == 1 or splits * tiles <= 2 * processors
        assert splits == 1 or patches >= 128 * splits


# Sectors of global memory that are asked for, parameters among them, beside the least: pieces of
# two pixels are fetched apart.
SECTORS = {(16, False): 1.03, (16, True): 1.04, (14, False): 1.63, (14, True): 1.83}


@PATCHES
@pytest.mark.parametrize("raw", [False, True])
def test_nothing_is_moved_or_computed_twice(raw, patch):
    """Of 256 rows and 256 values: two tiles by two. 588 values of a patch are 592, or 5 tiles."""
    side = 8 * patch
    pixels = image_bytes(4, 3, side, side) if raw else normal(4, 3, side, side)
    made = case(pixels, patch, 256, prefix=0, pos="none").to(bf16)
    del made.options["bias"]
    forward, weight, _ = run(made, processors=1).launches
    values = 3 * patch * patch
    tiles = -(-values // 128)
    flops = useful_flops(made)
    assert forward["mma_flops"] == flops * -(-values // 16) * 16 // values
    assert weight["mma_flops"] == flops * tiles * 128 // values
    assert max(forward["mma_flops"], weight["mma_flops"]) <= 1.10 * flops
    for launch in (forward, weight):
        assert launch["lds_conflict"] == launch["sts_conflict"] == 0
    image = pixels.numel() * (1 if raw else 2)
    least = 2 * (image + 2 * 256 * values) / 32
    assert forward["gld_sectors"] <= SECTORS[patch, raw] * least
    assert forward["gst_sectors"] == 256 * 256 * 2 / 32
    least = (2 * image + tiles * 256 * 256 * 2) / 32
    assert weight["gld_sectors"] <= SECTORS[patch, raw] * least
    # Rows of 588 float32 start in the middle of a sector, every other one.
    assert weight["gst_sectors"] <= 256 * values * 4 / 32 * (1 if patch == 16 else 1.51)


@pytest.mark.parametrize(
    ("kernel", "arch", "patch", "raw"),
    [
        pytest.param(kernel, arch, patch, raw, marks=slow if raw else ())
        for kernel, arch in (("forward", "sm_80"), ("forward", "sm_90a"), ("dweight", "sm_80"))
        for patch, raw in itertools.product((16, 14), (False, True))
        if (arch, patch, raw) != ("sm_90a", 14, True)  # the portable kernel's
    ],
)
def test_loads_of_the_units_are_those_in_docs(kernel, arch, patch, raw):
    """docs/cuda-kernels.md, "Patch embedding": 512 patches, embed_dim 768 or 1152."""
    side, dim = 16 * patch, 768 if patch == 16 else 1152
    pixels = image_bytes(2, 3, side, side) if raw else normal(2, 3, side, side)
    made = case(pixels, patch, dim, prefix=0, **(EQUAL if raw else {})).to(bf16)
    launch = run(made, backward=kernel == "dweight", arch=arch).launches[kernel == "dweight"]
    pipes = launch.pipes(useful_flops(made))
    tensor = pipes["tensor cores (wgmma rate)"]
    figures = [
        pipes["useful share of MMA FLOPs"],
        pipes["issue slots"] / tensor,
        pipes["shared memory wavefronts"] / tensor,
    ]
    cells = [kernel, {"sm_80": "8.0 and newer", "sm_90a": "Hopper"}[arch]]
    cells += [f"{patch} × {patch}", "uint8" if raw else "bfloat16", *(f"{x:.2f}" for x in figures)]
    line = " | ".join(("", *cells, f"{pipes['ceiling, TFLOP/s']:.0f}", "")).strip()
    assert line in (cuda_harness.ROOT / "docs" / "cuda-kernels.md").read_text().splitlines()
