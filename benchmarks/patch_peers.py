"""One patch embedding, the implementations that make it, and the check of what they return.

All read the same pixels. What a model would do once, such as bringing a weight into another memory
format, is done before the clock starts; normalising bytes is part of every call.
"""

import functools
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mm
from benchmarks.environment import SEED
from mmkernels import testing

# (pixels, **options of `mmkernels.patch_embed`) -> tokens.
Embedding = Callable[..., Tensor]
LEAVES = ("weight", "bias", "pos_embed", "prefix_tokens")


class Shape(NamedTuple):
    """The embedding of one model.

    Attributes:
        batch: samples.
        channels: of the pixels.
        size: of the pixels, ([T,] H, W).
        kernel: of a patch, as long.
        dim: of a token.
        prefix: class and other tokens before the patches; they have positions, too.
        bias: whether there is one.
        positions: likewise.
        stride: of patches that overlap; None: the kernel.
        transposed: H and W are stored the other way round.
        flattened: the patches come cut out, (batch, channels * kernel).
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    dim: int
    prefix: int = 0
    bias: bool = True
    positions: bool = True
    stride: tuple[int, ...] | None = None
    transposed: bool = False
    flattened: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        return self.stride or self.kernel

    @property
    def tokens(self) -> int:
        """Patches of a sample."""
        sizes = zip(self.size, self.kernel, self.steps, strict=True)
        return math.prod((n - k) // s + 1 for n, k, s in sizes)

    def quick(self) -> "Shape":
        """The same with little to compute, and with what is too small for a patch."""
        size = self.kernel
        if not self.flattened:
            sizes = zip(self.size, self.kernel, self.steps, strict=True)
            size = tuple(k + s + (n - k) % s for n, k, s in sizes)
        return self._replace(batch=2, size=size, dim=32)


class PatchProblem:
    """Seeded pixels, parameters and dout.

    Args:
        shape: of all.
        dtype: of the parameters.
        image_bytes: pixels are uint8 with mean and std 0.5; else they have the parameters' dtype.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, image_bytes: bool) -> None:
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(SEED)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        size = shape.size[::-1] if shape.transposed else shape.size
        pixels = normal(shape.batch, shape.channels, *size)
        if image_bytes:
            pixels = (pixels * 64 + 128).clamp(0, 255).to(torch.uint8)
        else:
            pixels = pixels.to(dtype)
        self.pixels = pixels.transpose(-1, -2) if shape.transposed else pixels
        values = shape.channels * math.prod(shape.kernel)
        weight = normal(shape.dim, shape.channels, *shape.kernel) * values**-0.5
        made = {"weight": weight}
        if shape.bias:
            made["bias"] = normal(shape.dim)
        if shape.positions:
            made["pos_embed"] = normal(1, shape.prefix + shape.tokens, shape.dim)
        if shape.prefix:
            made["prefix_tokens"] = normal(1, shape.prefix, shape.dim)
        self.parameters = {name: x.to(dtype).requires_grad_() for name, x in made.items()}
        self.settings: dict[str, Any] = {"stride": shape.stride}
        if image_bytes:
            half = [0.5] * shape.channels
            self.settings |= {"pixel_mean": half, "pixel_std": half}
        rows = shape.batch * (shape.prefix + shape.tokens)
        self.dout = normal(rows, shape.dim).to(dtype)

    def solver(
        self, embedding: Embedding, backward: bool, channels_last: bool = False
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A call that returns (out,), or with `backward` out and the parameters' gradients."""
        pixels, parameters = self.pixels, dict(self.parameters)
        if channels_last:
            layout = torch.channels_last if pixels.ndim == 4 else torch.channels_last_3d
            pixels = pixels.contiguous(memory_format=layout)
            weight = parameters["weight"].detach().contiguous(memory_format=layout)
            parameters["weight"] = weight.requires_grad_()
        leaves = list(parameters.values())
        dout = self.dout

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (embedding(pixels, **parameters, **self.settings),)

        def forward_backward() -> tuple[Tensor, ...]:
            out = embedding(pixels, **parameters, **self.settings)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout.view(out.shape)))

        return forward_backward if backward else forward

    @functools.cached_property
    def expected(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """out and gradients: of the reference in float64, and of eager PyTorch."""
        exact = object.__new__(PatchProblem)
        exact.__dict__.update(vars(self))
        pixels = self.pixels if self.pixels.dtype == torch.uint8 else self.pixels.double()
        exact.pixels, exact.dout = pixels, self.dout.double()
        exact.parameters = {
            name: x.detach().double().requires_grad_() for name, x in self.parameters.items()
        }
        oracle = functools.partial(mm.patch_embed, backend="reference")
        return exact.solver(oracle, True)(), self.solver(testing.eager_patch_embed, True)()

    def check(self, who: str, results: tuple[Tensor, ...]) -> float:
        """The largest error of `results`; raises if one breaks the error rule."""
        exact, eager = self.expected
        names = ("out", *(f"d{name}" for name in self.parameters))
        errors = []
        for name, got, *wanted in zip(names, results, exact, eager, strict=False):
            wanted = [x.view(got.shape) for x in wanted]
            testing.assert_accurate(f"{who}: {name}", got, *wanted)
            errors.append(float((got.double() - wanted[0]).abs().max()))
        return max(errors)

    def solvers(self, backward: bool, compiled: bool) -> dict[str, Callable]:
        """Name -> solver: mmkernels, and its peers; `compiled`: torch.compile among them."""
        eager = testing.eager_patch_embed
        found = {
            "mmkernels": self.solver(ours(self.shape), backward),
            "eager": self.solver(eager, backward),
            "patches, F.linear": self.solver(linear(self.shape), backward),
        }
        # The backward pass of F.conv3d with channels last breaks the error rule at dbias.
        if not (backward and self.pixels.ndim == 5):
            found["eager, channels_last"] = self.solver(eager, backward, channels_last=True)
        if compiled:
            torch._dynamo.reset()  # or the ninth shape would not be compiled
            found["torch.compile"] = self.solver(torch.compile(eager, dynamic=False), backward)
        if not backward and why_not_timm(self.shape) is None:
            found["timm"] = self.solver(timm_embedding(self.shape, self.parameters), backward)
        return found


def ours(shape: Shape) -> Embedding:
    """`mmkernels.patch_embed`; patches that are cut out go in as they come, (N, K)."""
    if not shape.flattened:
        return mm.patch_embed
    return lambda pixels, **options: mm.patch_embed(pixels.flatten(1), **options)


def followed(tokens: Tensor, pos_embed: Tensor | None, prefix_tokens: Tensor | None) -> Tensor:
    """Tokens (B, N, D) behind the prefix, plus positions, as models write it."""
    if prefix_tokens is not None:
        tokens = torch.cat((prefix_tokens.expand(len(tokens), -1, -1), tokens), 1)
    return tokens if pos_embed is None else tokens + pos_embed


def normalized(
    pixels: Tensor,
    dtype: torch.dtype,
    pixel_mean: list[float] | None,
    pixel_std: list[float] | None,
) -> Tensor:
    """Bytes as a processor makes them ready for the model."""
    if pixel_mean is None or pixel_std is None:
        return pixels
    shape = (-1, *(1,) * (pixels.ndim - 2))
    mean, std = (torch.tensor(numbers).view(shape) for numbers in (pixel_mean, pixel_std))
    return ((pixels.float() / 255 - mean) / std).to(dtype)


def linear(shape: Shape) -> Embedding:
    """The patches cut out by reshape and permute, or F.unfold where they overlap; F.linear."""

    def embedding(
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        stride: tuple[int, ...] | None = None,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
    ) -> Tensor:
        x = normalized(pixels, weight.dtype, pixel_mean, pixel_std)
        if stride is None:
            for dim, k in enumerate(shape.kernel):
                place, count = 2 + 2 * dim, shape.size[dim] // k
                x = x.narrow(place, 0, count * k).unflatten(place, (count, k))
            dims = len(shape.kernel)
            grid, inner = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
            rows = x.permute(0, *grid, 1, *inner).flatten(-1 - dims).flatten(1, -2)
        else:
            rows = F.unfold(x, shape.kernel, stride=stride).transpose(1, 2)
        return followed(F.linear(rows, weight.flatten(1), bias), pos_embed, prefix_tokens)

    return embedding


def timm_embedding(shape: Shape, parameters: dict[str, Tensor]) -> Embedding:
    """timm's PatchEmbed with these parameters, and what its VisionTransformer does next."""
    from timm.layers import PatchEmbed

    module = PatchEmbed(shape.size, shape.kernel[0], shape.channels, shape.dim, bias=shape.bias)
    made = {"proj.weight": parameters["weight"]}
    if shape.bias:
        made["proj.bias"] = parameters["bias"]
    module.to(parameters["weight"].dtype).load_state_dict(made)

    def embedding(
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        stride: tuple[int, ...] | None = None,
        pixel_mean: list[float] | None = None,
        pixel_std: list[float] | None = None,
    ) -> Tensor:
        x = normalized(pixels, weight.dtype, pixel_mean, pixel_std)
        return followed(module(x), pos_embed, prefix_tokens)

    return embedding


def why_not_timm(shape: Shape) -> str | None:
    """Why timm's PatchEmbed cannot make this embedding, or None."""
    if find_spec("timm") is None:
        return "timm is not installed"
    if len(shape.kernel) != 2 or shape.stride is not None:
        return "timm's PatchEmbed is for images, and has no stride"
    return None


def why_not_compiled() -> str | None:
    """Why torch.compile cannot run on this machine."""
    return None if shutil.which("g++") else "torch.compile on a CPU needs g++, not on PATH"
