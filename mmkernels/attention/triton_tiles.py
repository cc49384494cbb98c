"""Device functions that all Triton attention kernels share: tiles, ranges, scores, dropout.

Conventions in the kernels: `p_` is a pointer (or a tensor descriptor), `o_` an offset, upper case a
constexpr. Offsets into tensors are 64-bit. A head dim that is no power of two is held as two tiles
side by side, D = D1 + D2, so that 80 costs 64 + 16 and not 128.

Scores live in one of two units. PLAIN: the raw product q k^T, and `c` = scale * log2(e) is folded
into the exponential's multiply-add. Otherwise (softcap, ALiBi, bias, or a scale that is not above
0) the finished logit times log2(e), and `c` = 1. Hidden scores are -inf in both.

What belongs together travels as a tuple:

    x        (pointer or descriptor, strides of B, S, H, D)
    bounds   (p_start, its strides of B, S, p_end, its strides)
    scores   (c, ALiBi slope, softmax_scale, softcap, p_bias, offset of the head in it, its strides
             of queries and keys)
    dropout  (p_seed, last_dropped, keep_scale)
    WIDTHS   (D, DV, D1, D2, V1, V2)
    KIND     (BIAS, ALIBI, SOFTCAP, DROPOUT, PLAIN)
    HOW      (TMA, PRECISION)
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-2.3e38)  # times log2(e) still a float32

# Values of the constexpr BIAS.
NO_BIAS = tl.constexpr(0)
FLOAT_BIAS = tl.constexpr(1)
BOOL_BIAS = tl.constexpr(2)


@triton.jit
def eights(stride, EIGHTS: tl.constexpr):
    """stride, which the compiler may take for a multiple of 8 where EIGHTS.

    By itself it sees multiples of 16 only, and would load heads of 72 element by element.
    """
    return stride // 8 * 8 if EIGHTS else stride


@triton.jit
def load_tile(
    x, b, h, row, limit, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    DIM: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[b, row : row + ROWS, h, FIRST : FIRST + WIDTH] as (ROWS, WIDTH).

    0 beyond DIM and, where MASKED, in rows from `limit` on. TMA: x holds a descriptor of the
    tensor as (B, H, S, D), which gives 0 outside of it; `limit` is then not looked at.
    """
    p, stride_b, stride_s, stride_h, stride_d = x
    if TMA:
        tile = p.load([b.to(tl.int32), h.to(tl.int32), row, FIRST]).reshape([ROWS, WIDTH])
    else:
        o_row = tl.arange(0, ROWS)[:, None]
        o_dim = FIRST + tl.arange(0, WIDTH)[None, :]
        p_row = p + b * stride_b + h * stride_h + row.to(tl.int64) * stride_s
        p_tile = p_row + (o_row.to(tl.int64) * stride_s + o_dim.to(tl.int64) * stride_d)
        if MASKED and FIRST + WIDTH > DIM:
            tile = tl.load(p_tile, mask=(row + o_row < limit) & (o_dim < DIM), other=0.0)
        elif MASKED:
            tile = tl.load(p_tile, mask=row + o_row < limit, other=0.0)
        elif FIRST + WIDTH > DIM:
            tile = tl.load(p_tile, mask=o_dim < DIM, other=0.0)
        else:
            tile = tl.load(p_tile)
    return tile


