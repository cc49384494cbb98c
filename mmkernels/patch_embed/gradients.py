"""Gradients of what follows the product, from sums of dout over the samples; and of the pixels.

Plain torch, deterministic, in float32 (float64 for float64). Shapes as in `call.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.patch_embed.call import Call, Item, constants, items, prefix_count, raw_scale
from mmkernels.patch_embed.tail import masked_tokens


class Sums(NamedTuple):
    """dout of an item, summed over its samples.

    Attributes:
        item: which.
        kept: (rows, D), of prefix tokens and of tokens that are not masked.
        masked: (rows, D), of those that are; None where there is no mask.
    """

    item: Item
    kept: Tensor
    masked: Tensor | None


def sample_sums(dout: Tensor, call: Call) -> list[Sums]:
    """The sums of all items that have a row."""
    return [_summed(dout, call, item) for item in items(call) if item.batch * item.rows]


def _summed(dout: Tensor, call: Call, item: Item) -> Sums:
    rows = sample_rows(dout, item)
    if (masked := masked_tokens(call, item)) is None:
        return Sums(item, rows.sum(0, dtype=wide(dout)), None)
    hit = F.pad(masked, (0, 0, prefix_count(call), 0))
    kept = rows.masked_fill(hit, 0.0).sum(0, dtype=wide(dout))
    return Sums(item, kept, rows.masked_fill(~hit, 0.0).sum(0, dtype=wide(dout)))


def results(
    dout: Tensor,
    call: Call,
    wanted: Sequence[bool],
    dpixels: list[Tensor],
    dweight: Tensor | None,
    sums: list[Sums],
) -> tuple:
    """The backward op's results, each in its argument's dtype.

    Args:
        dout: (rows, D), in any strides.
        call: the forward's inputs.
        wanted: of pixels, weight, bias, pos_embed, prefix and mask_token.
        dpixels: those of the pixels.
        dweight: that of the weight.
        sums: of all items, if anything else is wanted.
    """
    count = prefix_count(call)

    def total(parts: list[Tensor]) -> Tensor:
        return sum(parts, torch.zeros(dout.shape[1], dtype=wide(dout), device=dout.device))

    made = (
        (call.weight, lambda: dout.new_empty(0) if dweight is None else dweight),
        (call.bias, lambda: total([one.kept[count:].sum(0) for one in sums])),
        (call.pos_embed, lambda: position_gradient(dout, call, sums)),
        (call.prefix, lambda: prefix_gradient(dout, call, sums)),
        (call.mask_token, lambda: total([x.masked.sum(0) for x in sums if x.masked is not None])),
    )
    return dpixels, *(
        # Contiguous, and no view of dout.
        grad().to(x.dtype).contiguous() if want and x is not None else dout.new_empty(0)
        for want, (x, grad) in zip(wanted[1:], made, strict=True)
    )


def position_gradient(dout: Tensor, call: Call, sums: list[Sums]) -> Tensor:
    """Of pos_embed, in its shape: slot by slot, or gathered into the table's rows."""
    first = 0 if call.pos_prefix else prefix_count(call)
    if call.pos_per_sample:
        rows = (sample_rows(dout, one.item)[:, first:] for one in sums)
        parts = [x.flatten(0, 1).to(wide(dout)) for x in rows]
    else:
        parts = [(k if m is None else k + m)[first:] for _, k, m in sums]
    assert call.pos_embed is not None
    if call.pos_index is None and parts:
        return torch.cat(parts)
    table = torch.zeros(call.pos_embed.shape, dtype=wide(dout), device=dout.device)
    if call.pos_index is None or not parts:
        return table
    index = call.pos_index.clamp(0, len(table) - 1).long()
    # Of index_add, CUDA's kernel adds in no fixed order; this one sorts.
    return table.index_put_((index,), torch.cat(parts), accumulate=True)


def prefix_gradient(dout: Tensor, call: Call, sums: list[Sums]) -> Tensor:
    """Of prefix (1 or B, P, D)."""
    assert call.prefix is not None
    count = prefix_count(call)
    if len(call.prefix) > 1 and sums:
        return sample_rows(dout, sums[0].item)[:, :count]
    zero = torch.zeros(call.prefix.shape, dtype=wide(dout), device=dout.device)
    return sum((one.kept[None, :count] for one in sums), zero)


def pixel_gradients(dout: Tensor, call: Call) -> list[Tensor]:
    """Of the pixels, by torch's own products: seldom wanted, and not what takes the time."""
    factors = [raw_scale(call.pixels[0].dtype) / std for std in call.pixel_std]
    return [pixel_gradient(dout, call, item, factors) for item in items(call)]


def pixel_gradient(dout: Tensor, call: Call, item: Item, factors: list[float]) -> Tensor:
    """Of one tensor of pixels, (B, C, T, H, W)."""
    x, kernel = item.pixels, call.weight.shape[2:]
    rows = sample_rows(dout, item)[:, prefix_count(call) :]
    if (masked := masked_tokens(call, item)) is not None:
        rows = rows.masked_fill(masked, 0.0)
    rows = rows.unflatten(1, item.grid)  # (B, t, h, w, D)
    if list(kernel) == list(call.stride):
        made = rows @ call.weight.flatten(1)
        made = made.unflatten(-1, call.weight.shape[1:]).permute(0, 4, 1, 5, 2, 6, 3, 7)
        made = made.flatten(6).flatten(4, 5).flatten(2, 3)
    elif kernel[0] == item.grid[0] == 1:  # two dimensions, as most libraries are tuned for
        maps, weight = rows[:, 0].movedim(-1, 1), call.weight[:, :, 0]
        made = F.conv_transpose2d(maps, weight, stride=call.stride[1:]).unsqueeze(2)
    else:
        made = F.conv_transpose3d(rows.movedim(-1, 1), call.weight, stride=call.stride)
    missing = [size - n for size, n in zip(x.shape[2:], made.shape[2:], strict=True)]
    made = F.pad(made, (0, missing[2], 0, missing[1], 0, missing[0]))  # below 0 it cuts
    if factors:
        made = made * constants(factors, made.device).view(-1, 1, 1, 1)
    return made.to(x.dtype).contiguous()


def sample_rows(dout: Tensor, item: Item) -> Tensor:
    """The rows of an item, (B, rows, D)."""
    rows = dout[item.first_row : item.first_row + item.batch * item.rows]
    return rows.unflatten(0, (item.batch, item.rows))


def wide(x: Tensor) -> torch.dtype:
    """What sums of x are made in."""
    return torch.promote_types(x.dtype, torch.float32)
