"""Patch embedding in plain torch: the one oracle for tests and benchmarks, and the fallback.

For sample b, patch n at (t, y, x) of the grid and channel c, with strides s and 0 beyond the ends:

    z = (raw_scale pixels - mean_c) / std_c                    raw_scale: 1 / 255 for bytes, else 1
    token[b, n] = sum over c, i, j, k of weight[:, c, i, j, k] z[b, c, t st + i, y sh + j, x sw + k]
                  + bias
    token[b, n] = mask_token where token_mask[b, n]
    out[b] = (prefix, tokens) + pos_embed

float32 throughout, float64 if the weight is; out has the weight's dtype.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._core.registry import register
from mmkernels.patch_embed.call import Call, Item, items, raw_scale
from mmkernels.patch_embed.tail import assemble, masked_tokens


def normalized(
    x: Tensor, pixel_mean: list[float], pixel_std: list[float], dtype: torch.dtype
) -> Tensor:
    """x (B, C, ...) in `dtype`, divided by 255 if it is bytes, less mean, over std."""
    scaled = x.to(dtype)
    if x.dtype == torch.uint8:
        scaled = scaled * raw_scale(x.dtype)
    if not pixel_mean:
        return scaled
    shape = (-1, *(1,) * (x.ndim - 2))
    mean = torch.tensor(pixel_mean, dtype=dtype, device=x.device).view(shape)
    std = torch.tensor(pixel_std, dtype=dtype, device=x.device).view(shape)
    return (scaled - mean) / std


def padded(x: Tensor, item: Item, kernel: tuple[int, ...], stride: list[int]) -> Tensor:
    """x with zeros behind its ends where the grid reaches beyond them."""
    needed = [(n - 1) * s + k for n, s, k in zip(item.grid, stride, kernel, strict=True)]
    missing = [max(n - size, 0) for n, size in zip(needed, x.shape[2:], strict=True)]
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else x


def patches(x: Tensor, item: Item, kernel: tuple[int, ...], stride: list[int]) -> Tensor:
    """x (B, C, T, H, W) as (B, tokens, C * kt * kh * kw); copies."""
    for dim, (k, s) in enumerate(zip(kernel, stride, strict=True), 2):
        x = x.unfold(dim, k, s)
    x = x[:, :, : item.grid[0], : item.grid[1], : item.grid[2]]
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)


def differentiable(call: Call) -> Tensor:
    """out (rows, D), by operations that autograd knows, twice if asked."""
    dtype = torch.promote_types(call.weight.dtype, torch.float32)
    kernel = tuple(call.weight.shape[2:])
    weight = call.weight.to(dtype).flatten(1)
    made = []
    listed = list(items(call))
    for item in listed:
        x = normalized(item.pixels, call.pixel_mean, call.pixel_std, dtype)
        rows = patches(padded(x, item, kernel, call.stride), item, kernel, call.stride)
        if (masked := masked_tokens(call, item)) is not None:
            rows = rows.masked_fill(masked, 0.0)  # or NaN there would reach weight's gradient
        made.append(F.linear(rows, weight, None if call.bias is None else call.bias.to(dtype)))
    return assemble(call, listed, made).to(call.weight.dtype)


def forward(*inputs: Any) -> Tensor:
    """out (rows, D) in the weight's dtype; see `_core/ops.py`."""
    with torch.no_grad():
        return differentiable(Call(*inputs))


def backward(dout: Tensor, *inputs: Any) -> tuple:
    """The gradients that are wanted, by autograd of `differentiable`; see `_core/ops.py`."""
    *arguments, wanted = inputs
    call = Call(*arguments)
    pixels = [x.detach().requires_grad_(wanted[0]) for x in call.pixels]
    names = ("weight", "bias", "pos_embed", "prefix", "mask_token")
    leaves = {
        name: getattr(call, name).detach().requires_grad_()
        for name, want in zip(names, wanted[1:], strict=True)
        if want
    }
    asked = [*(pixels if wanted[0] else ()), *leaves.values()]
    # Where a dispatch mode calls an operation, autograd is off by more than `enable_grad` undoes.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
        out = differentiable(call._replace(pixels=pixels, **leaves))
        made = torch.autograd.grad(out, asked, dout, materialize_grads=True) if asked else ()
    grads = [grad.contiguous() for grad in made]
    dpixels = [grads.pop(0) for _ in pixels] if wanted[0] else []
    found = dict(zip(leaves, grads, strict=True))
    return dpixels, *(found[name] if name in found else dout.new_empty(0) for name in names)


def why_not(*_: object) -> None:
    """Serves every call."""


register("patch_embed_forward", "reference", forward, why_not)
register("patch_embed_backward", "reference", backward, why_not)
