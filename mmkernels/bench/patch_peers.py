"""Other ways to embed patches. Each takes what `mmkernels.patch_embed` takes, channels first.

Mean and std are tensors on the device, as a model's buffers are. The convolution itself, with all
that model code writes around it, is `mmkernels.testing.eager_patch_embed`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.bench import calls
from mmkernels.modules.projection import finished
from mmkernels.testing import eager_normalized

# (pixels, **parameters and options) -> tokens.
Embedding = Callable[..., Tensor]


def linear(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    pixel_mean: Tensor | None = None,
    pixel_std: Tensor | None = None,
) -> Tensor:
    """Patches cut out by reshape and permute, or by F.unfold where they overlap; F.linear."""
    x = eager_normalized(pixels, weight.dtype, pixel_mean, pixel_std)
    kernel = weight.shape[2:]
    if stride is None:
        for dim, k in enumerate(kernel):
            place, count = 2 + 2 * dim, pixels.shape[2 + dim] // k
            x = x.narrow(place, 0, count * k).unflatten(place, (count, k))
        dims = len(kernel)
        grid, inner = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
        rows = x.permute(0, *grid, 1, *inner).flatten(-1 - dims).flatten(1, -2)
    else:
        rows = F.unfold(x, kernel, stride=stride).transpose(1, 2)
    tokens = F.linear(rows, weight.flatten(1), bias)
    return finished(tokens, pos_embed, prefix_tokens, None, None)


def timm(pixels: Tensor, weight: nn.Parameter, bias: nn.Parameter | None = None) -> Embedding:
    """timm's PatchEmbed with these parameters, and what its VisionTransformer does next.

    Raises:
        Unavailable: timm is not installed.
    """
    layers = calls.imported("timm.layers")
    dim, channels, edge, _ = weight.shape
    with torch.device("meta"):
        module = layers.PatchEmbed(pixels.shape[2:], edge, channels, dim, bias=bias is not None)
    module.proj.weight, module.proj.bias = weight, bias

    def embedding(
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        pos_embed: Tensor | None = None,
        prefix_tokens: Tensor | None = None,
        pixel_mean: Tensor | None = None,
        pixel_std: Tensor | None = None,
    ) -> Tensor:
        tokens = module(eager_normalized(pixels, weight.dtype, pixel_mean, pixel_std))
        return finished(tokens, pos_embed, prefix_tokens, None, None)

    return embedding


def looped(embedding: Embedding) -> Embedding:
    """An embedding of images of mixed size, one at a time; (1, rows, D)."""

    def embedded(images: Sequence[Tensor], *, pos_embed: Tensor, **options: Any) -> Tensor:
        return torch.cat([embedding(x, **options) for x in images], 1) + pos_embed

    return embedded
