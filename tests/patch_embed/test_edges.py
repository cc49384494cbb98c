"""Does no input, however odd, give a wrong result, and does NaN stay where it is?"""

import math
import mmap

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends
from tests.patch_embed.cases import (
    BACKENDS,
    EQUAL,
    IMAGENET,
    Case,
    image_bytes,
    normal,
    tokens_of,
    weights,
)

EVERY = backends.each(*BACKENDS)
NAN, INF = math.nan, math.inf


def normal32(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).float()


def negated(x: Tensor) -> Tensor:
    """x as a tensor whose memory holds -x."""
    return torch._neg_view(-x)


def misaligned(x: Tensor) -> Tensor:
    """x one element behind an aligned address."""
    room = torch.full((x.numel() + 1,), 77, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


def amid_nan(x: Tensor) -> Tensor:
    """x as a window of images that are NaN elsewhere."""
    room = torch.full((*x.shape[:-2], x.shape[-2] + 9, x.shape[-1] + 7), NAN, device=x.device)
    return room[..., 4:-5, 2:-5].copy_(x)


def with_each(change, case: Case) -> Case:
    """The case with every floating-point tensor, and its pixels, changed."""
    options = {
        name: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.options.items()
    }
    return Case(change(case.pixels), options)


def of32(pixels: Tensor, options: dict) -> Case:
    return Case(pixels, options).to(torch.float32)


W = weights(12, 3, 4, 4)
FULL = W | tokens_of(2, 4, 1, 12)
ALL_MASKED = FULL | {"token_mask": torch.ones(4).bool()}
NONE_MASKED = FULL | {"token_mask": torch.zeros(2, 4).bool()}
ODD = {
    "no sample": lambda: of32(normal(0, 3, 8, 8), W | {"prefix_tokens": normal(2, 12)}),
    "no sample, a tail of samples": lambda: of32(
        normal(0, 3, 8, 8),
        W
        | {"prefix_tokens": normal(0, 2, 12), "pos_embed": normal(0, 6, 12)}
        | {"token_mask": torch.ones(0, 4).bool(), "mask_token": normal(12)},
    ),
    "no sample of bytes": lambda: of32(image_bytes(0, 3, 8, 8), ALL_MASKED | IMAGENET),
    "no prefix token": lambda: of32(
        normal(2, 3, 8, 8), W | {"prefix_tokens": normal(0, 12), "pos_embed": normal(4, 12)}
    ),
    "expanded samples": lambda: of32(normal(1, 3, 8, 8).expand(4, -1, -1, -1), W),
    "expanded channels": lambda: of32(normal(2, 1, 8, 8).expand(-1, 3, -1, -1), W | IMAGENET),
    "expanded rows": lambda: of32(normal(2, 3, 1, 8).expand(-1, -1, 8, -1), W),
    "one number": lambda: of32(normal(1, 1, 1, 1).expand(2, 3, 8, 8), W),
    "expanded samples of bytes": lambda: of32(
        image_bytes(1, 3, 8, 9).expand(3, -1, -1, -1), W | IMAGENET
    ),
    "lazily negated": lambda: with_each(negated, of32(normal(2, 3, 8, 8), FULL)),
    "misaligned": lambda: with_each(misaligned, of32(normal(2, 3, 8, 8), FULL)),
    "misaligned bytes": lambda: with_each(
        misaligned, of32(image_bytes(2, 3, 8, 8), FULL | IMAGENET)
    ),
    "a window amid NaN": lambda: of32(amid_nan(normal32(2, 3, 8, 11)), W),
    "a padded window amid NaN": lambda: of32(
        amid_nan(normal32(2, 3, 6, 9)), W | {"pad": True} | IMAGENET
    ),
    "one channel": lambda: of32(normal(2, 1, 8, 9), weights(12, 1, 4, 4)),
    "ten channels": lambda: of32(normal(2, 10, 4, 8), weights(12, 10, 4, 4)),
    "ten channels of bytes": lambda: of32(
        image_bytes(2, 10, 4, 8),
        weights(12, 10, 4, 4) | {"pixel_mean": 0.5, "pixel_std": [n / 10 for n in range(1, 11)]},
    ),
    "patches of 1 x 1": lambda: of32(normal(2, 3, 3, 5), weights(12, 3, 1, 1)),
    "patches of 1 x 1 bytes": lambda: of32(image_bytes(2, 3, 3, 5), weights(12, 3, 1, 1) | EQUAL),
    "patches of a single value": lambda: of32(normal(2, 1, 3, 5), weights(12, 1, 1, 1)),
    "patches 70 wide": lambda: of32(normal(1, 1, 2, 150), weights(12, 1, 2, 70)),
    "patches 130 wide, bytes": lambda: of32(
        image_bytes(1, 3, 3, 261), weights(12, 3, 3, 130) | IMAGENET
    ),
    "patches 70 high": lambda: of32(normal(1, 1, 141, 3), weights(12, 1, 70, 2)),
    "one value a token": lambda: of32(
        normal(2, 3, 8, 8), weights(1, 3, 4, 4) | tokens_of(2, 4, 1, 1)
    ),
    "37 values a token": lambda: of32(
        normal(2, 3, 8, 8), weights(37, 3, 4, 4) | tokens_of(2, 4, 1, 37)
    ),
    "one patch": lambda: of32(normal(1, 3, 4, 4), W | {"pos_embed": normal(1, 12)}),
    "one of everything": lambda: of32(normal(1, 1, 1), weights(1, 1, 1)),
    "all tokens masked": lambda: of32(normal(2, 3, 8, 8), ALL_MASKED),
    "no token masked": lambda: of32(normal(2, 3, 8, 8), NONE_MASKED),
    "an expanded mask": lambda: of32(
        normal(2, 3, 8, 8), FULL | {"token_mask": torch.tensor([[True], [False]]).expand(2, 4)}
    ),
    "an expanded table": lambda: of32(
        normal(2, 3, 8, 8),
        W
        | {"pos_embed": normal(1, 12).expand(7, 12), "pos_index": torch.tensor(6).expand(2, 4)},
    ),
    "pixels wider than the weight": lambda: Case(normal(2, 3, 8, 8), of32(normal(1), FULL).options),
    "pixels narrower than the weight": lambda: Case(
        normal(2, 3, 8, 8).half(), of32(normal(1), FULL).options
    ),
    "a tail wider than the weight": lambda: Case(
        normal32(2, 3, 8, 8),
        {name: x if name in tokens_of(1, 1, 1, 1) else x.float() for name, x in FULL.items()},
    ),
}  # fmt: skip
INTERPRETED = {
    "no sample", "no sample of bytes", "expanded samples", "expanded channels", "lazily negated",
    "misaligned", "misaligned bytes", "a padded window amid NaN", "ten channels of bytes",
    "patches of 1 x 1 bytes", "patches 70 wide", "patches 130 wide, bytes", "one of everything",
    "37 values a token", "an expanded table", "pixels wider than the weight",
    "pixels narrower than the weight", "a tail wider than the weight", "no prefix token",
    "all tokens masked",
}  # fmt: skip


def copies(case: Case) -> Case:
    """The case in float64 and plain memory."""
    wide = case.to(torch.float64)
    options = {
        name: x.resolve_neg().clone(memory_format=torch.contiguous_format)
        if isinstance(x, Tensor)
        else x
        for name, x in wide.options.items()
    }
    return Case(wide.pixels.resolve_neg().contiguous(), options)


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], eps: float = 2**-23) -> None:
    """Equal but for the rounding of sums in float32."""
    assert got.keys() == wanted.keys()
    for name, x in got.items():
        y = wanted[name]
        assert x.shape == y.shape, name
        size = float(y.abs().amax()) if y.numel() else 0.0
        near = 100 * max(eps, torch.finfo(x.dtype).eps / 100) * max(size, 1.0)
        torch.testing.assert_close(
            x.cpu().double(), y, atol=near, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        backends.param(name, backend, on=backend, id=f"{name}-{backend}")
        for name in ODD
        for backend in BACKENDS
        if backend != "triton" or name in INTERPRETED
    ],
)
def test_are_odd_inputs_served_and_right(name, backend):
    with torch.device(testing.device_for(backend)):
        case = ODD[name]()
    floats = case.pixels.is_floating_point()
    got = case.results(mm.patch_embed, pixel_grad=floats, backend=backend)
    wanted = copies(case).results(mm.patch_embed, pixel_grad=floats, backend="reference")
    assert got["out"].dtype == torch.float32
    for name in ("pixels", *case.options):
        x = case.pixels if name == "pixels" else case.options[name]
        assert f"d{name}" not in got or got[f"d{name}"].dtype == x.dtype
    assert_near(got, {key: x.cpu() for key, x in wanted.items()})


