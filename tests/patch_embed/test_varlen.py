"""Are images of mixed size in one call what each of them is alone, forward and backward?"""

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends
from tests.patch_embed.cases import BACKENDS, EQUAL, IMAGENET, image_bytes, normal, weights

EVERY = backends.each("auto", *BACKENDS)
FEW = backends.each("cpu", "triton")
D = 20
SIZES = ((8, 12), (4, 4), (11, 6), (8, 12))  # with patches of 4 x 4: 6, 1, 2 and 6 tokens
COUNTS = (6, 1, 2, 6)
PADDED = (6, 1, 6, 6)
TOTAL = sum(COUNTS)


def images(sizes=SIZES, channels: int = 3) -> list[Tensor]:
    return [normal(channels, *size, seed=seed) for seed, size in enumerate(sizes)]


def bytes_of(sizes=SIZES) -> list[Tensor]:
    return [image_bytes(3, *size) for size in sizes]


def mask_of(count: int) -> dict[str, Tensor]:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(4)) < 0.4
    return {"token_mask": mask, "mask_token": normal(D, seed=7)}


W = weights(D, 3, 4, 4)
PREFIX = {"prefix_tokens": normal(2, D, seed=5)}
INDEX = torch.randint(0, 9, (TOTAL + 8,), generator=torch.Generator().manual_seed(8))
# Name -> images, and options; what runs over all tokens is cut for each image in `one_by_one`.
CALLS = {
    "plain": lambda: (images(), W),
    "prefix": lambda: (images(), W | PREFIX),
    "positions": lambda: (images(), W | {"pos_embed": normal(TOTAL, D, seed=6)}),
    "positions, prefix": lambda: (
        images(), W | PREFIX | {"pos_embed": normal(TOTAL, D, seed=6)}
    ),
    "positions of prefix": lambda: (
        images(), W | PREFIX | {"pos_embed": normal(TOTAL + 8, D, seed=6)}
    ),
    "gathered": lambda: (
        images(), W | {"pos_embed": normal(9, D, seed=6), "pos_index": INDEX[:TOTAL].int()}
    ),
    "gathered, prefix": lambda: (
        images(), W | PREFIX | {"pos_embed": normal(9, D, seed=6), "pos_index": INDEX}
    ),
    "masked": lambda: (
        images(), W | PREFIX | mask_of(TOTAL) | {"pos_embed": normal(TOTAL, D, seed=6)}
    ),
    "normalized": lambda: (images(), W | IMAGENET),
    "bytes": lambda: (bytes_of(), W | IMAGENET | PREFIX),
    "bytes, one std": lambda: (bytes_of(), W | EQUAL),
    "pad": lambda: (bytes_of(), W | IMAGENET | mask_of(sum(PADDED)) | {"pad": True}),
    "channels last": lambda: (
        [x.permute(1, 2, 0).contiguous() for x in images()], W | {"data_format": "channels_last"}
    ),
    "bytes, channels last": lambda: (
        [x.permute(1, 2, 0).contiguous() for x in bytes_of()],
        W | IMAGENET | {"data_format": "channels_last"},
    ),
    "stride": lambda: (images(), W | {"stride": (2, 3)}),
    "one image": lambda: (images(SIZES[2:3]), W | PREFIX),
    "one patch": lambda: (images(SIZES[1:2]), W | PREFIX | {"pos_embed": normal(1, D, seed=6)}),
    "strange strides": lambda: (
        [
            normal(3, 12, 8).transpose(1, 2), normal(4, 1, 3).permute(2, 0, 1).expand(3, 4, 4),
            normal(3, 22, 18)[:, ::2, ::3], normal(1, 8, 12).expand(3, 8, 12),
        ],
        W,
    ),
    "video": lambda: (images([(2, 4, 9), (5, 4, 4)]), weights(D, 3, 2, 4, 4)),
    "audio": lambda: (images([(30,), (11,)], 1), weights(D, 1, 10) | {"stride": 5}),
}  # fmt: skip


def leaves_of(made: list[Tensor], options: dict, dtype: torch.dtype, device: str) -> tuple:
    """The images and options in `dtype` on the device, those with gradients as leaves."""

    def leaf(x):
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.to(device)
        return x.to(device, dtype).detach().requires_grad_()

    return [leaf(x) for x in made], {name: leaf(x) for name, x in options.items()}


