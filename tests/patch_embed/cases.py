"""Calls of the patch embedding that between them use every argument, small enough for any backend.

A case is made in float64; `Case.to` casts it. Images that are bytes stay bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import registry

# What serves every call; the CUDA kernels' own tests are test_cuda*.py.
BACKENDS = tuple(
    backend.name for backend in registry.backends("patch_embed_forward") if backend.name != "cuda"
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EQUAL = {"pixel_mean": (0.4, 0.5, 0.6), "pixel_std": (0.5, 0.5, 0.5)}
IMAGENET = {"pixel_mean": MEAN, "pixel_std": STD}


class Case(NamedTuple):
    """Arguments of `mm.patch_embed`.

    Attributes:
        pixels: with channels first.
        options: all others by name, weight among them.
    """

    pixels: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """The same call on another device, what is floating point in another dtype."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # Of an expanded or transposed tensor the strides are what matters.
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        options = {name: cast(x) for name, x in self.options.items()}
        return Case(cast(self.pixels), options)

    def results(
        self, function: Callable[..., Tensor], pixel_grad: bool = True, **more: Any
    ) -> dict[str, Tensor]:
        """out and the gradients of every floating-point argument."""
        leaves = {"pixels": self.pixels} | self.options
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in leaves.items()
            if isinstance(x, Tensor) and x.is_floating_point() and (name != "pixels" or pixel_grad)
        }
        arguments = {"pixels": self.pixels} | self.options | leaves
        out = function(**arguments, **more)
        dout = normal(*out.shape, seed=99).to(out)
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), **named}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def weights(dim: int, *shape: int) -> dict[str, Tensor]:
    """weight and bias, with tokens of size 1."""
    size = torch.Size(shape).numel() ** -0.5
    return {"weight": normal(dim, *shape, seed=2) * size, "bias": normal(dim, seed=3) * 0.1}


def tokens_of(batch: int, tokens: int, prefix: int, dim: int) -> dict[str, Tensor]:
    """What may follow the product: prefix tokens with positions, and masked tokens."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(4)) < 0.4
    return {
        "prefix_tokens": normal(prefix, dim, seed=5),
        "pos_embed": normal(prefix + tokens, dim, seed=6),
        "token_mask": mask,
        "mask_token": normal(dim, seed=7),
    }


def vit() -> Case:
    """Class token, positions for all, a rest of the image that is dropped."""
    options = {**weights(24, 3, 8, 8), "prefix_tokens": normal(1, 24, seed=5)}
    return Case(normal(2, 3, 35, 26), {**options, "pos_embed": normal(1, 13, 24, seed=6)})


def registers() -> Case:
    """No bias, positions on patches alone, several prefix tokens."""
    options = {"weight": weights(40, 3, 14, 14)["weight"], "prefix_tokens": normal(5, 40, seed=5)}
    return Case(normal(2, 3, 28, 42), {**options, "pos_embed": normal(6, 40, seed=6)})


def masked() -> Case:
    return Case(normal(3, 3, 16, 24), weights(20, 3, 8, 8) | tokens_of(3, 6, 2, 20))


def many_samples() -> Case:
    """More samples than are summed at once."""
    return Case(normal(19, 3, 8, 16), weights(12, 3, 8, 8) | tokens_of(19, 2, 1, 12))


def masked_alike() -> Case:
    """One mask and no position for all samples."""
    mask = torch.tensor([True, False, True, True, False, False])
    options = {"token_mask": mask, "mask_token": normal(20, seed=7)}
    return Case(normal(3, 3, 16, 24), weights(20, 3, 8, 8) | options)


def per_sample() -> Case:
    """Positions and prefix of each sample's own."""
    options = {"pos_embed": normal(3, 8, 20, seed=6), "prefix_tokens": normal(3, 2, 20, seed=5)}
    return Case(normal(3, 3, 16, 24), weights(20, 3, 8, 8) | options)


