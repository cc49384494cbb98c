"""Are patches that are cut out embedded as the image is that they were cut from?"""

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from tests.attention import backends
from tests.patch_embed.cases import EQUAL, IMAGENET, image_bytes, normal, tokens_of, weights

D, B, P = 20, 3, 2
DTYPES = [torch.float32, torch.float64]
FORMATS = ("channels_first", "channels_last")


def cut(x: Tensor, patch: tuple[int, ...], data_format: str) -> Tensor:
    """(B, N, K) of images (B, C, [T,] H, W), K in the order (C, [T,] H, W) or ([T,] H, W, C)."""
    dims = len(patch)
    for dim, size in enumerate(patch, 2):
        x = x.unfold(dim, size, size)
    grid, inner = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    order = (1, *inner) if data_format == "channels_first" else (*inner, 1)
    return x.permute(0, *grid, *order).flatten(1 + dims).flatten(1, dims)


def image(*shape: int) -> Tensor:
    return normal(*shape).sigmoid()


# Name -> images (B, C, [T,] H, W), and the options of the call.
CALLS = {
    "plain": lambda: (image(B, 3, 8, 12), weights(D, 3, 4, 4)),
    "no bias": lambda: (image(B, 3, 8, 12), {"weight": weights(D, 3, 4, 4)["weight"]}),
    "normalized": lambda: (image(B, 3, 8, 12), weights(D, 3, 4, 4) | IMAGENET),
    "one mean": lambda: (image(B, 3, 8, 12), weights(D, 3, 4, 4) | {"pixel_mean": 0.5}),
    "bytes": lambda: (image_bytes(B, 3, 8, 12), weights(D, 3, 4, 4)),
    "bytes, normalized": lambda: (image_bytes(B, 3, 8, 12), weights(D, 3, 4, 4) | IMAGENET),
    "bytes, one std": lambda: (image_bytes(B, 3, 8, 12), weights(D, 3, 4, 4) | EQUAL),
    "tail": lambda: (image(B, 3, 8, 12), weights(D, 3, 4, 4) | tokens_of(B, 6, P, D)),
    "bytes and tail": lambda: (
        image_bytes(B, 3, 8, 12), weights(D, 3, 4, 4) | IMAGENET | tokens_of(B, 6, P, D)
    ),
    "positions of samples": lambda: (
        image(B, 3, 8, 12),
        weights(D, 3, 4, 4) | {"pos_embed": normal(B, 6, D), "prefix_tokens": normal(B, P, D)},
    ),
    "gathered": lambda: (
        image(B, 3, 8, 12),
        weights(D, 3, 4, 4)
        | {"pos_embed": normal(5, D), "pos_index": torch.arange(B * 6).view(B, 6) % 5},
    ),
    "video": lambda: (image(B, 3, 4, 8, 12), weights(D, 3, 2, 4, 4) | IMAGENET),
    "video, bytes": lambda: (
        image_bytes(B, 3, 4, 8, 12), weights(D, 3, 2, 4, 4) | IMAGENET | tokens_of(B, 12, P, D)
    ),
    "no sample": lambda: (image(0, 3, 8, 12), weights(D, 3, 4, 4) | IMAGENET),
    "one channel": lambda: (image_bytes(B, 1, 8, 12), weights(D, 1, 4, 4) | {"pixel_std": 0.3}),
}  # fmt: skip


def results(function, pixels: Tensor, options: dict, dtype: torch.dtype, **more) -> dict:
    """out and the gradients of the options."""

    def leaf(x):
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_()
        return x

    options = {name: leaf(x) for name, x in options.items()}
    out = function(pixels if pixels.dtype == torch.uint8 else pixels.to(dtype), **options, **more)
    named = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(out, list(named.values()), normal(*out.shape, seed=99).to(out))
    return {"out": out.detach()} | dict(zip(named, grads, strict=True))


def assert_same(got: dict, wanted: dict, dtype: torch.dtype) -> None:
    assert got.keys() == wanted.keys()
    near = (
        {"atol": 1e-11, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-4}
    )
    for name, x in got.items():
        assert x.dtype == dtype
        torch.testing.assert_close(
            x.double().flatten(), wanted[name].flatten(), **near,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=backends.short)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_is_it_the_image_call(name, data_format, dtype):
    pixels, options = CALLS[name]()
    wanted = results(mm.patch_embed, pixels, options, torch.float64, backend="reference")
    patches = cut(pixels, tuple(options["weight"].shape[2:]), data_format)
    got = results(mm.patch_embed, patches, options, dtype, data_format=data_format)
    assert got["out"].shape == wanted["out"].shape
    assert_same(got, wanted, dtype)