def one_by_one(made: list[Tensor], options: dict) -> tuple[Tensor, list[int]]:
    """A loop over the images on the reference, and the number of rows that each makes."""
    prefix = len(options["prefix_tokens"]) if "prefix_tokens" in options else 0
    plain = {
        name: x
        for name, x in options.items()
        if name not in ("pos_embed", "pos_index", "token_mask", "mask_token", "prefix_tokens")
    }
    counts = [mm.patch_embed(x[None], **plain, backend="reference").shape[1] for x in made]
    pos, index = options.get("pos_embed"), options.get("pos_index")
    slots = pos if index is None else index
    whole = slots is not None and len(slots) == sum(counts) + prefix * len(counts)
    parts, token, row = [], 0, 0
    for x, count in zip(made, counts, strict=True):
        own = dict(options)
        if slots is not None:
            first, size = (row, prefix + count) if whole else (token, count)
            own["pos_embed" if index is None else "pos_index"] = slots[first : first + size]
        if "token_mask" in options:
            own["token_mask"] = options["token_mask"][token : token + count]
        parts.append(mm.patch_embed(x[None], **own, backend="reference")[0])
        token, row = token + count, row + prefix + count
    return torch.cat(parts), [len(part) for part in parts]


def results(out: Tensor, made: list[Tensor], options: dict) -> dict[str, Tensor]:
    """out and the gradients of all leaves."""
    named = {f"images[{i}]": x for i, x in enumerate(made)} | options
    named = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(out, list(named.values()), normal(*out.shape, seed=99).to(out))
    return {"out": out.detach()} | dict(zip(named, grads, strict=True))


@EVERY
@pytest.mark.parametrize("name", CALLS)
def test_is_each_image_what_it_is_alone(name, backend):
    dtype = backends.widest(backend)
    made, options = leaves_of(*CALLS[name](), torch.float64, "cpu")
    out, rows = one_by_one(made, options)
    wanted = results(out, made, options)
    made, options = leaves_of(*CALLS[name](), dtype, testing.device_for(backend))
    out, cu_seqlens = mm.patch_embed_varlen(made, **options, backend=backend)
    assert out.dtype == dtype and out.device == cu_seqlens.device == made[0].device
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(rows[:n]) for n in range(len(rows) + 1)]
    got = results(out, made, options)
    assert got.keys() == wanted.keys()
    # Of float32: sums of up to a few hundred products of size up to 5.
    near = (
        {"atol": 1e-11, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-4, "rtol": 1e-4}
    )
    for key, x in got.items():
        assert x.dtype == dtype and x.shape == wanted[key].shape
        torch.testing.assert_close(
            x.cpu().double(), wanted[key], **near, msg=lambda text, key=key: f"{key}: {text}"
        )


@FEW
@pytest.mark.parametrize("name", ["bytes", "bytes, one std", "pad"])
def test_are_bytes_right_in_16_bits(name, backend):
    """Where they enter the product as they are, and mean and std follow."""
    dtype = torch.float16
    made, options = leaves_of(*CALLS[name](), dtype, testing.device_for(backend))
    out, _ = mm.patch_embed_varlen(made, **options, backend=backend)
    got = results(out, made, options)
    made, options = leaves_of(*CALLS[name](), dtype, "cpu")
    made, options = leaves_of(made, options, torch.float64, "cpu")
    wanted = results(one_by_one(made, options)[0], made, options)
    for key, x in got.items():
        near = 4 * torch.finfo(dtype).eps * float(wanted[key].abs().amax())
        torch.testing.assert_close(x.cpu().double(), wanted[key], atol=near, rtol=0.0, msg=key)


@EVERY
def test_are_equal_sizes_the_batch(backend):
    made, options = leaves_of(images(SIZES[:1] * 3), W | PREFIX, torch.float32, "cpu")
    made, options = backends.moved((made, options), testing.device_for(backend))
    out, cu_seqlens = mm.patch_embed_varlen(made, **options, backend=backend)
    batch = mm.patch_embed(torch.stack(list(made)), **options, backend=backend)
    torch.testing.assert_close(out, batch.flatten(0, 1), atol=2e-6, rtol=2e-5)
    assert cu_seqlens.tolist() == [0, 8, 16, 24]