@EVERY
@pytest.mark.parametrize("kind", ["one number", "transposed", "strided", "misaligned", "negated"])
def test_may_dout_have_any_strides(kind, backend):
    case = of32(normal(2, 3, 8, 8), FULL).to(torch.float32, testing.device_for(backend))
    dout = normal32(2, 5, 12, seed=9)
    room = torch.full((2, 10, 24), NAN)
    room[:, ::2, ::2] = dout
    made = {
        "one number": lambda: torch.tensor(1.5).expand(2, 5, 12),
        "transposed": lambda: dout.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "strided": lambda: room[:, ::2, ::2],
        "misaligned": lambda: misaligned(dout),
        "negated": lambda: negated(dout),
    }[kind]()
    found = []
    for which, one in ((backend, case), ("reference", copies(case))):
        leaves = {"pixels": one.pixels} | one.options
        leaves = {
            name: x.detach().requires_grad_() for name, x in leaves.items() if x.is_floating_point()
        }
        out = mm.patch_embed(**{"pixels": one.pixels} | one.options | leaves, backend=which)
        grad = made if which == backend else made.resolve_neg().contiguous()
        grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out))
        found.append({name: x.cpu() for name, x in zip(leaves, grads, strict=True)})
    assert_near(*found)


def far_apart(step: int, count: int, *shape: int) -> Tensor:
    """Bytes (count, *shape), whose samples lie `step` elements apart."""
    size = torch.Size(shape).numel()
    try:
        memory = mmap.mmap(-1, (count - 1) * step + size)  # none of it is there until it is written
    except OSError as error:
        pytest.skip(f"no address space for it: {error}")
    strides = torch.empty(shape, device="meta").stride()
    return torch.frombuffer(memory, dtype=torch.uint8).as_strided((count, *shape), (step, *strides))