def gathered() -> Case:
    """Positions from a table, some rows of it used often and some never."""
    index = torch.tensor([[0, 3, 3, 1, 0, 0], [5, 4, 3, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
    options = {"pos_embed": normal(7, 20, seed=6), "pos_index": index}
    return Case(normal(3, 3, 16, 24), weights(20, 3, 8, 8) | options)


def gathered_alike() -> Case:
    """The same rows for every sample, prefix tokens included."""
    options = {
        "pos_embed": normal(4, 20, seed=6),
        "pos_index": torch.tensor([3, 0, 2, 2, 1, 0, 0], dtype=torch.int32),
        "prefix_tokens": normal(1, 20, seed=5),
    }
    return Case(normal(3, 3, 16, 24), weights(20, 3, 8, 8) | options)


def normalized() -> Case:
    """Floats in 0 to 1, normalised on the way."""
    return Case(normal(2, 3, 28, 28).sigmoid(), weights(20, 3, 14, 14) | IMAGENET)


def image() -> Case:
    """Bytes, one std for all channels."""
    return Case(image_bytes(2, 3, 32, 32), weights(24, 3, 16, 16) | EQUAL | tokens_of(2, 4, 1, 24))


def image_stds() -> Case:
    """Bytes, a std for each channel, stored with channels last, a patch of 14."""
    pixels = image_bytes(2, 28, 45, 3).permute(0, 3, 1, 2)
    return Case(pixels, weights(24, 3, 14, 14) | IMAGENET)


def image_plain() -> Case:
    """Bytes that are only divided by 255."""
    return Case(image_bytes(2, 3, 16, 16), weights(24, 3, 8, 8))


def padded() -> Case:
    """Bytes, filled up to whole patches with what is 0 after normalisation."""
    options = weights(24, 3, 8, 8) | IMAGENET | {"pad": True} | tokens_of(2, 15, 1, 24)
    return Case(image_bytes(2, 3, 17, 35), options)


def padded_floats() -> Case:
    return Case(normal(2, 3, 17, 21), weights(24, 3, 8, 8) | IMAGENET | {"pad": True})


def overlapping() -> Case:
    """A spectrogram (B, time, mel) as its transformer sees it: transposed, patches overlap."""
    pixels = normal(2, 45, 26)[:, None].transpose(2, 3)
    options = weights(24, 1, 16, 16) | {"stride": 10, "pos_embed": normal(6, 24, seed=6)}
    return Case(pixels, options)


def overlapping_padded() -> Case:
    options = weights(16, 2, 7, 5) | {"stride": (3, 4), "pad": True} | {"pixel_mean": (0.1, 0.2)}
    return Case(image_bytes(2, 2, 15, 18), options | {"pixel_std": (0.3, 0.4)})


def apart_padded() -> Case:
    """Patches with gaps between them; the last one along each axis is partly in the image."""
    options = weights(16, 3, 2, 3) | {"stride": (4, 5), "pad": True} | IMAGENET
    return Case(image_bytes(2, 3, 5, 12), options)


def video() -> Case:
    options = weights(24, 3, 2, 8, 8) | {"pos_embed": normal(12, 24, seed=6)}
    return Case(normal(2, 3, 5, 17, 24), options)


def video_bytes() -> Case:
    options = weights(16, 3, 2, 8, 8) | IMAGENET | {"pad": True}
    return Case(image_bytes(2, 3, 5, 17, 24), options)


def audio() -> Case:
    """Frames of raw samples, longer than a step of a product, overlapping."""
    return Case(normal(2, 1, 700), weights(24, 1, 160) | {"stride": 100})


def audio_channels() -> Case:
    return Case(normal(2, 10, 33), weights(24, 10, 3))


def wide_channels() -> Case:
    """Many channels, one row a patch, and a token wider than a tile."""
    return Case(normal(1, 10, 4, 9), weights(140, 10, 1, 3))


def strided() -> Case:
    """Every argument without contiguous memory; expanded samples."""
    made = weights(24, 3, 8, 8)
    options = {
        "weight": made["weight"].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
        "bias": made["bias"].repeat_interleave(2)[::2],
        "pos_embed": normal(24, 3, seed=6).t(),
        "prefix_tokens": normal(24, 1, seed=5).t(),
    }
    return Case(normal(1, 24, 3, 33)[:, ::2, :, ::2].transpose(1, 2).expand(2, 3, 12, 17), options)


CASES: dict[str, Callable[[], Case]] = {
    function.__name__: function
    for function in (
        vit, registers, masked, many_samples, masked_alike, per_sample, gathered, gathered_alike,
        normalized, image, image_stds, image_plain, padded, padded_floats, overlapping,
        overlapping_padded, apart_padded, video, video_bytes, audio, audio_channels,
        wide_channels, strided,
    )
}  # fmt: skip


def check(case: Case, dtype: torch.dtype, run: Callable[[Case], dict[str, Tensor]]) -> None:
    """Holds out and all gradients that `run` makes of the case to the error rule."""
    cast = case.to(dtype)
    got = run(cast)
    exact = cast.to(torch.float64).results(mm.patch_embed, backend="reference")
    eager = cast.results(testing.eager_patch_embed)
    assert got.keys() == exact.keys()
    # float64 has no wider reference: its own sums differ by some roundings, too.
    rounding = 16 * torch.finfo(dtype).eps if dtype == torch.float64 else None
    for name, x in got.items():
        testing.assert_accurate(name, x, exact[name], eager[name], rounding)
