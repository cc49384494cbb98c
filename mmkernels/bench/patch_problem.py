"""One patch embedding: pixels and parameters of a model, the implementations, and the check.

All read the same pixels, channels first as processors leave them, but for "channels_last": a model
in that format is given its pixels so, and they and the weight are brought into it before the clock
starts. Normalising bytes is part of every call.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench import calls, patch_peers
from mmkernels.bench.case import OURS, SEED, Call, Results, Unavailable
from mmkernels.bench.compiling import compiled
from mmkernels.bench.patch_peers import Embedding


class Shape(NamedTuple):
    """The embedding of one model.

    Attributes:
        channels: of the pixels.
        size: of the pixels, ([T,] H, W).
        kernel: of a patch, as long.
        dim: of a token.
        batch: samples.
        prefix: class and other tokens before the patches; they have positions, too.
        bias: whether there is one.
        positions: likewise.
        stride: of patches that overlap; None: the kernel.
        transposed: H and W are stored the other way round.
        flattened: the patches come cut out, (batch, channels * kernel).
        mixed: sizes of images in one packed sequence, instead of size and batch.
    """

    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    dim: int
    batch: int = 1
    prefix: int = 0
    bias: bool = True
    positions: bool = True
    stride: tuple[int, ...] | None = None
    transposed: bool = False
    flattened: bool = False
    mixed: tuple[tuple[int, ...], ...] = ()

    @property
    def values(self) -> int:
        """Of a patch."""
        return self.channels * math.prod(self.kernel)

    @property
    def patches(self) -> int:
        """Of all samples."""
        return sum(map(self._grid, self.mixed)) if self.mixed else self.batch * self.tokens

    @property
    def tokens(self) -> int:
        """Patches of a sample."""
        return self._grid(self.size)

    def _grid(self, size: tuple[int, ...]) -> int:
        sizes = zip(size, self.kernel, self.stride or self.kernel, strict=True)
        return math.prod((n - k) // s + 1 for n, k, s in sizes)

    def text(self, pixels: str) -> str:
        """In the field's letters; `pixels` names their dtype if that is not the parameters'."""
        kernel, size = ("×".join(map(str, x)) for x in (self.kernel, (self.channels, *self.size)))
        if len(set(self.kernel)) == 1:
            kernel = str(self.kernel[0])
        if self.flattened:
            parts = [f"{self.batch} patches {size}"]
        elif self.mixed:
            grids = [self._grid(one) for one in self.mixed]
            parts = [f"{len(grids)} images of {min(grids)} to {max(grids)} patches"]
        else:
            parts = [f"B{self.batch} {size}"]
        stride = f"/{self.stride[0]}" if self.stride else ""
        return " ".join(filter(None, (*parts, pixels, f"P{kernel}{stride}", f"D{self.dim}")))

    def quick(self) -> "Shape":
        """The same with little to compute, and with what is too small for a patch."""

        def small(size: tuple[int, ...], count: int) -> tuple[int, ...]:
            sizes = zip(size, self.kernel, self.stride or self.kernel, strict=True)
            return tuple(k + count * s + (n - k) % s for n, k, s in sizes)

        size = self.size if self.flattened else small(self.size, 1)
        mixed = tuple(small(one, index) for index, one in enumerate(self.mixed[:3]))
        return self._replace(batch=2, size=size, mixed=mixed, dim=32)


class PatchProblem:
    """Seeded pixels, parameters and dout.

    Args:
        shape: of all.
        dtype: of the parameters.
        device: where they lie.
        image_bytes: pixels are uint8 with mean and std 0.5; else they have the parameters' dtype.
        backward: whether the gradients of the parameters are asked for.
        compiles: whether torch.compile takes part.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        image_bytes: bool,
        backward: bool,
        compiles: bool,
    ) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(SEED)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device)

        def image(batch: int, size: tuple[int, ...]) -> Tensor:
            size = size[::-1] if shape.transposed else size
            x = normal(batch, shape.channels, *size)
            x = (x * 64 + 128).clamp(0, 255).to(torch.uint8) if image_bytes else x.to(dtype)
            return x.transpose(-1, -2) if shape.transposed else x

        self.pixels: Any = [image(1, size) for size in shape.mixed] or image(
            shape.batch, shape.size
        )
        made = {"weight": normal(shape.dim, shape.channels, *shape.kernel) * shape.values**-0.5}
        rows = shape.patches + shape.prefix * (len(shape.mixed) or shape.batch)
        if shape.bias:
            made["bias"] = normal(shape.dim)
        if shape.positions:
            count = rows if shape.mixed else shape.prefix + shape.tokens
            made["pos_embed"] = normal(count, shape.dim)
        if shape.prefix:
            made["prefix_tokens"] = normal(1, shape.prefix, shape.dim)
        self.parameters = {name: nn.Parameter(x.to(dtype)) for name, x in made.items()}
        self.dout = normal(rows, shape.dim).to(dtype) if backward else None
        half = [0.5] * shape.channels
        self.settings: dict[str, Any] = {"stride": shape.stride} if shape.stride else {}
        self.peer_settings = dict(self.settings)  # with buffers: nothing is copied in a call
        if image_bytes:
            self.settings |= dict.fromkeys(("pixel_mean", "pixel_std"), half)
            buffer = torch.tensor(half, device=device)
            self.peer_settings |= dict.fromkeys(("pixel_mean", "pixel_std"), buffer)
        product = 2.0 * shape.patches * shape.values * shape.dim
        # Pixels have no gradient.
        self.flops: float | None = product * (2 if backward else 1)
        self.bytes: float | None = self._bytes(rows)
        with contextlib.suppress(Unavailable):
            calls.imported("timm.layers")
        self.implementations = self._implementations(device, compiles)

    def _bytes(self, rows: int) -> float:
        """Pixels and parameters in, tokens out; with gradients dout in, those of parameters out."""
        pixels = self.pixels if self.shape.mixed else [self.pixels]
        parameters = sum(x.nbytes for x in self.parameters.values())
        out = rows * self.shape.dim * self.parameters["weight"].element_size()
        passes = 1 if self.dout is None else 2
        return float(sum(x.nbytes for x in pixels) + passes * (parameters + out))

    def _implementations(
        self, device: torch.device, compiles: bool
    ) -> Mapping[str, Callable[[], Call]]:
        convolution = f"F.conv{len(self.shape.kernel)}d"
        found: dict[str, Callable[[], Call]] = {OURS: functools.partial(self._ours, "auto")}
        if device.type == "cuda":
            for name in calls.GPU_BACKENDS:
                found[f"{OURS} {name}"] = functools.partial(self._ours, name)
        return found | {
            convolution: lambda: self._peer(testing.eager_patch_embed),
            f"{convolution}, channels_last": self._channels_last,
            "unfold + linear": lambda: self._peer(patch_peers.linear),
            "torch.compile": functools.partial(self._compiled, compiles),
            "timm": self._timm,
        }

    def _ours(self, backend: str) -> Call:
        pixels = self.pixels
        if self.shape.flattened:
            if backend != "auto":
                raise Unavailable("patches that are cut out go to torch's own matrix product")
            pixels = pixels.flatten(1)
        embedding = functools.partial(self._operator, backend=backend)
        call = _solver(embedding, pixels, self.parameters, self.settings, self.dout)
        return call if backend == "auto" else calls.on_backend(backend, call)

    def _operator(self, pixels: Any, **options: Any) -> Tensor:
        if self.shape.mixed:
            return mm.patch_embed_varlen([x[0] for x in pixels], **options)[0]
        return mm.patch_embed(pixels, **options)

    def _peer(self, embedding: Embedding) -> Call:
        if self.shape.mixed:
            embedding = patch_peers.looped(embedding)
        return _solver(embedding, self.pixels, self.parameters, self.peer_settings, self.dout)

    def _channels_last(self) -> Call:
        if self.shape.channels == 1 or self.shape.flattened or self.shape.mixed:
            raise Unavailable("for batches of images or videos with several channels")
        video = len(self.shape.kernel) == 3
        layout: Any = torch.channels_last_3d if video else torch.channels_last
        weight = self.parameters["weight"].detach().contiguous(memory_format=layout)
        parameters = self.parameters | {"weight": nn.Parameter(weight)}
        pixels = self.pixels.contiguous(memory_format=layout)
        eager = testing.eager_patch_embed
        return _solver(eager, pixels, parameters, self.peer_settings, self.dout)

    def _compiled(self, wanted: bool) -> Call:
        return self._peer(
            compiled(testing.eager_patch_embed, self.parameters["weight"].device, wanted)
        )

    def _timm(self) -> Call:
        shape = self.shape
        if len(shape.kernel) != 2 or len(set(shape.kernel)) != 1 or shape.stride or shape.mixed:
            raise Unavailable("its PatchEmbed is for images of one size, in square patches")
        parameters = self.parameters
        module = patch_peers.timm(self.pixels, parameters["weight"], parameters.get("bias"))
        return self._peer(module)

    @functools.cached_property
    def expected(self) -> tuple[Results, Results]:
        """out and gradients: of the reference in float64, and of eager PyTorch."""
        pixels = _doubled(self.pixels)
        parameters = {
            name: nn.Parameter(x.detach().double()) for name, x in self.parameters.items()
        }
        dout = None if self.dout is None else self.dout.double()
        oracle = functools.partial(self._operator, backend="reference")
        exact = _solver(oracle, pixels, parameters, self.settings, dout)
        return exact(), self._peer(testing.eager_patch_embed)()

    def check(self, results: Results) -> float:
        """The largest error of out and, with backward, of the parameters' gradients."""
        names = ["out"]
        if self.dout is not None:
            names += [f"d{name}" for name in self.parameters]
        return calls.largest_error(names, results, *self.expected)


def _solver(
    embedding: Embedding,
    pixels: Any,
    parameters: dict[str, nn.Parameter],
    settings: dict[str, Any],
    dout: Tensor | None,
) -> Call:
    def embedded() -> Tensor:
        return embedding(pixels, **parameters, **settings)

    return calls.solver(embedded, list(parameters.values()), dout)


def _doubled(pixels: Any) -> Any:
    if isinstance(pixels, list):
        return [_doubled(x) for x in pixels]
    return pixels if pixels.dtype == torch.uint8 else pixels.double()