@EVERY
@pytest.mark.parametrize("step", [2**31 + 5, 2**30 + 5], ids=["stride", "product"])
def test_are_offsets_of_64_bits(step, backend):
    if testing.device_for(backend) != "cpu":
        pytest.skip("memory that is not there until written is the CPU's")
    images = image_bytes(3, 3, 8, 8)
    far = far_apart(step, 3, 3, 8, 8).copy_(images)
    options = weights(12, 3, 4, 4) | IMAGENET
    got = of32(far, options).results(mm.patch_embed, backend=backend)
    assert_near(got, Case(images, options).results(mm.patch_embed, backend="reference"))


@EVERY
@pytest.mark.parametrize("far", [1, 2, 3], ids=["channels", "rows", "columns"])
def test_are_offsets_within_a_patch_of_64_bits(far, backend):
    """Steps of 2**29, which are themselves of 32 bits."""
    if testing.device_for(backend) != "cpu":
        pytest.skip("memory that is not there until written is the CPU's")
    step = 2**29 + 5
    strides = [125, 5, 5, 5]
    strides[far], strides[3 if far != 3 else 2] = step, 1
    images = image_bytes(1, 5, 5, 5)
    pixels = far_apart(step, 5, 25).as_strided(images.shape, strides).copy_(images)
    options = weights(12, 5, 5, 5)
    got = of32(pixels, options).results(mm.patch_embed, backend=backend)
    assert_near(got, Case(images, options).results(mm.patch_embed, backend="reference"))


