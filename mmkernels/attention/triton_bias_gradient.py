"""The gradient of attention's bias in Triton, also of a broadcast one, without atomics.

A program makes one tile of dbias and walks all that shares it: the batch elements and heads, and
where the bias is one row or one column also all tiles of queries or of keys,

    dbias = sum over what is broadcast of ds,  ds = p (dout v^T - delta)

with p and delta as in `triton_backward.py`. Scores are computed once more than there; in return
nothing of size Sq x Sk is written that is not asked for, and the order of every sum is fixed.

Layout: bias (1 or B, 1 or Hq, 1 or Sq, 1 or Sk) in any strides; dbias contiguous.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import Gpu, launch
from mmkernels.attention.triton_gradients import (
    dropped,
    load_delta,
    load_lse,
    probabilities,
    score_gradient,
)
from mmkernels.attention.triton_tiles import (
    eights,
    key_range,
    load_tile,
    row_bounds,
    slope_and_factor,
)


@triton.jit
def _tile_gradient(
    q, k, v, dout, bounds, scores, dropout, p_lse, p_delta, b, h, kv_h, heads, m0, n0, seqlen_q,
    seqlen_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTHS: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """ds (BLOCK_M, BLOCK_N) of one batch element and head, 0 where hidden."""
    D: tl.constexpr = WIDTHS[0]
    DV: tl.constexpr = WIDTHS[1]
    D1: tl.constexpr = WIDTHS[2]
    D2: tl.constexpr = WIDTHS[3]
    V1: tl.constexpr = WIDTHS[4]
    V2: tl.constexpr = WIDTHS[5]
    o_row = m0 + tl.arange(0, BLOCK_M)
    o_col = n0 + tl.arange(0, BLOCK_N)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start, end = row_bounds(bounds, b, o_row, seqlen_q, seqlen_k, MASK)
    lo, hi, _, _ = key_range(start, end, seqlen_k, MASK, 0)
    if (n0 < hi) & (n0 + BLOCK_N > lo):
        q1 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, 0, D1, D, True, False)
        k1 = load_tile(k, b, kv_h, n0, seqlen_k, BLOCK_N, 0, D1, D, True, False)
        qk = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_tile(q, b, h, m0, seqlen_q, BLOCK_M, D1, D2, D, True, False)
            k2 = load_tile(k, b, kv_h, n0, seqlen_k, BLOCK_N, D1, D2, D, True, False)
            qk = tl.dot(q2, tl.trans(k2), qk, input_precision=PRECISION)
        dout1 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, 0, V1, DV, True, False)
        v1 = load_tile(v, b, kv_h, n0, seqlen_k, BLOCK_N, 0, V1, DV, True, False)
        dp = tl.dot(dout1, tl.trans(v1), input_precision=PRECISION)
        if V2 > 0:
            dout2 = load_tile(dout, b, h, m0, seqlen_q, BLOCK_M, V1, V2, DV, True, False)
            v2 = load_tile(v, b, kv_h, n0, seqlen_k, BLOCK_N, V1, V2, DV, True, False)
            dp = tl.dot(dout2, tl.trans(v2), dp, input_precision=PRECISION)
        bh = b * heads + h
        lse2 = load_lse(p_lse, bh, o_row, seqlen_q)
        delta = load_delta(p_delta, bh, o_row, seqlen_q)
        p, slope = probabilities(
            qk, lse2[:, None], o_row[:, None], o_col[None, :], scores, seqlen_q, seqlen_k, KIND,
            True,
        )  # fmt: skip
        m_visible = (o_col[None, :] >= start[:, None]) & (o_col[None, :] < end[:, None])
        p = tl.where(m_visible, p, 0.0)
        dp = dropped(dp, dropout, b, h, o_row[:, None], o_col[None, :], KIND[3])
        ds = score_gradient(p, dp, delta[:, None], slope, False, True)
    return ds


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads", "groups", "last_dropped", "bias_heads", "shared_batches", "shared_heads", "shared_rows", "shared_cols", "rows", "cols", "stride_start_b", "stride_end_b", "stride_bias_b", "stride_bias_h"])  # fmt: skip # noqa: E501
def bias_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dbias, p_start, p_end, p_bias, p_alibi, p_seed,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_doutb, stride_douts, stride_douth, stride_doutd,
    stride_start_b, stride_start_s, stride_end_b, stride_end_s,
    stride_bias_b, stride_bias_h, stride_bias_s, stride_bias_k, stride_alibi_b, stride_alibi_h,
    seqlen_q, seqlen_k, heads, groups, softmax_scale, softcap, last_dropped, keep_scale,
    bias_heads, rows, cols, shared_batches, shared_heads, shared_rows, shared_cols,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PLAIN: tl.constexpr, PRECISION: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """A tile of dbias (.., bias_heads, rows, cols); shared_*: how much is summed into it."""
    WIDTHS: tl.constexpr = (D, DV, D1, D2, V1, V2)
    KIND: tl.constexpr = (BIAS, ALIBI, SOFTCAP, DROPOUT, PLAIN)
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
    col_tiles = tl.cdiv(cols, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * col_tiles
    bias_bh = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row0 = tile // col_tiles * BLOCK_M
    col0 = tile % col_tiles * BLOCK_N
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(0, shared_batches * shared_heads):
        b = (bias_bh // bias_heads + index // shared_heads).to(tl.int64)
        h = (bias_bh % bias_heads + index % shared_heads).to(tl.int64)
        slope, c = slope_and_factor(
            p_alibi, stride_alibi_b, stride_alibi_h, softmax_scale, b, h, KIND
        )
        o_bias = b * stride_bias_b + h * stride_bias_h
        scores = (c, slope, softmax_scale, softcap, p_bias, o_bias, stride_bias_s, stride_bias_k)
        for part in tl.range(0, shared_rows * shared_cols):
            m0 = row0 + part // shared_cols * BLOCK_M
            n0 = col0 + part % shared_cols * BLOCK_N
            dbias += _tile_gradient(
                q, k, v, dout, bounds, scores, dropout, p_lse, p_delta, b, h, h // groups, heads,
                m0, n0, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, WIDTHS, KIND, PRECISION, MASK,
            )  # fmt: skip
    o_row = row0 + tl.arange(0, BLOCK_M)
    o_col = col0 + tl.arange(0, BLOCK_N)
    if ONE_ROW:  # the sum in row 0, which alone is stored
        dbias = tl.where(o_row[:, None] == 0, tl.sum(dbias, 0)[None, :], 0.0)
    if ONE_COL:
        dbias = tl.where(o_col[None, :] == 0, tl.sum(dbias, 1)[:, None], 0.0)
    p_tile = p_dbias + (bias_bh.to(tl.int64) * rows + o_row[:, None]) * cols + o_col[None, :]
    m_tile = (o_row[:, None] < rows) & (o_col[None, :] < cols)
    tl.store(p_tile, dbias.to(p_dbias.dtype.element_ty), mask=m_tile)


def bias_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    shared: dict[str, Any],
    problem: tuning.Problem,
    gpu: Gpu,
) -> Tensor:
    """dbias in the shape and dtype of bias (1 or B, 1 or Hq, 1 or Sq, 1 or Sk).

    Args:
        dout: (B, Sq, Hq, Dv).
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        bias: floating point.
        shared: the parameters that all kernels of the backward pass have.
        problem: of any of them.
        gpu: that all lie on.
    """
    config = tuning.configuration(problem._replace(kernel="backward_bias"), gpu)
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    batches, bias_heads, rows, cols = bias.shape
    row_tiles, col_tiles = triton.cdiv(rows, config.BLOCK_M), triton.cdiv(cols, config.BLOCK_N)
    one_row, one_col = rows < q.shape[1], cols < k.shape[1]
    launch(
        bias_kernel,
        (batches * bias_heads * row_tiles * col_tiles,),
        **config._asdict(),
        **shared,
        p_q=q, p_k=k, p_v=v, p_dout=dout, p_dbias=dbias,
        bias_heads=bias_heads, rows=rows, cols=cols,
        shared_batches=q.shape[0] // batches, shared_heads=q.shape[2] // bias_heads,
        shared_rows=triton.cdiv(q.shape[1], config.BLOCK_M) if one_row else 1,
        shared_cols=triton.cdiv(k.shape[1], config.BLOCK_N) if one_col else 1,
        ONE_ROW=one_row, ONE_COL=one_col,
    )  # fmt: skip
    return dbias
