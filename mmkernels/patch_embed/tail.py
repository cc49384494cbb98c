"""What follows the product: mask token, positions, prefix. Plain torch, forward and backward.

Shapes as in `call.py`; the tokens of an item are (B, N, D).
"""

import torch
from torch import Tensor

from mmkernels.patch_embed.call import Call, Item


def sample_slots(x: Tensor, item: Item, first: int, size: int, per_sample: bool) -> Tensor:
    """x (slots, ...) as (1 or B, size, ...): the slots of an item's samples."""
    if not per_sample:
        return x[None, :size]
    return x[first : first + item.batch * size].unflatten(0, (item.batch, size))


def position_slots(call: Call, x: Tensor, item: Item) -> Tensor:
    """The item's slots of positions, (1 or B, rows or tokens, ...)."""
    first, size = (
        (item.first_row, item.rows) if call.pos_prefix else (item.first_token, item.tokens)
    )
    return sample_slots(x, item, first, size, call.pos_per_sample)


def masked_tokens(call: Call, item: Item) -> Tensor | None:
    """(1 or B, N, 1) bool: the tokens that mask_token replaces."""
    if call.token_mask is None:
        return None
    slots = sample_slots(call.token_mask, item, item.first_token, item.tokens, call.mask_per_sample)
    return slots[..., None]


def assemble(call: Call, listed: list[Item], made: list[Tensor]) -> Tensor:
    """out (rows, D) from the products (B, N, D) of all items, in their dtype."""
    parts = []
    for item, tokens in zip(listed, made, strict=True):
        if (masked := masked_tokens(call, item)) is not None:
            assert call.mask_token is not None
            tokens = torch.where(masked, call.mask_token.to(tokens.dtype), tokens)
        pos = None
        if call.pos_embed is not None:
            slots = call.pos_embed if call.pos_index is None else call.pos_index
            pos = position_slots(call, slots, item)
            if call.pos_index is not None:
                pos = call.pos_embed[pos.clamp(0, len(call.pos_embed) - 1).long()]
            pos = pos.to(tokens.dtype)
        if pos is not None and not call.pos_prefix:
            tokens = tokens + pos
        if call.prefix is not None:
            prefix = call.prefix.to(tokens.dtype).expand(item.batch, -1, -1)
            tokens = torch.cat((prefix, tokens), 1)
        if pos is not None and call.pos_prefix:
            tokens = tokens + pos
        parts.append(tokens.flatten(0, 1))
    return torch.cat(parts)
