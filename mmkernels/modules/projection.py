"""A patch projection, by `mm.patch_embed` on its parameters or, if that skips something, as is."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmkernels.patch_embed.api import patch_embed
from mmkernels.patch_embed.call import grid_size
from mmkernels.patch_embed.checks import slots
from mmkernels.patch_embed.reference import normalized

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Grid = tuple[int, ...]


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the module runs the forward of one of `kinds` and nothing else.

    Not so with hooks, wrappers (PEFT), parametrisations, which change the class, and a forward of
    the instance's own. Hooks for all modules of a process are not looked at.
    """
    return (
        type(module) in kinds
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def is_patch_product(proj: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether `mm.patch_embed` with the parameters of proj does all that calling proj does."""
    return is_plain(proj, *CONVOLUTIONS) and is_patch_convolution(proj)


def is_patch_convolution(conv: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether a convolution's settings and parameters are ones that `mm.patch_embed` takes."""
    if not isinstance(conv, CONVOLUTIONS):
        return False
    dims = conv.weight.ndim - 2
    return (
        conv.padding in ("valid", (0,) * dims)
        and conv.dilation == (1,) * dims
        and conv.groups == 1
        and isinstance(conv.stride, tuple)
        and type(conv.weight) in (Tensor, nn.Parameter)
    )


def embed(
    proj: nn.Module,
    pixels: Tensor,
    *,
    pad_to: Sequence[int] | None = None,
    pixel_mean: Sequence[float] = (),
    pixel_std: Sequence[float] = (),
    backend: str = "auto",
    positions: Callable[[Grid], Tensor | None] | None = None,
    prefix_tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Tokens of pixels, finished in one call of `mm.patch_embed` if proj is a plain convolution.

    Args:
        proj: a module from (B, C, *size) to (B, D, *grid).
        pixels: (B, C, *size), floating point or uint8.
        pad_to: the right and lower ends are padded to multiples of these, one a dimension, with
            what is 0 after normalisation; None: no padding.
        pixel_mean: per channel, or empty.
        pixel_std: likewise.
        backend: of `mm.patch_embed`.
        positions: grid -> pos_embed as `mm.patch_embed` takes it.
        prefix_tokens: (1, P, D).
        token_mask: (B, N) or (N,) bool.
        mask_token: (D,), or with dimensions of 1 before it.

    Returns:
        Tokens (B, P + N, D) and the grid.
    """
    if is_patch_product(proj) and _pads_alike(proj, pad_to):
        dims = proj.weight.ndim - 2
        size, kernel, stride = (
            (*(1,) * (3 - dims), *x) for x in (pixels.shape[2:], proj.weight.shape[2:], proj.stride)
        )
        grid: Grid = grid_size(size, kernel, stride, pad_to is not None)[3 - dims :]
        tokens = patch_embed(
            pixels, proj.weight, proj.bias, stride=proj.stride, pad=pad_to is not None,
            pos_embed=None if positions is None else positions(grid), prefix_tokens=prefix_tokens,
            token_mask=token_mask, mask_token=mask_token, pixel_mean=pixel_mean or None,
            pixel_std=pixel_std or None, backend=backend,
        )  # fmt: skip
        return tokens, grid
    maps = proj(prepared(proj, pixels, pad_to, pixel_mean, pixel_std))
    grid = tuple(maps.shape[2:])
    tokens = maps.flatten(2).transpose(1, 2)
    pos_embed = None if positions is None else positions(grid)
    return finished(tokens, pos_embed, prefix_tokens, token_mask, mask_token), grid


def _pads_alike(proj: _ConvNd, pad_to: Sequence[int] | None) -> bool:
    """Whether the operator, which pads to whole steps, pads to multiples of `pad_to`."""
    return pad_to is None or proj.stride == tuple(pad_to) == tuple(proj.weight.shape[2:])


def prepared(
    proj: nn.Module,
    pixels: Tensor,
    pad_to: Sequence[int] | None,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
) -> Tensor:
    """pixels normalised, in the dtype of proj's parameters, and padded: what proj itself takes."""
    dtypes = (x.dtype for x in proj.parameters() if x.is_floating_point())
    dtype = next(dtypes, torch.float32)
    if pixels.dtype == torch.uint8 or pixel_mean:
        wide = torch.promote_types(dtype, torch.float32)
        pixels = normalized(pixels, list(pixel_mean), list(pixel_std), wide)
    pixels = pixels.to(dtype)
    if pad_to is None:
        return pixels
    missing = [-n % p for n, p in zip(pixels.shape[2:], pad_to, strict=True)]
    return F.pad(pixels, [n for last in reversed(missing) for n in (0, last)])


def finished(
    tokens: Tensor,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    token_mask: Tensor | None,
    mask_token: Tensor | None,
) -> Tensor:
    """Tokens (B, N, D) with all that `mm.patch_embed` does after the product, and its error."""
    if token_mask is not None and mask_token is not None:
        batch, count = tokens.shape[:2]
        slots("patch_embed", "token_mask", token_mask, 1, batch, {"tokens": count}, varlen=False)
        tokens = torch.where(token_mask[..., None], mask_token.to(tokens.dtype), tokens)
    if pos_embed is not None:  # autocast leaves it as it is
        pos_embed = pos_embed.to(tokens.dtype)
    if pos_embed is not None and pos_embed.shape[-2] == tokens.shape[1]:
        tokens, pos_embed = tokens + pos_embed, None  # they are of the patches alone
    if prefix_tokens is not None:
        prefix = prefix_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((prefix, tokens), 1)
    return tokens if pos_embed is None else tokens + pos_embed


def check_pixels(where: str, pixels: Any, shape: Sequence[str]) -> None:
    """Raises unless pixels is a tensor with as many dimensions as shape has names."""
    wanted = f"({', '.join(shape)})"
    if not isinstance(pixels, Tensor):
        raise TypeError(
            f"{where}: the input is {type(pixels).__name__}; it must be a torch.Tensor {wanted}. "
            "Samples of mixed size: mm.patch_embed_varlen"
        )
    if pixels.ndim != len(shape):
        one = "; one sample alone needs x[None]" if pixels.ndim == len(shape) - 1 else ""
        raise ValueError(
            f"{where}: the input has shape {tuple(pixels.shape)}; it must be {wanted}{one}"
        )


def as_tuple(name: str, value: Any, count: int) -> tuple[int, ...]:
    """value as `count` positive integers, a single one standing for all.

    Raises:
        ValueError: it is anything else.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) != count or any(not isinstance(n, int) or n < 1 for n in values):
        raise ValueError(f"{name} is {value!r}; it must be a positive integer or {count} of them")
    return values