@pytest.mark.parametrize("name", ["plain", "tail", "bytes", "one channel", "video, bytes"])
def test_does_a_weight_of_linear_serve(name):
    """Its columns are in the order of the patches' values, which it does not need to know."""
    pixels, options = CALLS[name]()
    options = {key: x for key, x in options.items() if key != "pixel_mean"}
    options |= {"pixel_std": 0.3} if "pixel_std" in options else {}
    wanted = results(mm.patch_embed, pixels, options, torch.float64, backend="reference")
    for data_format in FORMATS:
        patches = cut(pixels, tuple(options["weight"].shape[2:]), data_format)
        weight = options["weight"]
        order = weight if data_format == "channels_first" else weight.movedim(1, -1)
        linear = options | {"weight": order.flatten(1)}
        # The order is the weight's own, so that data_format says nothing.
        for said in FORMATS:
            got = results(mm.patch_embed, patches, linear, torch.float64, data_format=said)
            dweight = got["weight"].view(order.shape)
            got["weight"] = dweight if data_format == "channels_first" else dweight.movedim(-1, 1)
            assert_same(got, wanted, torch.float64)


@pytest.mark.parametrize("dim", [2, 4, 5])
def test_are_packed_rows_one_sample(dim):
    shape = {2: (D, 24), 4: (D, 3, 2, 4), 5: (D, 3, 2, 2, 2)}[dim]
    options = weights(D, 24) | {"prefix_tokens": normal(P, D), "pos_embed": normal(7 + P, D)}
    options["weight"] = options["weight"].view(shape)
    rows = normal(7, 24)
    out = mm.patch_embed(rows, **options)
    assert out.shape == (7 + P, D)
    assert torch.equal(out, mm.patch_embed(rows[None], **options)[0])
    wanted = rows @ options["weight"].flatten(1).t() + options["bias"]
    wanted = torch.cat((options["prefix_tokens"], wanted)) + options["pos_embed"]
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("data_format", FORMATS)
def test_have_pixels_a_gradient(data_format):
    options = weights(4, 3, 2, 2) | tokens_of(2, 5, 1, 4) | IMAGENET
    patches = normal(2, 5, 12).requires_grad_()

    def run(patches):
        return mm.patch_embed(patches, **options, data_format=data_format)

    assert torch.autograd.gradcheck(run, patches)


def test_do_strange_strides_serve():
    options = weights(D, 3, 4, 4) | IMAGENET
    dense = image(B, 6, 48)
    wanted = mm.patch_embed(dense, **options)
    for x in (
        dense.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack((dense, dense), -1)[..., 1],
        dense[:, :, None].expand(-1, -1, 2, -1)[:, :, 1],
    ):
        torch.testing.assert_close(mm.patch_embed(x, **options), wanted)
    one = dense[:1].expand(B, -1, -1)
    torch.testing.assert_close(mm.patch_embed(one, **options)[2], wanted[0])
    none = mm.patch_embed(dense[:, :0], **options)
    assert none.shape == (B, 0, D)


def test_does_nan_of_a_masked_patch_stay_there():
    options = weights(D, 3, 4, 4) | tokens_of(B, 6, P, D) | IMAGENET
    patches = image(B, 6, 48)
    wanted = results(mm.patch_embed, patches, options, torch.float64)
    bad = patches.masked_fill(options["token_mask"][..., None], float("nan"))
    assert_same(results(mm.patch_embed, bad, options, torch.float64), wanted, torch.float64)


def test_is_it_under_autocast_what_a_linear_layer_is():
    options = weights(D, 3, 4, 4) | {"pos_embed": normal(6, D)}
    options = {name: x.float().requires_grad_() for name, x in options.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mm.patch_embed(image(B, 6, 48).float(), **options)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in options.values())


def test_does_explain_name_the_product():
    found = mm.explain(mm.patch_embed, image(B, 6, 48), **weights(D, 3, 4, 4))
    assert found.op == "linear" and found.backend == "torch"
