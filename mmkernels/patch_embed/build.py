"""From the public functions' arguments to a checked `Call`."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmkernels.attention.checks import autocast
from mmkernels.patch_embed import checks
from mmkernels.patch_embed.call import Call, grid_size


def build(
    where: str,
    pixels: Sequence[Tensor],
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
    """Checks the arguments of `patch_embed`, one tensor, or `patch_embed_varlen`, several."""
    varlen = where == "patch_embed_varlen"
    checks.check_weight(where, weight)
    checks.check_options(where, pad, data_format)
    dims = weight.ndim - 2
    if dims == 0:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}, as of Linear, which serves patches "
            "that are cut out: (B, N, K) or (N, K); pixels need the patch size: "
            "weight.view(embed_dim, channels, *patch_size)"
        )
    (weight,) = autocast(weight)
    weight = weight.unflatten(1, (weight.shape[1], *(1,) * (3 - dims))) if dims < 3 else weight
    kernel = weight.shape[2:]
    canonical = []
    for index, x in enumerate(pixels):
        name = f"images[{index}]" if varlen else "pixels"
        checks.check_pixels(where, name, x, weight)
        canonical.append(checks.channels_first(where, name, x, weight, dims, data_format))
        checks.check_fits(where, name, canonical[-1], kernel, dims, pad)
    checks.check_alike(where, canonical)
    steps = checks.strides(where, stride, kernel, dims)
    tokens = [math.prod(grid_size(x.shape[2:], kernel, steps, pad)) for x in canonical]
    return with_tail(
        where, canonical, weight, tokens, bias, steps, pos_embed, pos_index, prefix_tokens,
        token_mask, mask_token, pixel_mean, pixel_std, pad, weight.shape[1],
    )  # fmt: skip


def with_tail(
    where: str,
    pixels: list[Tensor],
    weight: Tensor,
    tokens: list[int],
    bias: Tensor | None,
    stride: list[int],
    pos_embed: Tensor | None,
    pos_index: Tensor | None,
    prefix_tokens: Tensor | None,
    token_mask: Tensor | None,
    mask_token: Tensor | None,
    pixel_mean: Any,
    pixel_std: Any,
    pad: bool,
    channels: int,
) -> Call:
    """The call for checked pixels, each with so many tokens a sample; checks all that follows."""
    varlen = where == "patch_embed_varlen"
    batch = len(pixels) if varlen else pixels[0].shape[0]
    prefix = None
    if prefix_tokens is not None:
        prefix = checks.check_prefix(where, prefix_tokens, weight, None if varlen else batch)
    count = 0 if prefix is None else prefix.shape[1]
    counts = {"tokens": sum(tokens)}
    if count:
        counts["prefix tokens and tokens"] = sum(tokens) + count * len(tokens)
    pos_prefix = pos_per_sample = mask_per_sample = False
    if pos_embed is not None:
        pos_embed, pos_index, words, pos_per_sample = checks.positions(
            where, pos_embed, pos_index, weight, batch, counts, varlen
        )
        pos_prefix = words != "tokens"
    elif pos_index is not None:
        raise ValueError(f"{where}: pos_index is given and pos_embed is None; give the table, too")
    if (token_mask is None) != (mask_token is None):
        missing = "mask_token" if mask_token is None else "token_mask"
        raise ValueError(f"{where}: {missing} is None; token_mask and mask_token go together")
    if token_mask is not None and mask_token is not None:
        token_mask, mask_per_sample = checks.check_token_mask(
            where, token_mask, weight, batch, counts["tokens"], varlen
        )
        mask_token = checks.check_vector(where, "mask_token", mask_token, weight)
    if bias is not None:
        bias = checks.check_vector(where, "bias", bias, weight)
    mean, std = checks.statistics(where, pixel_mean, pixel_std, channels)
    return Call(
        pixels, weight, bias, pos_embed, pos_index, prefix, token_mask, mask_token, mean, std,
        stride, pad, pos_prefix, pos_per_sample, mask_per_sample,
    )  # fmt: skip