@triton.jit
def store_tile(
    p, x, b, h, row, limit, heads,
    ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """x (ROWS, WIDTH) into rows of a contiguous (B, S, heads, DIM) tensor with S = `limit`."""
    o_row = row + tl.arange(0, ROWS)[:, None]
    o_dim = FIRST + tl.arange(0, WIDTH)[None, :]
    p_tile = p + ((b * limit + o_row.to(tl.int64)) * heads + h) * DIM + o_dim
    tl.store(p_tile, x.to(p.dtype.element_ty), mask=(o_row < limit) & (o_dim < DIM))


@triton.jit
def row_bounds(bounds, b, o_row, rows, keys, MASK: tl.constexpr):
    """start, end of each row's keys, clamped to [0, keys); (0, 0) for rows that see none."""
    if MASK:
        p_start, stride_start_b, stride_start_s, p_end, stride_end_b, stride_end_s = bounds
        m_row = o_row < rows
        o_64 = o_row.to(tl.int64)
        start = tl.load(p_start + b * stride_start_b + o_64 * stride_start_s, mask=m_row, other=0)
        end = tl.load(p_end + b * stride_end_b + o_64 * stride_end_s, mask=m_row, other=0)
        start = tl.maximum(start, 0)
        end = tl.minimum(end, keys)
        m_empty = start >= end
        start = tl.where(m_empty, 0, start)
        end = tl.where(m_empty, 0, end)
    else:
        start = tl.zeros_like(o_row)
        end = tl.where(o_row < rows, keys, 0)
    return start, end


@triton.jit
def key_range(start, end, seqlen_k, MASK: tl.constexpr, BIAS: tl.constexpr):
    """Keys that some row sees, [lo, hi), and that all rows but those without a key see.

    Rows without a key may run through any tile: what they make is thrown away. With a bias, lo is
    a multiple of 16, so that tiles of it can be loaded in vectors.
    """
    if MASK:
        m_empty = start >= end
        lo = tl.min(tl.where(m_empty, seqlen_k, start), 0)
        full_lo = tl.max(start, 0)
        hi = tl.max(end, 0)
        full_hi = tl.min(tl.where(m_empty, seqlen_k, end), 0)
        if BIAS != NO_BIAS:
            lo = tl.multiple_of(lo // 16 * 16, 16)
    else:
        lo = seqlen_k * 0
        full_lo = lo
        hi = seqlen_k
        full_hi = seqlen_k
    return lo, hi, full_lo, full_hi


@triton.jit
def tile_counts(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Tiles of BLOCK from lo that cover [lo, hi), and which of them lie in [full_lo, full_hi).

    Returns:
        left: tiles before the full ones. full: the full ones. masked: all that are not full.
    """
    hi = tl.maximum(lo, hi)
    left = tl.cdiv(tl.minimum(tl.maximum(full_lo, lo), hi) - lo, BLOCK)
    full = tl.maximum(tl.minimum(full_hi, hi) - (lo + left * BLOCK), 0) // BLOCK
    return left, full, tl.cdiv(hi - lo, BLOCK) - full


@triton.jit
def masked_tile(index, left, full):
    """Position among all tiles of the masked tile `index`."""
    return tl.where(index < left, index, index + full)


@triton.jit
def tanh(x):
    """tanh to 2 ulp. Source of the polynomial below 0.625: Cephes, tanhf."""
    size = tl.abs(x)
    square = x * x
    series = (((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
              + 1.33314422036e-1) * square - 3.33332819422e-1  # fmt: skip
    decay = tl.math.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0.0, -large, large))


@triton.jit
def logits(
    qk, o_row, o_col, start, end, scores, seqlen_q, seqlen_k, KIND: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of a tile from its raw products, -inf where hidden, and tanh where SOFTCAP.

    o_row, start and end run along the queries, o_col along the keys; all broadcast to qk, so the
    transposed tile of the backward pass is served, too.
    """
    BIAS: tl.constexpr = KIND[0]
    ALIBI: tl.constexpr = KIND[1]
    SOFTCAP: tl.constexpr = KIND[2]
    PLAIN: tl.constexpr = KIND[4]
    _, slope, softmax_scale, softcap, p_bias, o_head, stride_bias_s, stride_bias_k = scores
    s = qk
    t = qk
    if not PLAIN:
        s = s * softmax_scale
        if SOFTCAP:
            t = tanh(s / softcap)
            s = softcap * t
        if ALIBI:
            s -= slope * tl.abs(o_row + (seqlen_k - seqlen_q) - o_col).to(tl.float32)
        if BIAS != NO_BIAS:
            # Rows are clamped, not masked, and tiles without MASKED end before the last key: a mask
            # that is not known to be aligned would make single loads of every element.
            o_bias = tl.minimum(o_row, seqlen_q - 1).to(tl.int64) * stride_bias_s
            p_tile = p_bias + o_head + o_bias + o_col.to(tl.int64) * stride_bias_k
            if MASKED:
                bias = tl.load(p_tile, mask=(o_row >= 0) & (o_col < seqlen_k), other=0)
            else:
                bias = tl.load(p_tile)
            if BIAS == BOOL_BIAS:
                s = tl.where(bias != 0, s, float("-inf"))
            else:
                bias = bias.to(tl.float32)
                # Not by addition alone: a hidden NaN stays NaN in it. A finite sum stays finite in
                # powers of two: the dtype's lowest value hides less than -inf does.
                s = tl.maximum(s + bias, LOWEST, propagate_nan=tl.PropagateNan.ALL)
                s = tl.where(bias == float("-inf"), bias, s)
        s = s * LOG2E
    if MASKED:
        s = tl.where((o_col >= start) & (o_col < end), s, float("-inf"))
    return s, t


@triton.jit
def slope_and_factor(
    p_alibi, stride_alibi_b, stride_alibi_h, softmax_scale, b, h, KIND: tl.constexpr
):
    """The ALiBi slope of a head, 0 without, and c of `scores`."""
    slope = tl.load(p_alibi + b * stride_alibi_b + h * stride_alibi_h) if KIND[1] else 0.0
    c = softmax_scale * LOG2E if KIND[4] else 1.0
    return slope, c


@triton.jit
def keep_mask(dropout, b, h, o_row, o_col):
    """Which probabilities dropout keeps; the bits of `dropout.keep_mask`."""
    p_seed, last_dropped, _ = dropout
    seed = tl.load(p_seed)
    zero = (o_row + o_col) * 0
    counter = (zero + o_col // 4, zero + o_row, zero + h.to(tl.int32), zero + b.to(tl.int32))
    w0, w1, w2, w3 = tl.philox(seed, counter[0], counter[1], counter[2], counter[3])
    word = o_col % 4
    low = tl.where(word == 0, w0, w1)
    high = tl.where(word == 2, w2, w3)
    return tl.where(word < 2, low, high) > last_dropped.to(tl.uint32, bitcast=True)


@triton.jit
def finite(x):
    """Where x is neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_not_finite(x, m_row):
    """1 if x (ROWS, WIDTH) is not finite somewhere in the rows of m_row, else 0."""
    return tl.max(tl.max(tl.where(finite(x) | ~m_row[:, None], 0, 1), 1), 0)


@triton.jit
def position(pid, tiles, total, wave):
    """tile and head of a program, in an order that keeps a wave of heads in the L2 cache.

    All tiles of `wave` heads come before the next wave, and tile by tile within it.
    """
    first = pid // (tiles * wave) * wave
    size = tl.minimum(wave, total - first)
    rest = pid - first * tiles
    return rest // size, first + rest % size
