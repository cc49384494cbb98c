"""Attention's backward pass in Triton: three kernels, no atomics, so every run gives the same bits.

From out and lse of any backend's forward pass, with s and p as there:

    delta = sum_d dout out - dlse              one number a row: `delta_kernel`
    p = exp(s - lse),  ds = p (dout v^T - delta)
    dk = scale ds^T q,  dv = p^T dout          `keys_kernel`: a tile of keys, walking the queries
    dq = scale ds k                            `queries_kernel`: a tile of queries, walking the keys

The keys kernel computes s and dout v^T transposed, so that p^T and ds^T are left operands of its
products as they come. Scores are computed twice, seven products where five would do; that is the
price of sums in a fixed order.

Which rows a tile of keys needs comes from the mask's transposed ranges (`IntervalMask.key_rows`);
the run of rows that see the whole tile goes unmasked. A NaN or Inf in a key is multiplied by the 0
of a row that may not see it only in ds k: it shows in dq, which is looked at once, and then the
tile runs again without such keys.

Layout: as in `triton_forward.py`; dq, dk and dv contiguous.

Source: Dao, "FlashAttention-2", ICLR 2024.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import gpu_of, input_precision, launch
from mmkernels.attention import triton_arguments as arguments
from mmkernels.attention.triton_bias_gradient import bias_gradient
from mmkernels.attention.triton_gradients import (
    dropped,
    gradient_operand,
    load_delta,
    load_lse,
    probabilities,
    row_delta,
    score_gradient,
)
from mmkernels.attention.triton_tiles import (
    any_not_finite,
    eights,
    finite,
    key_range,
    load_tile,
    masked_tile,
    position,
    row_bounds,
    slope_and_factor,
    store_tile,
    tile_counts,
)


@triton.jit
def _keys_step(
    state, key, q, dout, m0, o_col, bounds, scores, dropout, p_lse, p_delta, b, h, bh,
    seqlen_q, seqlen_k, BLOCK_M: tl.constexpr, WIDTHS: tl.constexpr, KIND: tl.constexpr,
    HOW: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the BLOCK_M queries from m0 give to (dk1, dk2, dv1, dv2) of a tile of keys."""
    D: tl.constexpr = WIDTHS[0]
    DV: tl.constexpr = WIDTHS[1]
    D1: tl.constexpr = WIDTHS[2]
    D2: tl.constexpr = WIDTHS[3]
    V1: tl.constexpr = WIDTHS[4]
    V2: tl.constexpr = WIDTHS[5]
    TMA: tl.constexpr = HOW[0]
    PRECISION: tl.constexpr = HOW[1]
    dk1, dk2, dv1, dv2 = state
    k1, k2, v1, v2 = key
    q1 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, 0, D1, D, MASKED, TMA)
    o_row = m0 + tl.arange(0, BLOCK_M)
    # Tiles are (keys, queries). Each vector along the queries is loaded where it is used and done
    # with before the next: what is alive at once decides whether everything stays in registers.
    qk = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
    if D2 > 0:
        q2 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, D1, D2, D, MASKED, TMA)
        qk = tl.dot(k2, tl.trans(q2), qk, input_precision=PRECISION)
    lse2 = load_lse(p_lse, bh, o_row, seqlen_q)
    p, slope = probabilities(
        qk, lse2[None, :], o_row[None, :], o_col[:, None], scores, seqlen_q, seqlen_k, KIND, MASKED
    )
    if MASKED and MASK:  # rows that are not there have lse -inf, keys that are not are not stored
        p_start, stride_start_b, stride_start_s, p_end, stride_end_b, stride_end_s = bounds
        o_start = b * stride_start_b + o_row.to(tl.int64) * stride_start_s
        start = tl.load(p_start + o_start, mask=o_row < seqlen_q, other=0)
        p = tl.where(o_col[:, None] >= start[None, :], p, 0.0)
        o_end = b * stride_end_b + o_row.to(tl.int64) * stride_end_s
        end = tl.load(p_end + o_end, mask=o_row < seqlen_q, other=0)
        p = tl.where(o_col[:, None] < end[None, :], p, 0.0)
    dout1 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, 0, V1, DV, MASKED, TMA)
    kept = dropped(p, dropout, b, h, o_row[None, :], o_col[:, None], KIND[3]).to(dout1.dtype)
    dv1 = tl.dot(kept, dout1, dv1, input_precision=PRECISION)
    dp = tl.dot(v1, tl.trans(dout1), input_precision=PRECISION)
    if V2 > 0:
        dout2 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, V1, V2, DV, MASKED, TMA)
        dv2 = tl.dot(kept, dout2, dv2, input_precision=PRECISION)
        dp = tl.dot(v2, tl.trans(dout2), dp, input_precision=PRECISION)
    dp = dropped(dp, dropout, b, h, o_row[None, :], o_col[:, None], KIND[3])
    delta = load_delta(p_delta, bh, o_row, seqlen_q)
    ds = score_gradient(p, dp, delta[None, :], slope, KIND[2], MASKED or KIND[0] != 0)
    dqk = gradient_operand(ds, scores[2], q1.dtype)
    dk1 = tl.dot(dqk, q1, dk1, input_precision=PRECISION)
    if D2 > 0:
        dk2 = tl.dot(dqk, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def _full_rows(bounds, b, lo, hi, n0, n1, seqlen_k, CHUNK: tl.constexpr):
    """A run of rows in [lo, hi) that see all of the keys [n0, n1): the one around the middle."""
    middle = (lo + hi) // 2
    before = tl.full([CHUNK], -1, tl.int32)
    after = tl.zeros([CHUNK], tl.int32) + hi
    for row in tl.range(lo, hi, CHUNK):
        o_row = row + tl.arange(0, CHUNK)
        start, end = row_bounds(bounds, b, o_row, hi, seqlen_k, True)
        # Rows without a key may run through any tile: their p is 0 (if their q is finite).
        m_bad = (start < end) & ((start > n0) | (end < n1))
        before = tl.maximum(before, tl.where(m_bad & (o_row < middle), o_row, -1))
        after = tl.minimum(after, tl.where(m_bad & (o_row >= middle), o_row, hi))
    return tl.maximum(tl.max(before, 0) + 1, lo), tl.min(after, 0)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "groups", "total", "wave", "last_dropped", "stride_start_b", "stride_end_b", "stride_bias_b", "stride_bias_h", "stride_row_start_b", "stride_row_end_b"])  # fmt: skip # noqa: E501
