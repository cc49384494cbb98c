"""The kernels that the model runs on: mmkernels', or eager PyTorch with the same results."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mm
from mmkernels.attention.interval import IntervalMask


class Kernels(NamedTuple):
    """What the model calls; the arguments are those of the functions of the same names in `mm`.

    Attributes:
        attention: attention(q, k, v, mask) -> (B, Sq, Hq, D).
        attention_with_kvcache: attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens).
        patch_embed_varlen: patch_embed_varlen(images, weight, bias, pixel_mean, pixel_std) ->
            tokens (rows, D), cu_seqlens.
    """

    attention: Callable[[Tensor, Tensor, Tensor, IntervalMask], Tensor]
    attention_with_kvcache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    patch_embed_varlen: Callable[..., tuple[Tensor, Tensor]]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    return mm.attention(q, k, v, mask=mask)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    """Attention with every score in memory: (B, Sq, Hq, D)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    hidden = ~mask.to_dense()[:, None]
    # A row of padding sees nothing; its softmax of -inf would be NaN.
    weights = scores.float().masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def eager_attention_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor
) -> Tensor:
    """Writes k and v into the cache and attends to it, causally."""
    position = cache_seqlens[:, None] + torch.arange(q.shape[1], device=q.device)  # (B, Sq)
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    k_cache[row, position], v_cache[row, position] = k, v
    end = (position + 1).to(torch.int32)
    mask = IntervalMask(torch.zeros_like(end), end, k_cache.shape[1])
    return eager_attention(q, k_cache, v_cache, mask)


def eager_patch_embed_varlen(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    pixel_mean: Any = None,
    pixel_std: Any = None,
) -> tuple[Tensor, Tensor]:
    """A convolution of each image (C, H, W)."""
    rows = []
    for image in images:
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if pixel_mean is not None:
            pixels = (pixels - pixel_mean) / pixel_std
        out = F.conv2d(pixels[None].to(weight.dtype), weight, bias, stride=weight.shape[2:])
        rows.append(out.flatten(2)[0].T)
    ends = torch.tensor([0, *(len(x) for x in rows)]).cumsum(0)
    return torch.cat(rows), ends.to(device=weight.device, dtype=torch.int32)


MMKERNELS = Kernels(_attention, mm.attention_with_kvcache, mm.patch_embed_varlen)
EAGER = Kernels(eager_attention, eager_attention_with_kvcache, eager_patch_embed_varlen)
