"""Attention against a KV cache, on any backend's forward: one op, since kernels for it differ.

A batch element's rows are its last positions, row i at key cache_seqlens[b] - Sq + i, so its bounds
are data. Pages of a paged cache are gathered first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels._core.registry import register
from mmkernels.attention import cpu, reference


def bounds(
    cache_seqlens: Tensor, seqlen_q: int, window_left: int, window_right: int
) -> tuple[Tensor, Tensor]:
    """start, end (B, Sq) int32 of the visible keys; -1 is an unbounded window."""
    length = cache_seqlens[:, None]
    row = torch.arange(seqlen_q, dtype=torch.int32, device=cache_seqlens.device)
    position = row + (length - seqlen_q)
    start = position - window_left if window_left >= 0 else torch.zeros_like(position)
    end = position + window_right + 1 if window_right >= 0 else length.expand_as(position)
    start, end = start.clamp(min=0), torch.minimum(end, length)
    empty = start >= end
    return start.masked_fill(empty, 0), end.masked_fill(empty, 0)


def gathered(cache: Tensor, block_table: Tensor | None, pages: int) -> Tensor:
    """(B, S, Hkv, D): a contiguous cache, or the first `pages` pages of each row of block_table."""
    if block_table is None:
        return cache
    # An entry beyond a sequence's end may be anything; clamped, it reads a page nobody looks at.
    index = block_table[:, :pages].clamp(0, cache.shape[0] - 1)
    return cache[index].flatten(1, 2)


def decode_on(
    forward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The decode op on top of an attention forward."""

    def decode(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor,
        block_table: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        softmax_scale: float,
        softcap: float,
        window_left: int,
        window_right: int,
    ) -> tuple[Tensor, Tensor]:
        start, end = bounds(cache_seqlens, q.shape[1], window_left, window_right)
        pages = 0
        if block_table is not None:
            pages = block_table.shape[1]
            if q.device.type == "cpu" and q.shape[0]:  # reading the lengths costs nothing here
                pages = min(pages, -(-int(cache_seqlens.max()) // k_cache.shape[1]))
        k, v = gathered(k_cache, block_table, pages), gathered(v_cache, block_table, pages)
        bias = None
        if alibi_slopes is not None:
            keys = torch.arange(k.shape[1], device=q.device)
            row = torch.arange(q.shape[1], device=q.device) + (cache_seqlens[:, None] - q.shape[1])
            distance = (row[..., None] - keys).abs()[:, None]
            bias = -torch.atleast_2d(alibi_slopes)[..., None, None] * distance
        return forward(q, k, v, start, end, bias, None, sinks, None, softmax_scale, softcap, 0.0)

    return decode


def cpu_why_not(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, softmax_scale: float, softcap: float,
    window_left: int, window_right: int,
) -> str | None:  # fmt: skip
    """Declines what the cpu backend's forward declines."""
    return cpu.declines(q, softcap, 0.0)


register("attention_decode", "cpu", decode_on(cpu.forward), cpu_why_not)
register("attention_decode", "reference", decode_on(reference.forward), reference.why_not)