def keys_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dk, p_dv, p_start, p_end, p_row_start, p_row_end,
    p_bias, p_alibi, p_seed,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_doutb, stride_douts, stride_douth, stride_doutd,
    stride_start_b, stride_start_s, stride_end_b, stride_end_s,
    stride_row_start_b, stride_row_start_s, stride_row_end_b, stride_row_end_s,
    stride_bias_b, stride_bias_h, stride_bias_s, stride_bias_k, stride_alibi_b, stride_alibi_h,
    seqlen_q, seqlen_k, heads, groups, total, wave, softmax_scale, softcap, last_dropped,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, summed over the query heads that share it."""
    WIDTHS: tl.constexpr = (D, DV, D1, D2, V1, V2)
    KIND: tl.constexpr = (BIAS, ALIBI, SOFTCAP, DROPOUT, PLAIN)
    HOW: tl.constexpr = (TMA, PRECISION)
    # Of a causal mask the first keys have the most work.
    tile, kv_bh = position(tl.program_id(0), tl.cdiv(seqlen_k, BLOCK_N), total, wave)
    kv_heads = heads // groups
    b = (kv_bh // kv_heads).to(tl.int64)
    kv_h = (kv_bh % kv_heads).to(tl.int64)
    q = (p_q, eights(stride_qb, EIGHTS), eights(stride_qs, EIGHTS),
         eights(stride_qh, EIGHTS), stride_qd)  # fmt: skip
    k = (p_k, eights(stride_kb, EIGHTS), eights(stride_ks, EIGHTS),
         eights(stride_kh, EIGHTS), stride_kd)  # fmt: skip
    v = (p_v, eights(stride_vb, EIGHTS), eights(stride_vs, EIGHTS),
         eights(stride_vh, EIGHTS), stride_vd)  # fmt: skip
    dout = (p_dout, eights(stride_doutb, EIGHTS), eights(stride_douts, EIGHTS),
            eights(stride_douth, EIGHTS), stride_doutd)  # fmt: skip
    bounds = (p_start, stride_start_b, stride_start_s, p_end, stride_end_b, stride_end_s)
    dropout = (p_seed, last_dropped, keep_scale)
    n0 = tile * BLOCK_N
    o_col = n0 + tl.arange(0, BLOCK_N)
    lo = seqlen_q * 0
    hi = seqlen_q
    full_lo = lo
    full_hi = hi
    if ROWS:
        row_ranges = (p_row_start, stride_row_start_b, stride_row_start_s,
                      p_row_end, stride_row_end_b, stride_row_end_s)  # fmt: skip
        first, last = row_bounds(row_ranges, b, o_col, seqlen_k, seqlen_q, True)
        lo = tl.min(tl.where(first < last, first, seqlen_q), 0)
        hi = tl.max(last, 0)
    if MASK:
        n1 = tl.minimum(n0 + BLOCK_N, seqlen_k)
        full_lo, full_hi = _full_rows(bounds, b, lo, hi, n0, n1, seqlen_k, 512)
    if BIAS != 0 and n0 + BLOCK_N > seqlen_k:  # tiles of a bias end with the keys
        full_hi = full_lo
    left, full, masked = tile_counts(lo, hi, full_lo, full_hi, BLOCK_M)

    k1 = load_tile(k, b, kv_h, n0, seqlen_k, BLOCK_N, 0, D1, D, True, False)
    v1 = load_tile(v, b, kv_h, n0, seqlen_k, BLOCK_N, 0, V1, DV, True, False)
    k2 = k1
    v2 = v1
    if D2 > 0:
        k2 = load_tile(k, b, kv_h, n0, seqlen_k, BLOCK_N, D1, D2, D, True, False)
    if V2 > 0:
        v2 = load_tile(v, b, kv_h, n0, seqlen_k, BLOCK_N, V1, V2, DV, True, False)
    key = (k1, k2, v1, v2)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, V1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BLOCK_N, V2 if V2 > 0 else 16], tl.float32)
    for group in range(0, groups):
        h = kv_h * groups + group
        bh = b * heads + h
        slope, c = slope_and_factor(
            p_alibi, stride_alibi_b, stride_alibi_h, softmax_scale, b, h, KIND
        )
        o_bias = b * stride_bias_b + h * stride_bias_h
        scores = (c, slope, softmax_scale, softcap, p_bias, o_bias, stride_bias_s, stride_bias_k)
        for index in tl.range(0, full):
            dk1, dk2, dv1, dv2 = _keys_step(
                (dk1, dk2, dv1, dv2), key, q, dout, lo + (left + index) * BLOCK_M, o_col, bounds,
                scores, dropout, p_lse, p_delta, b, h, bh, seqlen_q, seqlen_k, BLOCK_M, WIDTHS,
                KIND, HOW, MASK, False,
            )  # fmt: skip
        for index in tl.range(0, masked):
            dk1, dk2, dv1, dv2 = _keys_step(
                (dk1, dk2, dv1, dv2), key, q, dout, lo + masked_tile(index, left, full) * BLOCK_M,
                o_col, bounds, scores, dropout, p_lse, p_delta, b, h, bh, seqlen_q, seqlen_k,
                BLOCK_M, WIDTHS, KIND, HOW, MASK, True,
            )  # fmt: skip
    rest = 1.0 if p_dk.dtype.element_ty == tl.float16 else softmax_scale
    store_tile(p_dv, dv1, b, kv_h, n0, seqlen_k, kv_heads, BLOCK_N, 0, V1, DV)
    store_tile(p_dk, dk1 * rest, b, kv_h, n0, seqlen_k, kv_heads, BLOCK_N, 0, D1, D)
    if V2 > 0:
        store_tile(p_dv, dv2, b, kv_h, n0, seqlen_k, kv_heads, BLOCK_N, V1, V2, DV)
    if D2 > 0:
        store_tile(p_dk, dk2 * rest, b, kv_h, n0, seqlen_k, kv_heads, BLOCK_N, D1, D2, D)


@triton.jit
def _queries_step(
    state, query, k, v, n0, limit, rows, scores, dropout, b, h, kv_h, seqlen_q, seqlen_k,
    BLOCK_N: tl.constexpr, WIDTHS: tl.constexpr, KIND: tl.constexpr, HOW: tl.constexpr,
    MASKED: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from n0 give to (dq1, dq2) of a tile of queries."""
    D: tl.constexpr = WIDTHS[0]
    DV: tl.constexpr = WIDTHS[1]
    D1: tl.constexpr = WIDTHS[2]
    D2: tl.constexpr = WIDTHS[3]
    V1: tl.constexpr = WIDTHS[4]
    V2: tl.constexpr = WIDTHS[5]
    TMA: tl.constexpr = HOW[0]
    PRECISION: tl.constexpr = HOW[1]
    dq1, dq2 = state
    q1, q2, dout1, dout2, lse2, delta = query
    o_row, start, end = rows
    k1 = load_tile(k, b, kv_h, n0, limit, BLOCK_N, 0, D1, D, MASKED, TMA)
    v1 = load_tile(v, b, kv_h, n0, limit, BLOCK_N, 0, V1, DV, MASKED, TMA)
    qk = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    dp = tl.dot(dout1, tl.trans(v1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_tile(k, b, kv_h, n0, limit, BLOCK_N, D1, D2, D, MASKED, TMA)
        qk = tl.dot(q2, tl.trans(k2), qk, input_precision=PRECISION)
    if V2 > 0:
        v2 = load_tile(v, b, kv_h, n0, limit, BLOCK_N, V1, V2, DV, MASKED, TMA)
        dp = tl.dot(dout2, tl.trans(v2), dp, input_precision=PRECISION)
    o_col = n0 + tl.arange(0, BLOCK_N)
    p, slope = probabilities(
        qk, lse2[:, None], o_row[:, None], o_col[None, :], scores, seqlen_q, seqlen_k, KIND, MASKED
    )
    if MASKED:
        m_visible = (o_col[None, :] >= start[:, None]) & (o_col[None, :] < end[:, None])
        p = tl.where(m_visible, p, 0.0)
    dp = dropped(dp, dropout, b, h, o_row[:, None], o_col[None, :], KIND[3])
    ds = score_gradient(p, dp, delta[:, None], slope, KIND[2], MASKED or KIND[0] != 0)
    dqk = gradient_operand(ds, scores[2], k1.dtype)
    if CLEAN:
        k1 = tl.where(finite(k1), k1, 0.0).to(k1.dtype)
    dq1 = tl.dot(dqk, k1, dq1, input_precision=PRECISION)
    if D2 > 0:
        if CLEAN:
            k2 = tl.where(finite(k2), k2, 0.0).to(k2.dtype)
        dq2 = tl.dot(dqk, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "groups", "total", "wave", "last_dropped", "stride_start_b", "stride_end_b", "stride_bias_b", "stride_bias_h"])  # fmt: skip # noqa: E501
def queries_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dq, p_start, p_end, p_bias, p_alibi, p_seed,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_doutb, stride_douts, stride_douth, stride_doutd,
    stride_start_b, stride_start_s, stride_end_b, stride_end_s,
    stride_bias_b, stride_bias_h, stride_bias_s, stride_bias_k, stride_alibi_b, stride_alibi_h,
    seqlen_q, seqlen_k, heads, groups, total, wave, softmax_scale, softcap, last_dropped,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PLAIN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
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
    dout = (p_dout, eights(stride_doutb, EIGHTS), eights(stride_douts, EIGHTS),
            eights(stride_douth, EIGHTS), stride_doutd)  # fmt: skip
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
    dout1 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, 0, V1, DV, True, False)
    q2 = q1
    dout2 = dout1
    if D2 > 0:
        q2 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, D1, D2, D, True, False)
    if V2 > 0:
        dout2 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, V1, V2, DV, True, False)
    lse2 = load_lse(p_lse, bh, o_row, seqlen_q)
    delta = load_delta(p_delta, bh, o_row, seqlen_q)
    query = (q1, q2, dout1, dout2, lse2, delta)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    for index in tl.range(0, full):
        dq1, dq2 = _queries_step(
            (dq1, dq2), query, k, v, lo + (left + index) * BLOCK_N, hi, rows, scores, dropout,
            b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW, False, False,
        )  # fmt: skip
    for index in tl.range(0, masked):
        dq1, dq2 = _queries_step(
            (dq1, dq2), query, k, v, lo + masked_tile(index, left, full) * BLOCK_N, hi, rows,
            scores, dropout, b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW, True,
            False,
        )  # fmt: skip
    if MASK or BIAS != 0:
        bad = any_not_finite(dq1, end > start)
        if D2 > 0:
            bad = bad | any_not_finite(dq2, end > start)
        if bad > 0:
            dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
            dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
            for index in tl.range(0, full + masked, num_stages=1):
                dq1, dq2 = _queries_step(
                    (dq1, dq2), query, k, v, lo + index * BLOCK_N, hi, rows, scores, dropout,
                    b, h, kv_h, seqlen_q, seqlen_k, BLOCK_N, WIDTHS, KIND, HOW, True, True,
                )  # fmt: skip
    rest = 1.0 if p_dq.dtype.element_ty == tl.float16 else softmax_scale
    m_empty = (lse2 == float("inf")) | (start >= end)
    dq1 = tl.where(m_empty[:, None], 0.0, dq1 * rest)
    store_tile(p_dq, dq1, b, h, m0, seqlen_q, heads, BLOCK_M, 0, D1, D)
    if D2 > 0:
        dq2 = tl.where(m_empty[:, None], 0.0, dq2 * rest)
        store_tile(p_dq, dq2, b, h, m0, seqlen_q, heads, BLOCK_M, D1, D2, D)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    row_start: Tensor | None,
    row_end: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dsinks (the last two without elements where there is none)."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = q.new_empty(0)
    dsinks = q.new_empty(0)
    if q.numel() == 0 or k.shape[1] == 0:
        dbias = torch.zeros_like(bias) if bias is not None and bias_grad else dbias
        dsinks = torch.zeros_like(sinks) if sinks is not None else dsinks
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, dsinks
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads, value_dim = v.shape[1:]
    groups = heads // kv_heads
    gpu = gpu_of(q)
    lse = lse.contiguous()
    delta = row_delta(dout, out, lse, dlse)
    shared = {
        **arguments.strides("q", q), **arguments.strides("k", k), **arguments.strides("v", v),
        **arguments.strides("dout", dout), **arguments.size_arguments(q, k),
        **arguments.mask_arguments(start, end), **arguments.bias_arguments(bias),
        **arguments.score_arguments(alibi_slopes, bias, softmax_scale, softcap),
        **arguments.dropout_arguments(seed, dropout_p),
        **arguments.width_arguments(head_dim, value_dim),
        "p_lse": lse, "p_delta": delta, "PRECISION": input_precision(q.dtype),
        "EIGHTS": arguments.eights(q, k, v, dout),
    }  # fmt: skip

    problem = tuning.Problem(
        "backward_keys", head_dim, value_dim, q.dtype, start is not None, bias is not None
    )
    config = tuning.configuration(problem, gpu)
    (p_q, p_dout), tma = arguments.tma_pointers(gpu, config.BLOCK_M, q, dout)
    launch(
        keys_kernel,
        (triton.cdiv(seqlen_k, config.BLOCK_N) * batch * kv_heads,),
        **config._asdict(),
        **shared,
        **arguments.row_arguments(row_start, row_end),
        p_q=p_q, p_k=k, p_v=v, p_dout=p_dout, p_dk=dk, p_dv=dv, TMA=tma, total=batch * kv_heads,
        wave=arguments.wave(gpu, batch * kv_heads, 1, *[q, dout] * groups),
    )  # fmt: skip

    problem = problem._replace(kernel="backward_queries")
    config = tuning.configuration(problem, gpu)
    (p_k, p_v), tma = arguments.tma_pointers(gpu, config.BLOCK_N, k, v)
    launch(
        queries_kernel,
        (triton.cdiv(seqlen_q, config.BLOCK_M) * batch * heads,),
        **config._asdict(),
        **shared,
        p_q=q, p_k=p_k, p_v=p_v, p_dout=dout, p_dq=dq, TMA=tma, total=batch * heads,
        wave=arguments.wave(gpu, batch * heads, groups, k, v),
    )  # fmt: skip

    if bias is not None and bias_grad:
        dbias = bias_gradient(dout, q, k, v, bias, shared, problem, gpu)
    if sinks is not None:
        no_key = lse == -torch.inf
        weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(no_key, torch.inf))
        dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks
