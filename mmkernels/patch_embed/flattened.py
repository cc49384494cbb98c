"""Patches that are already cut out: their embedding is a matrix product, and torch's own is best.

Processors of Qwen-VL, SigLIP 2, Pixtral's packed form and timm's NaFlex loader hand out such rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._core import dtensors
from mmkernels.attention.checks import autocast
from mmkernels.patch_embed import checks
from mmkernels.patch_embed.build import with_tail
from mmkernels.patch_embed.call import Call, Item, prefix_count
from mmkernels.patch_embed.cpu import product_dtype
from mmkernels.patch_embed.reference import normalized
from mmkernels.patch_embed.tail import assemble, masked_tokens


def is_flattened(pixels: Any, weight: Any) -> bool:
    """Whether pixels are patches (B, N, K) or (N, K) by the dimensions of weight."""
    if not (isinstance(pixels, Tensor) and isinstance(weight, Tensor)):
        return False
    return weight.ndim == 2 or (weight.ndim in (4, 5) and pixels.ndim in (2, 3))


def build(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] | None = None,
    pos_embed: Tensor | None = None,
    pos_index: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pixel_mean: Any = None,
    pixel_std: Any = None,
    pad: bool = False,
    data_format: str = "channels_first",
) -> Call:
    """The checked call of `mmkernels.patch_embed` for pixels (B, N, K) or (N, K).

    Its pixels are [(B, N, K)], its weight (D, K) in their order.
    """
    where = "patch_embed"
    checks.check_weight(where, weight)
    checks.check_options(where, pad, data_format)
    (weight,) = autocast(weight)
    checks.check_pixels(where, "pixels", pixels, weight)
    last = data_format == "channels_last"
    channels = weight.shape[1] if weight.ndim > 2 else 1
    matrix = (weight.movedim(1, -1) if last else weight).flatten(1)  # (D, K)
    if pixels.ndim not in (2, 3) or pixels.shape[-1] != matrix.shape[1]:
        images = (
            "images need the patch size, weight.view(embed_dim, channels, *patch_size)"
            if weight.ndim == 2
            else "one image or video alone needs pixels[None]"
        )
        raise ValueError(
            f"{where}: pixels has shape {tuple(pixels.shape)}; with a weight of shape "
            f"{tuple(weight.shape)} patches that are cut out must be (B, N, {matrix.shape[1]}) or "
            f"(N, {matrix.shape[1]}); {images}"
        )
    if stride is not None or pad:
        raise ValueError(
            f"{where}: {'pad' if pad else 'stride'} is given, and pixels of shape "
            f"{tuple(pixels.shape)} are patches that are cut out; leave it"
        )
    x = pixels if pixels.ndim == 3 else pixels[None]
    return with_tail(
        where, [x], matrix, [x.shape[1]], bias, [], pos_embed, pos_index, prefix_tokens, token_mask,
        mask_token, pixel_mean, pixel_std, False, channels,
    )  # fmt: skip


def run(call: Call, data_format: str) -> Tensor:
    """out (B, P + N, D) of a call from `build`, differentiable."""
    if dtensors.is_dtensor(call.weight):
        from mmkernels.distributed import sharding

        return sharding.run_patch_embed(call, lambda local: run(local, data_format))
    (x,), matrix = call.pixels, call.weight
    batch, tokens = x.shape[:2]
    channels = max(len(call.pixel_mean), 1)
    if x.dtype == torch.uint8 or call.pixel_mean:
        # Channels to where `normalized` wants them, and back.
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        area, last = matrix.shape[1] // channels, data_format == "channels_last"
        parts = (
            x.reshape(-1, area, channels).transpose(1, 2) if last else x.reshape(-1, channels, area)
        )
        parts = normalized(parts, call.pixel_mean, call.pixel_std, dtype)
        x = (parts.transpose(1, 2) if last else parts).reshape(x.shape)
    # Without instructions for bfloat16 a CPU multiplies float32 several times faster.
    dtype = product_dtype(matrix) if matrix.device.type == "cpu" else matrix.dtype
    x = x.to(dtype)
    item = Item(x, (1, 1, tokens), batch, tokens, 0, 0, prefix_count(call) + tokens)
    if (masked := masked_tokens(call, item)) is not None:
        x = x.masked_fill(masked, 0.0)  # or NaN there would reach weight's gradient
    made = F.linear(x, matrix.to(dtype), None if call.bias is None else call.bias.to(dtype))
    return assemble(call, [item], [made]).to(matrix.dtype).view(batch, item.rows, len(matrix))
