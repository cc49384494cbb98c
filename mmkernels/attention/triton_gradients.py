"""What the kernels of attention's backward pass share: delta, and the gradient of a tile of scores.

    delta = sum_d dout out - dlse,  p = exp(s - lse),  ds = p (dout v^T - delta)

The gradient of lse enters in delta, and nowhere else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core.triton_runtime import launch
from mmkernels.attention import triton_arguments as arguments
from mmkernels.attention.triton_tiles import LOG2E, eights, keep_mask, load_tile, logits

# Rows of delta that a program makes.
DELTA_ROWS = 128


@triton.jit(do_not_specialize=["seqlen_q", "heads"])
def delta_kernel(
    p_dout, p_out, p_dlse, p_lse, p_delta,
    stride_doutb, stride_douts, stride_douth, stride_doutd,
    stride_outb, stride_outs, stride_outh, stride_outd,
    stride_dlse_b, stride_dlse_h, stride_dlse_s, seqlen_q, heads,
    DV: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DLSE: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    """delta of ROWS rows of one head, 0 in rows without a key."""
    tiles = tl.cdiv(seqlen_q, ROWS)
    bh = tl.program_id(0) // tiles
    m0 = tl.program_id(0) % tiles * ROWS
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    o_row = m0 + tl.arange(0, ROWS)
    m_row = o_row < seqlen_q
    out = (p_out, eights(stride_outb, EIGHTS), eights(stride_outs, EIGHTS),
           eights(stride_outh, EIGHTS), stride_outd)  # fmt: skip
    dout = (p_dout, eights(stride_doutb, EIGHTS), eights(stride_douts, EIGHTS),
            eights(stride_douth, EIGHTS), stride_doutd)  # fmt: skip
    out = load_tile(out, b, h, m0, seqlen_q, ROWS, 0, WIDTH, DV, True, False)
    dout = load_tile(dout, b, h, m0, seqlen_q, ROWS, 0, WIDTH, DV, True, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if DLSE:
        o_dlse = b * stride_dlse_b + h * stride_dlse_h + o_row.to(tl.int64) * stride_dlse_s
        delta -= tl.load(p_dlse + o_dlse, mask=m_row, other=0.0)
    o_flat = bh.to(tl.int64) * seqlen_q + o_row
    lse = tl.load(p_lse + o_flat, mask=m_row, other=0.0)
    tl.store(p_delta + o_flat, tl.where(lse == float("-inf"), 0.0, delta), mask=m_row)


@triton.jit
def probabilities(
    qk, lse2, o_row, o_col, scores, seqlen_q, seqlen_k, KIND: tl.constexpr, MASKED: tl.constexpr
):
    """p of a tile from its raw products, in any orientation, and the derivative of softcap.

    The interval mask is the caller's to apply: to p, for a row whose lse is NaN has made NaN of
    what it may not see, too. lse2 is lse * log2(e), +inf in rows without a key: exp(s - inf) is the
    0 they need.
    """
    s, t = logits(
        qk, o_row, o_col, 0, seqlen_k, scores, seqlen_q, seqlen_k, KIND, MASKED and KIND[0] != 0
    )
    p = tl.math.exp2(s * scores[0] - lse2)
    if KIND[0] != 0:
        p = tl.where(s == float("-inf"), 0.0, p)
    return p, 1.0 - t * t


@triton.jit
def score_gradient(p, dp, delta, slope, SOFTCAP: tl.constexpr, HIDES: tl.constexpr):
    """ds = p (dp - delta), times softcap's slope; 0 where p is, even if these are not finite."""
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * slope
    if HIDES:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def gradient_operand(ds, softmax_scale, DTYPE: tl.constexpr):
    """ds for the products that make dq and dk.

    float16 gets it times softmax_scale, so that it overflows no sooner than they do; in the others
    the scale comes last.
    """
    if DTYPE == tl.float16:
        ds = ds * softmax_scale
    return ds.to(DTYPE)


@triton.jit
def dropped(x, dropout, b, h, o_row, o_col, DROPOUT: tl.constexpr):
    """x after dropout: 0 or scaled up."""
    if DROPOUT:
        x = tl.where(keep_mask(dropout, b, h, o_row, o_col), x * dropout[2], 0.0)
    return x


@triton.jit
def load_lse(p_lse, bh, o_row, seqlen_q):
    """lse * log2(e), +inf where there is no key or no row."""
    p_row = p_lse + bh.to(tl.int64) * seqlen_q + o_row
    lse = tl.load(p_row, mask=o_row < seqlen_q, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def load_delta(p_delta, bh, o_row, seqlen_q):
    """delta, 0 where there is no row."""
    p_row = p_delta + bh.to(tl.int64) * seqlen_q + o_row
    return tl.load(p_row, mask=o_row < seqlen_q, other=0.0)


def row_delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """delta (B, Hq, Sq) float32."""
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    batch, seqlen_q, heads, value_dim = out.shape
    strides = (0, 0, 0) if dlse is None else arguments.expanded_strides(dlse)
    launch(
        delta_kernel,
        (triton.cdiv(seqlen_q, DELTA_ROWS) * batch * heads,),
        num_warps=4,
        num_stages=1,
        p_dout=dout, p_out=out, p_dlse=dlse, p_lse=lse, p_delta=delta,
        **arguments.strides("dout", dout), **arguments.strides("out", out),
        stride_dlse_b=strides[0], stride_dlse_h=strides[1], stride_dlse_s=strides[2],
        seqlen_q=seqlen_q, heads=heads, DV=value_dim, WIDTH=triton.next_power_of_2(value_dim),
        ROWS=DELTA_ROWS, DLSE=dlse is not None, EIGHTS=arguments.eights(out, dout),
    )  # fmt: skip
    return delta
