"""Attention's forward pass in Triton: one kernel for every interval mask.

A program takes BLOCK_M queries of one head and walks the keys that some of them see, BLOCK_N at a
time, with the softmax computed on the way (m: running maximum, l: running sum):

    m' = max(m, max_j s_j),  p_j = exp(s_j - m'),  l' = l exp(m - m') + sum_j p_j
    acc' = acc exp(m - m') + p v,    at the end    out = acc / l,  lse = m + log(l)

The rows' bounds give the tiles: those that every row sees in full go through a loop without any
masking, the ragged ones at both ends through a masked one, all others are never touched.

A NaN or Inf in a value is multiplied by the 0 of a row that may not see it. Such a product shows
in acc, which is looked at once, at the end; the tile then runs again, with such values taken out of
the product and put back into the rows that do see them.

Layout: q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) in any strides; out (B, Sq, Hq, Dv)
and lse (B, Hq, Sq) contiguous.

Source: Dao, "FlashAttention-2", ICLR 2024; Milakov and Gimelshein, 2018, for the running softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import gpu_of, input_precision, launch
from mmkernels.attention import triton_arguments as arguments
from mmkernels.attention.triton_tiles import (
    LN2,
    LOG2E,
    any_not_finite,
    eights,
    finite,
    keep_mask,
    key_range,
    load_tile,
    logits,
    masked_tile,
    position,
    row_bounds,
    slope_and_factor,
    store_tile,
    tile_counts,
)


@triton.jit
def product(p, v, acc, m_visible, CLEAN: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p v. CLEAN: what is not finite in v makes NaN of the rows that see it and of no other.

    acc keeps a NaN through all later steps. Key by key: that is slow, rare, and needs no second
    accumulator, for which there are no registers.
    """
    clean = v
    if CLEAN:
        clean = tl.where(finite(v), v, 0.0).to(v.dtype)
    acc = tl.dot(p.to(v.dtype), clean, acc, input_precision=PRECISION)
    if CLEAN:
        if tl.max(tl.max(tl.where(finite(v), 0, 1), 1), 0) > 0:
            o_key = tl.arange(0, v.shape[0])
            for key in tl.range(0, v.shape[0]):
                m_key = o_key == key
                hit_dim = tl.max(tl.where(m_key[:, None] & ~finite(v), 1, 0), 0)
                hit_row = tl.max(tl.where(m_key[None, :] & m_visible, 1, 0), 1)
                m_hit = (hit_row[:, None] > 0) & (hit_dim[None, :] > 0)
                acc = tl.where(m_hit, float("nan"), acc)
    return acc


