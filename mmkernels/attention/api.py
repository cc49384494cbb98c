"""The public attention functions: arguments in, one op out."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import registry, spread
from mmkernels.attention import call, kvcache
from mmkernels.attention.interval import IntervalMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_lse; Any lets type checkers take either
    """softmax(softcap(softmax_scale q k^T) + bias) v over the keys that the masks leave.

    Args:
        q: (B, Sq, Hq, D) float16, bfloat16, float32 or float64. Any strides.
        k: (B, Sk, Hkv, D). Hq must be a multiple of Hkv; query head h reads key head h // (Hq /
            Hkv).
        v: (B, Sk, Hkv, Dv).
        mask: an `IntervalMask` (see `mmkernels.masks`), or a bool tensor that broadcasts to
            (B, Hq, Sq, Sk), True = attend. A bool CPU tensor that is an interval mask is treated as
            one.
        causal: row i sees the keys j <= i + Sk - Sq (bottom-right aligned). mask, causal and
            window_size intersect.
        window_size: (left, right). Row i sees the keys from i + Sk - Sq - left to
            i + Sk - Sq + right; -1 is unbounded.
        softmax_scale: factor on q k^T; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 means none.
        bias: floating point, broadcasts to (B, Hq, Sq, Sk). Added to the scores; -inf hides a key.
            Differentiable.
        alibi_slopes: (Hq,) or (B, Hq). -slope * |i + Sk - Sq - j| is added to the scores.
        sinks: (Hq,). A logit a head that takes part in the softmax and has no value.
            Differentiable.
        dropout_p: probability with which a softmax weight is dropped.
        generator: draws the dropout's seed; None: torch's default generator on q's device.
        return_lse: also return lse.
        deterministic: gradients are the same in every run; False allows faster backward kernels.
        backend: "auto", or a backend's name; see `mmkernels.explain`.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype; with return_lse also lse (B, Hq, Sq), the natural log of
        the softmax's denominator (sink included), float32 (float64 for float64 inputs),
        differentiable. A row without a key has out 0, lse -inf and gradients 0.

    Raises:
        ValueError: a shape, device or value is wrong; the message names the argument and the fix.
        TypeError: a dtype or type is wrong.
        BackendUnavailable: `backend` was named and cannot serve the call.

    Numerics: float32 softmax and accumulation (float64 for float64). Masked NaN or Inf in k and v
    reaches no row. A second derivative needs backend="reference".

    DTensors: if q, k and v are some, so are the results, divided by batch or by heads as q, k and v
    are; those divided otherwise are redistributed. Other arguments may be DTensors, or plain and
    the same in all processes. Where q is divided, dropout is a ValueError.

    Source: Dao, "FlashAttention-2", ICLR 2024; for the names, its `flash_attn_func`.
    """
    if spread.active is not None:
        return spread.active.attention(
            q, k, v, mask=mask, causal=causal, window_size=window_size,
            softmax_scale=softmax_scale, softcap=softcap, bias=bias, alibi_slopes=alibi_slopes,
            sinks=sinks, dropout_p=dropout_p, generator=generator, return_lse=return_lse,
            deterministic=deterministic, backend=backend,
        )  # fmt: skip
    out, lse = call.run(
        call.dense(
            q, k, v, mask, causal, window_size, softmax_scale, softcap, bias, alibi_slopes, sinks,
            dropout_p, generator, deterministic, backend,
        )
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_lse; Any lets type checkers take either
    """`attention` over sequences packed end to end, each attending only itself.

    To run many layers over the same packing, build `mmkernels.masks.packed` once and call
    `attention`.

    Args:
        q: (total_q, Hq, D). Rows beyond cu_seqlens_q[-1] get out 0.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (N + 1,) int32, from 0, not decreasing. Sequence n's rows are cu_seqlens_q[n]
            to cu_seqlens_q[n + 1].
        cu_seqlens_k: (N + 1,) int32, the same for the keys.
        max_seqlen_q: at least the longest sequence of queries; checked where that costs nothing.
        max_seqlen_k: the same for the keys.
        mask: as in `attention`, over (total_q, total_k), intersected with the packing.
        causal: row i of a sequence sees its keys j <= i + len_k - len_q.
        window_size: as in `attention`, within each sequence.
        softmax_scale: as in `attention`.
        softcap: as in `attention`.
        bias: broadcasts to (1, Hq, total_q, total_k).
        alibi_slopes: (Hq,), with distances within each sequence.
        sinks: as in `attention`.
        dropout_p: as in `attention`.
        generator: as in `attention`.
        return_lse: also return lse.
        deterministic: as in `attention`.
        backend: as in `attention`.

    Returns:
        out (total_q, Hq, Dv); with return_lse also lse (Hq, total_q).

    Raises:
        ValueError: as for `attention`; cu_seqlens that decrease or end beyond their tensor.
        TypeError: as for `attention`.
        BackendUnavailable: as for `attention`.
    """
    spread.refuse("attention_varlen", "call attention with mask=masks.packed of the whole sequence")
    out, lse = call.run(
        call.varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask, causal,
            window_size, softmax_scale, softcap, bias, alibi_slopes, sinks, dropout_p, generator,
            deterministic, backend,
        )
    )  # fmt: skip
    return (out[0], lse[0]) if return_lse else out[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its layout and top-left causal mask.

    Args:
        query: (..., Hq, Sq, D). Two or more dimensions; missing ones count as 1.
        key: (..., Hkv, Sk, D).
        value: (..., Hkv, Sk, Dv).
        attn_mask: bool (True = attend) or floating point (added), broadcasts to (..., Hq, Sq, Sk).
        dropout_p: probability with which a softmax weight is dropped.
        is_causal: row i sees the keys j <= i, whatever Sk is.
        scale: factor on query key^T; None: 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv.

    Returns:
        (..., Hq, Sq, Dv). A row without a key is 0.

    Raises:
        ValueError: as for `attention`; both attn_mask and is_causal; Hq != Hkv without enable_gqa.
        TypeError: as for `attention`.
        BackendUnavailable: as for `attention`.
    """
    if spread.active is not None:
        return call.spread_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    prepared = call.sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out, _ = call.run(prepared)
    return call.sdpa_layout(out, query, key, value)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_lse; Any lets type checkers take either
    """Attention of new queries against a KV cache, into which k and v are first written in place.

    With L = cache_seqlens[b] (plus Snew if k is given) valid keys, row i of batch element b stands
    at key L - Sq + i. For inference: there is no gradient.

    Args:
        q: (B, Sq, Hq, D). The newest Sq positions.
        k_cache: (B, Smax, Hkv, D), or with block_table pages (num_blocks, page_size, Hkv, D).
        v_cache: (B, Smax, Hkv, Dv), or pages (num_blocks, page_size, Hkv, Dv).
        k: (B, Snew, Hkv, D), written at cache_seqlens[b] .. cache_seqlens[b] + Snew - 1.
        v: (B, Snew, Hkv, Dv), likewise; k and v come together.
        cache_seqlens: int or (B,) int32. Keys in the cache before k is written; it is not updated.
            None: the cache is full, which leaves no room for k.
        block_table: (B, max_blocks) int32. Sequence b's key j is in page block_table[b, j //
            page_size]. Entries beyond a sequence's end are not read.
        causal: row i sees no key beyond its own.
        window_size: (left, right) in keys around the row's own; -1 is unbounded.
        softmax_scale: factor on q k^T; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 means none.
        alibi_slopes: (Hq,) or (B, Hq). -slope * distance is added to the scores.
        sinks: (Hq,). A logit a head that takes part in the softmax and has no value.
        return_lse: also return lse.
        backend: "auto", or a backend's name.

    Returns:
        out (B, Sq, Hq, Dv); with return_lse also lse (B, Hq, Sq). A row without a key has out 0,
        lse -inf.

    Raises:
        ValueError: a shape, device or value is wrong, k does not fit into the cache, a needed entry
            of block_table is no page, or a gradient is required (values are checked on the CPU,
            elsewhere with MMKERNELS_CHECK=1).
        TypeError: a dtype or type is wrong.
        BackendUnavailable: `backend` was named and cannot serve the call.

    Source: for the names and the in-place update, FlashAttention's `flash_attn_with_kvcache`.
    """
    spread.refuse("attention_with_kvcache", "decode outside of the block")
    prepared = kvcache.prepare(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal, window_size, softmax_scale,
        softcap, alibi_slopes, sinks, backend,
    )  # fmt: skip
    out, lse = kvcache.run(prepared)
    return (out, lse) if return_lse else out


registry.explainable(attention, call.explain_dense)
registry.explainable(attention_varlen, call.explain_varlen)
registry.explainable(scaled_dot_product_attention, call.explain_sdpa)
registry.explainable(attention_with_kvcache, kvcache.explain)
