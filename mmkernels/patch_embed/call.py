"""A checked call of the patch embedding, and the rows of tokens that it makes.

Every input becomes a list of (B, C, T, H, W) views, so that images, video, audio frames and lists
of images of mixed size are one operation: a batch is a list of one tensor, a list of images is a
list of tensors with B = 1. Tokens are rows of one (rows, D) tensor: for every sample its prefix
tokens, then its patches in the order (t, y, x).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int, int]


class Call(NamedTuple):
    """The forward op's inputs, less `backend`.

    Attributes:
        pixels: (B, C, T, H, W) each, floating point or uint8; B = 1 where there are several.
        weight: (D, C, kt, kh, kw).
        bias: (D,).
        pos_embed: (slots, D), or a table that pos_index reads.
        pos_index: (slots,) rows of pos_embed.
        prefix: (1 or B, P, D) tokens before each sample's patches.
        token_mask: (tokens,) bool, tokens of one sample or of all; True: mask_token replaces it.
        mask_token: (D,).
        pixel_mean: per channel, or empty.
        pixel_std: per channel, or empty.
        stride: (st, sh, sw).
        pad: the right and lower ends are padded to whole patches, else dropped.
        pos_prefix: the slots of positions begin with the prefix tokens.
        per_sample: slots of positions, and token_mask, run over all samples, not over each.
    """

    pixels: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    pos_embed: Tensor | None
    pos_index: Tensor | None
    prefix: Tensor | None
    token_mask: Tensor | None
    mask_token: Tensor | None
    pixel_mean: list[float]
    pixel_std: list[float]
    stride: list[int]
    pad: bool
    pos_prefix: bool
    pos_per_sample: bool
    mask_per_sample: bool


def grid_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], pad: bool) -> Size:
    """Number of patches along (T, H, W)."""
    t, h, w = (
        # Padded, the last patch reaches the end, and begins before it.
        min(max(-(-(n - k) // s), 0) + 1, -(-n // s)) if pad else (n - k) // s + 1
        for n, k, s in zip(size, kernel, stride, strict=True)
    )
    return t, h, w


def raw_scale(dtype: torch.dtype) -> float:
    """What pixels are multiplied by before mean and std: bytes mean 0 to 1."""
    return 1.0 / 255.0 if dtype == torch.uint8 else 1.0


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """A float32 tensor of these values, made where it lies.

    Sending it there would wait, and a copy that is kept could lie in the memory of a CUDA graph.
    """
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], device=device)
    return torch.stack([torch.full((), value, device=device) for value in values])


class Item(NamedTuple):
    """One tensor of pixels and where its tokens lie.

    Attributes:
        pixels: (B, C, T, H, W).
        grid: patches along (T, H, W).
        batch: samples.
        tokens: patches of a sample.
        first_row: of its tokens among all rows.
        first_token: the same, counted without prefix tokens.
        rows: of a sample, prefix included.
    """

    pixels: Tensor
    grid: Size
    batch: int
    tokens: int
    first_row: int
    first_token: int
    rows: int


def prefix_count(call: Call) -> int:
    """Tokens before each sample's patches."""
    return 0 if call.prefix is None else call.prefix.shape[1]


def items(call: Call) -> Iterator[Item]:
    """The tensors of a call and their rows."""
    prefix = prefix_count(call)
    row = token = 0
    for x in call.pixels:
        grid = grid_size(x.shape[2:], call.weight.shape[2:], call.stride, call.pad)
        batch, tokens = x.shape[0], math.prod(grid)
        yield Item(x, grid, batch, tokens, row, token, prefix + tokens)
        row += batch * (prefix + tokens)
        token += batch * tokens


def row_count(call: Call) -> int:
    """Rows of out."""
    return sum(item.batch * item.rows for item in items(call))