def test_do_attention_and_masks_take_cu_seqlens():
    made, options = leaves_of(images(), W | PREFIX, torch.float32, "cpu")
    tokens, cu_seqlens = mm.patch_embed_varlen(made, **options)
    heads = tokens.view(-1, 2, D // 2)
    longest = max(COUNTS) + 2
    out = mm.attention_varlen(heads, heads, heads, cu_seqlens, cu_seqlens, longest, longest)
    by_mask = mm.attention(*(heads[None],) * 3, mask=mm.masks.packed(cu_seqlens))[0]
    torch.testing.assert_close(out, by_mask)
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = heads[None, first:last]
        torch.testing.assert_close(out[first:last], mm.attention(alone, alone, alone)[0])
    out.sum().backward()
    assert all(x.grad is not None for x in (*made, options["weight"], options["prefix_tokens"]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_may_the_list_be_a_tuple_or_hold_one_image_twice(backend):
    x = images(SIZES[:1])[0].requires_grad_()
    other = images(SIZES[2:3])[0].requires_grad_()
    out, cu_seqlens = mm.patch_embed_varlen((x, other, x), **W, backend=backend)
    assert cu_seqlens.tolist() == [0, 6, 8, 14]
    torch.testing.assert_close(out[:6], out[8:])
    dout = normal(*out.shape, seed=99)
    (grad,) = torch.autograd.grad(out, x, dout)
    alone, _ = mm.patch_embed_varlen([x], **W, backend=backend)
    (wanted,) = torch.autograd.grad(alone, x, dout[:6] + dout[8:])
    torch.testing.assert_close(grad, wanted)


def test_a_default_device_is_not_where_lengths_are_counted():
    images = [normal(3, 8, 12).float(), normal(3, 4, 8).float()]
    weight = weights(D, 3, 4, 4)["weight"].float()
    with torch.device("meta"):
        _, cu_seqlens = mm.patch_embed_varlen(images, weight)
    assert cu_seqlens.tolist() == [0, 6, 8]


@backends.each("reference", "triton", "cpu")
def test_has_one_tensor_at_two_places_a_gradient_at_each(backend):
    """A compiled graph makes one view of an image that a list holds twice."""
    x, weight = normal(1, 3, 1, 8, 12).float(), normal(D, 3, 1, 4, 4).float()
    dout = normal(12, D).float()
    one, two, dout, weight = backends.moved(
        (x, x.clone(), dout, weight), testing.device_for(backend)
    )
    rest = (weight, *[None] * 6, [], [], [1, 4, 4], False, False, False, False)
    wanted, got = (
        torch.ops.mmkernels.patch_embed_backward(
            dout, pixels, *rest, [True, *[False] * 5], backend
        )[0]
        for pixels in ([one, two], [one, one])
    )
    torch.testing.assert_close(got, wanted)


@FEW
def test_may_one_image_of_several_want_a_gradient(backend):
    made, options = leaves_of(images(), W, torch.float32, testing.device_for(backend))
    made = [x.detach() for x in made]
    options["weight"].requires_grad_(False)
    options["bias"].requires_grad_(False)
    made[2].requires_grad_()
    out, _ = mm.patch_embed_varlen(made, **options, backend=backend)
    (got,) = torch.autograd.grad(out.square().sum(), made[2])
    alone, _ = mm.patch_embed_varlen(made[2:3], **options, backend="reference")
    (wanted,) = torch.autograd.grad(alone.square().sum(), made[2])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_is_a_long_list_cut_into_chunks_of_images():
    """More rows than one product takes, and one image that alone has as many."""
    sizes = [(8, 4 * n) for n in (3, 700, 1, 1300, 5, 2, 400, 9)]
    made = images(sizes, 1)
    options = weights(4, 1, 4, 4) | {"prefix_tokens": normal(1, 4)}
    got, cu_seqlens = mm.patch_embed_varlen(made, **options, backend="cpu")
    wanted, rows = one_by_one(made, options)
    assert cu_seqlens.diff().tolist() == rows
    torch.testing.assert_close(got, wanted)