@EVERY
def test_may_what_is_added_change_before_the_backward_pass(backend):
    """A sum keeps nothing of its terms: an average of weights may be taken in between."""
    case = Case(normal(2, 3, 8, 8), weights(12, 3, 4, 4) | tokens_of(2, 4, 1, 12))
    case = case.to(torch.float32, testing.device_for(backend))
    added = ("bias", "pos_embed", "prefix_tokens", "mask_token")
    leaves = {n: x.clone().requires_grad_() for n, x in case.options.items() if n != "token_mask"}
    out = mm.patch_embed(case.pixels, **case.options | leaves, backend=backend)
    with torch.no_grad():
        for name in added:
            leaves[name].add_(1.0)
    dout = normal(*out.shape, seed=99).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    wanted = case.results(mm.patch_embed, pixel_grad=False, backend="reference")
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, wanted[f"d{name}"], **backends.tolerance(torch.float32))


def poisoned(case: Case, where: Tensor, bad: float) -> Case:
    """The case with `bad` in the pixels of the bool mask."""
    return case._replace(pixels=case.pixels.masked_fill(where.to(case.pixels.device), bad))


def on(backend: str, pixels: Tensor, options: dict) -> Case:
    return Case(pixels, options).to(torch.float32, testing.device_for(backend))