@triton.jit
def _step(
    state, query, k, v, n0, limit, rows, scores, dropout, b, h, kv_h, seqlen_q, seqlen_k,
    BLOCK_N: tl.constexpr, WIDTHS: tl.constexpr, KIND: tl.constexpr, HOW: tl.constexpr,
    MASKED: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """One tile of keys, from n0: the new state (acc1, acc2, m_i, l_i)."""
    D: tl.constexpr = WIDTHS[0]
    DV: tl.constexpr = WIDTHS[1]
    D1: tl.constexpr = WIDTHS[2]
    D2: tl.constexpr = WIDTHS[3]
    V1: tl.constexpr = WIDTHS[4]
    V2: tl.constexpr = WIDTHS[5]
    TMA: tl.constexpr = HOW[0]
    PRECISION: tl.constexpr = HOW[1]
    acc1, acc2, m_i, l_i = state
    q1, q2 = query
    o_row, start, end = rows
    c = scores[0]
    k1 = load_tile(k, b, kv_h, n0, limit, BLOCK_N, 0, D1, D, MASKED, TMA)
    qk = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_tile(k, b, kv_h, n0, limit, BLOCK_N, D1, D2, D, MASKED, TMA)
        qk = tl.dot(q2, tl.trans(k2), qk, input_precision=PRECISION)
    o_col = n0 + tl.arange(0, BLOCK_N)
    s, _ = logits(qk, o_row[:, None], o_col[None, :], start[:, None], end[:, None], scores,
                  seqlen_q, seqlen_k, KIND, MASKED)  # fmt: skip
    m_new = tl.maximum(m_i, tl.max(s, 1))
    # -inf - -inf is NaN: a row that has seen nothing yet subtracts 0.
    pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.math.exp2((m_i - pivot) * c)
    if q1.dtype == tl.float32:
        p = tl.math.exp2((s - pivot[:, None]) * c)
    else:  # one multiply-add; how large scores may be: docs/numerics.md
        p = tl.math.exp2(s * c - (pivot * c)[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    if KIND[3]:  # dropout: lse knows nothing of it
        p = tl.where(keep_mask(dropout, b, h, o_row[:, None], o_col[None, :]), p, 0.0)
    m_visible = s > float("-inf")
    m_key = (o_col < limit)[:, None]
    v1 = load_tile(v, b, kv_h, n0, limit, BLOCK_N, 0, V1, DV, MASKED, TMA)
    if CLEAN and TMA:  # a descriptor knows the tensor's end, not the mask's
        v1 = tl.where(m_key, v1, 0.0).to(v1.dtype)
    acc1 = product(p, v1, acc1 * alpha[:, None], m_visible, CLEAN, PRECISION)
    if V2 > 0:
        v2 = load_tile(v, b, kv_h, n0, limit, BLOCK_N, V1, V2, DV, MASKED, TMA)
        acc2 = product(p, v2, acc2 * alpha[:, None], m_visible, CLEAN, PRECISION)
    return acc1, acc2, m_new, l_i


@triton.jit
def initial_state(BLOCK_M: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr):
    """acc1, acc2, m_i, l_i before the first key; acc2 is a dummy where V2 is 0."""
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, V2 if V2 > 0 else 16], tl.float32)
    return (
        acc1,
        acc2,
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )


@triton.jit
def no_key(m_i, l_i):
    """Rows that saw no score above -inf. m_i alone knows nothing of NaN."""
    return (l_i == 0.0) & (m_i == float("-inf"))


@triton.jit
def divisor(l_i, m_empty):
    """l_i, 1 in empty rows; NaN, not infinity, where scores are too large for a sum."""
    return tl.where(m_empty, 1.0, tl.where(l_i == 0.0, float("nan"), l_i))


# Sizes, and strides that follow from them, are not worth a compilation each.
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "groups", "total", "wave", "last_dropped", "stride_start_b", "stride_end_b", "stride_bias_b", "stride_bias_h"])  # fmt: skip # noqa: E501
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_start, p_end, p_bias, p_alibi, p_sinks, p_seed,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_start_b, stride_start_s, stride_end_b, stride_end_s,
    stride_bias_b, stride_bias_h, stride_bias_s, stride_bias_k, stride_alibi_b, stride_alibi_h,
    seqlen_q, seqlen_k, heads, groups, total, wave, softmax_scale, softcap, last_dropped,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    DROPOUT: tl.constexpr, PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head."""
    WIDTHS: tl.constexpr = (D, DV, D1, D2, V1, V2)
    KIND: tl.constexpr = (BIAS, ALIBI, SOFTCAP, DROPOUT, PLAIN)
    HOW: tl.constexpr = (TMA, PRECISION)
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile, bh = position(tl.program_id(0), tiles, total, wave)
    m0 = (tiles - 1 - tile) * BLOCK_M  # of a causal mask the last rows have the most work
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    kv_h = h // groups
    q = (p_q, eights(stride_qb, EIGHTS), eights(stride_qs, EIGHTS),
         eights(stride_qh, EIGHTS), stride_qd)  # fmt: skip
    k = (p_k, eights(stride_kb, EIGHTS), eights(stride_ks, EIGHTS),
         eights(stride_kh, EIGHTS), stride_kd)  # fmt: skip
    v = (p_v, eights(stride_vb, EIGHTS), eights(stride_vs, EIGHTS),
         eights(stride_vh, EIGHTS), stride_vd)  # fmt: skip
    bounds = (p_start, stride_start_b, stride_start_s, p_end, stride_end_b, stride_end_s)
    slope, c = slope_and_factor(p_alibi, stride_alibi_b, stride_alibi_h, softmax_scale, b, h, KIND)
    o_bias = b * stride_bias_b + h * stride_bias_h
    scores = (c, slope, softmax_scale, softcap, p_bias, o_bias, stride_bias_s, stride_bias_k)
    dropout = (p_seed, last_dropped, keep_scale)
    o_row = m0 + tl.arange(0, BLOCK_M)
    start, end = row_bounds(bounds, b, o_row, seqlen_q, seqlen_k, MASK)
    rows = (o_row, start, end)
    lo, hi, full_lo, full_hi = key_range(start, end, seqlen_k, MASK, BIAS)
    left, full, masked = tile_counts(lo, hi, full_lo, full_hi, BLOCK_N)
    q1 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, 0, D1, D, True, False)
    q2 = q1
    if D2 > 0:
        q2 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, D1, D2, D, True, False)
    query = (q1, q2)

    acc1, acc2, m_i, l_i = initial_state(BLOCK_M, V1, V2)
    for index in tl.range(0, full):
        acc1, acc2, m_i, l_i = _step(
            (acc1, acc2, m_i, l_i), query, k, v, lo + (left + index) * BLOCK_N, hi, rows, scores,
            dropout, b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW, False, False,
        )  # fmt: skip
    for index in tl.range(0, masked):
        acc1, acc2, m_i, l_i = _step(
            (acc1, acc2, m_i, l_i), query, k, v, lo + masked_tile(index, left, full) * BLOCK_N, hi,
            rows, scores, dropout, b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW,
            True, False,
        )  # fmt: skip
    if MASK or BIAS != 0:
        bad = any_not_finite(acc1, end > start)
        if V2 > 0:
            bad = bad | any_not_finite(acc2, end > start)
        if bad > 0:
            acc1, acc2, m_i, l_i = initial_state(BLOCK_M, V1, V2)
            for index in tl.range(0, full + masked, num_stages=1):
                acc1, acc2, m_i, l_i = _step(
                    (acc1, acc2, m_i, l_i), query, k, v, lo + index * BLOCK_N, hi, rows, scores,
                    dropout, b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW, True, True,
                )  # fmt: skip

    m_empty = no_key(m_i, l_i) | (start >= end)
    m_i = tl.where(m_empty, 0.0, m_i) * c  # times log2(e) in either unit of scores
    if SINKS:
        sink = tl.load(p_sinks + h).to(tl.float32) * LOG2E
        m_all = tl.maximum(m_i, sink)
        alpha = tl.math.exp2(m_i - m_all)
        l_i = l_i * alpha + tl.math.exp2(sink - m_all)
        acc1 *= alpha[:, None]
        acc2 *= alpha[:, None]
        m_i = m_all
    l_i = divisor(l_i, m_empty)
    factor = keep_scale / l_i if DROPOUT else 1.0 / l_i
    out1 = tl.where(m_empty[:, None], 0.0, acc1 * factor[:, None])
    store_tile(p_out, out1, b, h, m0, seqlen_q, heads, BLOCK_M, 0, V1, DV)
    if V2 > 0:
        out2 = tl.where(m_empty[:, None], 0.0, acc2 * factor[:, None])
        store_tile(p_out, out2, b, h, m0, seqlen_q, heads, BLOCK_M, V1, V2, DV)
    lse = tl.where(m_empty, float("-inf"), (m_i + tl.math.log2(l_i)) * LN2)
    p_lse_row = p_lse + bh.to(tl.int64) * seqlen_q + o_row
    tl.store(p_lse_row, lse, mask=o_row < seqlen_q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) float32; see `_core/ops.py`."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads, value_dim = v.shape[1:]
    out = torch.empty((batch, seqlen_q, heads, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if seqlen_k == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    gpu = gpu_of(q)
    problem = tuning.Problem(
        "forward", head_dim, value_dim, q.dtype, start is not None, bias is not None
    )
    config = tuning.configuration(problem, gpu)
    (p_k, p_v), tma = arguments.tma_pointers(gpu, config.BLOCK_N, k, v)
    groups = heads // kv_heads
    launch(
        forward_kernel,
        (triton.cdiv(seqlen_q, config.BLOCK_M) * batch * heads,),
        **config._asdict(),
        p_q=q, p_k=p_k, p_v=p_v, p_out=out, p_lse=lse, p_sinks=arguments.dense(sinks),
        **arguments.strides("q", q), **arguments.strides("k", k), **arguments.strides("v", v),
        **arguments.size_arguments(q, k), **arguments.mask_arguments(start, end),
        **arguments.bias_arguments(bias), **arguments.dropout_arguments(seed, dropout_p),
        **arguments.score_arguments(alibi_slopes, bias, softmax_scale, softcap),
        **arguments.width_arguments(head_dim, value_dim),
        total=batch * heads, wave=arguments.wave(gpu, batch * heads, groups, k, v),
        SINKS=sinks is not None, TMA=tma,
        PRECISION=input_precision(q.dtype), EIGHTS=arguments.eights(q, k, v),
    )  # fmt: skip
    return out, lse
