"""The mask function of transformers models: bounds instead of a dense mask, where there are any.

transformers describes a mask as a function of a query's and a key's index, put together from
closures (causal, windows, packing, image blocks), and a padding mask. What such a function computes
cannot be told from outside, so the library's own `sdpa_mask` evaluates it, some rows at a time, and
of each block only the bounds are kept.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mmkernels._core import spread
from mmkernels._core.values import captured
from mmkernels.attention.interval import IntervalMask, dense_bounds
from mmkernels.integrations.interval_tensor import IntervalTensor

# transformers 4 has none.
_bidirectional: Callable | None = getattr(masking_utils, "bidirectional_mask_function", None)

BLOCK_ELEMENTS = 2**22
_NO_SKIP = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


class _NotSkipped(Exception):
    """`sdpa_mask` has come to evaluate its mask function."""


def interval_mask(
    batch_size: int,
    *,
    kv_length: int,
    kv_offset: int | Tensor = 0,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> IntervalTensor | Tensor | None:
    """The mask function behind `attn_implementation="mmkernels"`; called with names only.

    Holds O(batch_size (q_length + kv_length)) elements and one block of at most `BLOCK_ELEMENTS`,
    or a row. Plain causal and bidirectional masks, with padding or without, are never evaluated.

    In a traced or captured graph nothing may depend on values: plain causal and bidirectional masks
    without padding are bounds there, too, and any other mask is the library's dense one.

    Args:
        batch_size: B.
        kv_length: Sk.
        kv_offset: index of the first key.
        q_length: Sq (transformers 5).
        q_offset: index of the first query; a tensor for static caches (transformers 5).
        cache_position: (Sq,) indices of the queries (transformers 4), instead of both.
        mask_function: (batch, head, query, key) indices -> bool, elementwise.
        attention_mask: (B, number of tokens so far) bool, True at real tokens.
        device: where the mask shall be (transformers 5).
        **kwargs: handed on to `sdpa_mask`.

    Returns:
        None for one query where `sdpa_mask` gives None. For several that leaves it to the layer's
        `is_causal` what None means, and not every model sets that as its eager attention has it.
        Otherwise a (B, 1, Sq, Sk) mask, True = attend: an `IntervalTensor`, or a bool tensor if the
        keys of some row are not contiguous.
    """
    if spread.active is not None:  # the mask is over the whole sequence then
        if attention_mask is None:
            raise ValueError(
                "attention_mask is None within context_parallel, where positions that jump would "
                "be taken for packed sequences; give the whole sequence's, e.g. torch.ones(B, S)"
            )
        q_length = kv_length = spread.active.seqlen
        q_offset = kv_offset = 0
        if cache_position is not None:
            cache_position = torch.arange(q_length, device=cache_position.device)
    common: dict[str, Any] = kwargs | {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
    }
    if cache_position is None:
        assert q_length is not None
        rows, device = q_length, torch.device(device)
    else:
        rows, device = cache_position.shape[0], cache_position.device
    if rows != 1:
        common |= _NO_SKIP

    def evaluated(function: Callable, first: int = 0, last: int = rows, **skip: bool) -> Any:
        queries = (
            {"q_length": last - first, "q_offset": q_offset + first, "device": device}
            if cache_position is None
            else {"cache_position": cache_position[first:last]}
        )
        return sdpa_mask(mask_function=function, **(common | queries | skip))

    plain = mask_function is causal_mask_function or mask_function is _bidirectional
    if traced(device, attention_mask, cache_position, q_offset):
        if not (plain and attention_mask is None and torch.compiler.is_dynamo_compiling()):
            return evaluated(mask_function)
        if evaluated(_every_key) is None:
            return None
    else:
        try:
            return evaluated(_stop)
        except _NotSkipped:
            pass

    if plain:
        position = cache_position
        if position is None:
            position = torch.arange(rows, device=device) + q_offset
        causal = mask_function is causal_mask_function
        interval = _plain(position, kv_length, kv_offset, attention_mask, causal)
    else:
        block = max(1, BLOCK_ELEMENTS // max(1, batch_size * kv_length))
        blocks = (
            evaluated(mask_function, first, min(first + block, rows), **_NO_SKIP)
            for first in range(0, max(rows, 1), block)
        )
        interval = _of_blocks(blocks, kv_length)
    if interval is None:
        return evaluated(mask_function, **_NO_SKIP)
    return IntervalTensor.of(interval, batch_size)


def _stop(*indices: Any) -> Tensor:
    raise _NotSkipped


def _every_key(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= 0


def traced(device: torch.device, *tensors: Any) -> bool:
    """Is a graph being recorded, in which values may not be read?"""
    tensors = tuple(x for x in tensors if isinstance(x, (Tensor, torch.fx.Proxy)))
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or device.type == "meta"
        or captured(device)
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(x, torch.fx.Proxy) for x in tensors)
        or detect_fake_mode(tensors) is not None
    )


def _plain(
    position: Tensor,
    kv_length: int,
    kv_offset: int | Tensor,
    real: Tensor | None,
    causal: bool,
) -> IntervalMask | None:
    """The causal or full mask of queries at `position`, of real keys only if those are one run."""
    end = (position - kv_offset + 1).clamp(0, kv_length).to(torch.int32)[None]
    if not causal:
        end = torch.full_like(end, kv_length)
    start = torch.zeros_like(end)
    if real is not None:
        keys = torch.arange(kv_length, device=real.device) + kv_offset
        known = keys < real.shape[1]  # later ones are padding
        real = real.bool()[:, keys.where(known, 0)] & known
        first, last, contiguous = dense_bounds(real[:, None])
        if not contiguous.all():
            return None
        start, end = torch.maximum(start, first), torch.minimum(end, last)
    empty = start >= end
    return IntervalMask._of(start.masked_fill(empty, 0), end.masked_fill(empty, 0), kv_length)


def _of_blocks(blocks: Iterable[Tensor], kv_length: int) -> IntervalMask | None:
    """The mask whose rows come in dense blocks; None at the first one that is no interval."""
    bounds = []
    for block in blocks:
        # Where no batch element has rows of its own, all are one.
        rows = block[:1, 0] if block.stride(0) == 0 else block[:, 0]
        *found, contiguous = dense_bounds(rows)
        if not contiguous.all():
            return None
        bounds.append(found)
    start, end = (torch.cat(parts, 1) for parts in zip(*bounds, strict=True))
    return IntervalMask._of(start, end, kv_length)