def pixels_of_tokens(token_mask: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, 1, H, W) bool: the pixels of the masked tokens (B, N)."""
    grid = token_mask.view(len(token_mask), 1, rows, columns)
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@EVERY
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_does_a_rest_that_is_dropped_reach_nothing(bad, backend):
    case = on(backend, normal(2, 3, 11, 9), W | IMAGENET | tokens_of(2, 4, 1, 12))
    rest = torch.ones(11, 9).bool()
    rest[:8, :8] = False
    wanted = case.results(mm.patch_embed, backend=backend)
    got = poisoned(case, rest, bad).results(mm.patch_embed, backend=backend)
    for name, x in got.items():
        assert torch.equal(x, wanted[name]), name
    assert not got["dpixels"][..., rest.to(got["dpixels"].device)].any()


@EVERY
def test_do_pixels_between_patches_reach_nothing(backend):
    case = on(backend, normal(1, 3, 10, 10), W | {"stride": 6})
    between = torch.ones(10, 10).bool()
    for y in (0, 6):
        for x in (0, 6):
            between[y : y + 4, x : x + 4] = False
    wanted = case.results(mm.patch_embed, backend=backend)
    got = poisoned(case, between, NAN).results(mm.patch_embed, backend=backend)
    assert all(torch.equal(x, wanted[name]) for name, x in got.items())


@EVERY
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("alike", [False, True], ids=["of samples", "one for all"])
def test_do_pixels_of_masked_tokens_reach_nothing(alike, bad, backend):
    options = FULL | IMAGENET
    if alike:
        options = options | {"token_mask": torch.tensor([True, False, False, True])}
    mask = options["token_mask"].expand(2, 4)
    case = on(backend, normal(2, 3, 8, 8), options)
    wanted = case.results(mm.patch_embed, backend=backend)
    got = poisoned(case, pixels_of_tokens(mask, 2, 2, 4), bad).results(
        mm.patch_embed, backend=backend
    )
    for name, x in got.items():
        assert x.isfinite().all(), name
        torch.testing.assert_close(x, wanted[name], atol=0.0, rtol=0.0, msg=name)


@EVERY
def test_does_nan_of_masked_tokens_stay_out_of_the_result(backend):
    case = on(backend, normal(2, 3, 8, 8), FULL)
    bad = poisoned(case, pixels_of_tokens(FULL["token_mask"], 2, 2, 4), NAN)
    got = mm.patch_embed(bad.pixels, **bad.options, backend=backend)
    assert torch.equal(got, mm.patch_embed(case.pixels, **case.options, backend=backend))


@EVERY
def test_does_nan_of_a_pixel_reach_its_token_alone(backend):
    case = on(backend, normal(2, 3, 8, 8), W | {"prefix_tokens": normal(1, 12)})
    wanted = case.results(mm.patch_embed, backend=backend)
    where = torch.zeros(2, 3, 8, 8).bool()
    where[1, 2, 5, 1] = True  # of sample 1, patch (1, 0)
    got = poisoned(case, where, NAN).results(mm.patch_embed, backend=backend)
    assert got["out"][1, 3].isnan().all()
    got["out"][1, 3] = wanted["out"][1, 3] = 0.0
    assert got["dweight"][:, 2, 1, 1].isnan().all()
    got["dweight"][:, 2, 1, 1] = wanted["dweight"][:, 2, 1, 1] = 0.0
    for name in got:
        assert torch.equal(got[name], wanted[name]), name


# Argument -> the rows of out (prefix token and 4 tokens) that it reaches.
REACHED = {
    "mask_token": lambda mask: torch.cat((torch.zeros(2, 1).bool(), mask), 1),
    "prefix_tokens": lambda mask: torch.tensor([[True] + [False] * 4]).expand(2, 5),
    "pos_embed": lambda mask: torch.tensor([[False, False, True, False, False]]).expand(2, 5),
}


@EVERY
@pytest.mark.parametrize("name", REACHED)
def test_does_nan_of_the_tail_reach_its_own_rows_alone(name, backend):
    case = on(backend, normal(2, 3, 8, 8), FULL)
    wanted = case.results(mm.patch_embed, backend=backend)
    bad = case.options[name].clone()
    bad[2 if name == "pos_embed" else ...] = NAN
    case = case._replace(options=case.options | {name: bad})
    got = case.results(mm.patch_embed, backend=backend)
    reached = REACHED[name](FULL["token_mask"])
    out, rest = got.pop("out").cpu(), wanted.pop("out").cpu()
    assert out[reached].isnan().all() and torch.equal(out[~reached], rest[~reached])
    for key, x in got.items():
        assert torch.equal(x, wanted[key]), key


@EVERY
def test_do_rows_of_a_table_that_none_takes_reach_nothing(backend):
    index = torch.tensor([[1, 1, 4, 0], [4, 0, 0, 1]])
    options = W | {"pos_embed": normal(6, 12), "pos_index": index}
    case = on(backend, normal(2, 3, 8, 8), options)
    wanted = case.results(mm.patch_embed, backend=backend)
    case.options["pos_embed"][[2, 3, 5]] = NAN
    got = case.results(mm.patch_embed, backend=backend)
    assert all(torch.equal(x, wanted[name]) for name, x in got.items())
    assert not got["dpos_embed"][[2, 3, 5]].any()


@EVERY
def test_does_nan_of_dout_in_masked_rows_reach_no_pixel_or_weight(backend):
    """Nor in the rows of prefix tokens: these are not of the product."""
    case = on(backend, normal(2, 3, 8, 8), FULL)
    rows = torch.cat((torch.ones(2, 1).bool(), FULL["token_mask"]), 1)[..., None]
    found = []
    for bad in (1.0, NAN):
        leaves = {"pixels": case.pixels} | {name: case.options[name] for name in W}
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        out = mm.patch_embed(**{"pixels": case.pixels} | case.options | leaves, backend=backend)
        dout = normal32(2, 5, 12, seed=9).masked_fill(rows, bad).to(out)
        found.append(torch.autograd.grad(out, list(leaves.values()), dout))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@EVERY
def test_may_a_list_hold_images_of_one_patch(backend):
    images = [x.to(testing.device_for(backend)) for x in normal32(3, 3, 4, 4)]
    case = on(backend, normal(3, 3, 4, 4), W | {"prefix_tokens": normal(2, 12)})
    got, cu_seqlens = mm.patch_embed_varlen(images, **case.options, backend=backend)
    assert cu_seqlens.tolist() == [0, 3, 6, 9]
    wanted = mm.patch_embed(case.pixels, **case.options, backend=backend)
    torch.testing.assert_close(got, wanted.flatten(0, 1))
