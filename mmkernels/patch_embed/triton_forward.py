"""The patch embedding's forward pass in Triton: pixels to finished tokens in one kernel.

A program makes BLOCK_M rows of out, prefix tokens among them, and BLOCK_N of their values:

    acc[m, n] = sum over k of pixels[patch m, k] weight[n, k]
    out[m, n] = cast(scale acc + bias[n] + pos[m, n]), or the mask token or prefix in place of acc

The place of a row's patch is found once; in the loop over k only scalars advance, without a
division. Bytes enter the product as they are, which 16-bit floats hold exactly; with one std for
all channels their scale is applied at the end, with several the accumulator is rescaled where the
channel changes. What mean contributes is in the bias, computed in float32.

Layout: pixels (B, C, T, H, W) in any strides; weight (D, K) contiguous, its rows as
`triton_tiles.py` says; out (rows, D) contiguous.

Source: the matrix product is that of Triton's tutorial, blocked for shared memory; Dosovitskiy et
al., "An Image is Worth 16x16 Words", ICLR 2021, for the operation.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core.triton_runtime import gpu_of, input_precision, launch
from mmkernels.patch_embed import triton_arguments as arguments
from mmkernels.patch_embed import triton_config as configs
from mmkernels.patch_embed.call import Call, items, row_count
from mmkernels.patch_embed.triton_tiles import inside, normalize, patch_offset, patch_position


@triton.jit
def _product(
    acc, x, row, weight, scaling, size,
    SHAPE: tl.constexpr, STEP: tl.constexpr, LAYOUT: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_M, BLOCK_N) + patches times weight."""
    KT: tl.constexpr = SHAPE[1]
    KH: tl.constexpr = SHAPE[2]
    KW: tl.constexpr = SHAPE[3]
    WIDTH: tl.constexpr = LAYOUT[0]
    CHUNKS: tl.constexpr = LAYOUT[1]
    BLOCK_ROWS: tl.constexpr = HOW[0]
    SCALED: tl.constexpr = HOW[1]
    NORMALIZED: tl.constexpr = HOW[2]
    PARTS: tl.constexpr = HOW[3]
    PAD: tl.constexpr = HOW[4]
    PRECISION: tl.constexpr = HOW[5]
    TMA: tl.constexpr = HOW[6]
    BLOCK_K: tl.constexpr = BLOCK_ROWS * WIDTH
    STEPS: tl.constexpr = SHAPE[0] * KT * (KH // BLOCK_ROWS) * CHUNKS // PARTS
    p_x, _, stride_c, stride_t, stride_h, stride_w = x
    o_patch, m_patch, t, y, x_pos = row
    p_weight, n0, o_n, m_n, K = weight
    p_scale, p_shift = scaling
    o_k = tl.arange(0, BLOCK_K)
    k_h = o_k // WIDTH
    k_w = o_k % WIDTH
    o_value = k_h.to(tl.int64) * stride_h + k_w.to(tl.int64) * stride_w
    p_rows = p_x + o_patch[:, None] + o_value[None, :]
    k0 = 0
    c = n0 * 0  # a tensor from the start, which can be widened
    k_t = c
    first_h = c
    chunk = c
    for part in tl.range(0, PARTS):
        scale = tl.load(p_scale + part) if SCALED or NORMALIZED else 1.0
        shift = tl.load(p_shift + part) if NORMALIZED else 0.0
        for _ in tl.range(0, STEPS):
            o_step = c.to(tl.int64) * stride_c + k_t.to(tl.int64) * stride_t
            o_step += first_h.to(tl.int64) * stride_h + chunk.to(tl.int64) * (WIDTH * stride_w)
            mask = m_patch[:, None]
            if KW % WIDTH != 0:
                mask = mask & (chunk * WIDTH + k_w < KW)[None, :]
            if PAD:
                mask = mask & inside(t[:, None], y[:, None], x_pos[:, None], k_t,
                                     (first_h + k_h)[None, :], (chunk * WIDTH + k_w)[None, :],
                                     size, STEP)  # fmt: skip
            pixels = tl.load(p_rows + o_step, mask=mask, other=0)
            if TMA:
                tile = tl.trans(p_weight.load([n0, k0]))
            else:
                # As (k, n) from the start: in one order with the pixels, Triton would load both in
                # the same widths, and pixels may go in narrower ones.
                p_tile = p_weight + (o_n.to(tl.int64) * K)[None, :] + (k0 + o_k)[:, None]
                tile = tl.load(p_tile, mask=m_n[None, :], other=0.0)
            if NORMALIZED:
                pixels = normalize(pixels, mask, scale, shift)
            acc = tl.dot(pixels.to(tile.dtype), tile, acc, input_precision=PRECISION)
            k0 += BLOCK_K
            # To the next rows: chunk by chunk, then down, then through t and c.
            if CHUNKS > 1:
                chunk += 1
                carry = chunk == CHUNKS
                chunk = tl.where(carry, 0, chunk)
                first_h += tl.where(carry, BLOCK_ROWS, 0)
            else:
                first_h += BLOCK_ROWS
            carry = first_h == KH
            first_h = tl.where(carry, 0, first_h)
            if KT > 1:
                k_t += tl.where(carry, 1, 0)
                carry = k_t == KT
                k_t = tl.where(carry, 0, k_t)
            c += tl.where(carry, 1, 0)
        if SCALED:
            acc *= scale
    return acc


@triton.jit
def _finish(
    acc, p_out, rows, bias, positions, prefixes, masks, n0,
    BLOCK_N: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Bias, mask token, prefix and position to acc (BLOCK_M, BLOCK_N), and that to out."""
    BIAS: tl.constexpr = KIND[0]
    EDGES: tl.constexpr = KIND[1]
    POS: tl.constexpr = KIND[2]
    INDEX: tl.constexpr = KIND[3]
    POS_PREFIX: tl.constexpr = KIND[4]
    PREFIX: tl.constexpr = KIND[5]
    MASK: tl.constexpr = KIND[6]
    o_row, b, place, token, edge, m_row, m_patch = rows
    o_n = n0 + tl.arange(0, BLOCK_N)
    m_n = o_n < D
    p_bias, stride_bias = bias
    if EDGES:
        p_edge = p_bias + edge[:, None] * D + o_n[None, :]
        acc += tl.load(p_edge, mask=m_n[None, :], other=0.0)
    elif BIAS:
        acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if MASK:
        p_mask, mask_first, mask_stride, p_mask_token = masks
        p_slot = p_mask + (mask_first + b * mask_stride + token)
        m_masked = tl.load(p_slot, mask=m_patch, other=0) != 0
        mask_token = tl.load(p_mask_token + o_n, mask=m_n, other=0.0).to(tl.float32)
        acc = tl.where(m_masked[:, None], mask_token[None, :], acc)
    if PREFIX:
        p_prefix, stride_b, stride_p = prefixes
        m_prefix = m_row & ~m_patch
        p_row = p_prefix + b * stride_b + place * stride_p
        m_first = m_prefix[:, None] & m_n[None, :]
        first = tl.load(p_row[:, None] + o_n[None, :], mask=m_first, other=0.0)
        acc = tl.where(m_prefix[:, None], first.to(tl.float32), acc)
    if POS:
        p_pos, stride_pos, p_index, pos_first, pos_stride, table_rows = positions
        m_pos = m_row if POS_PREFIX else m_patch
        slot = pos_first + b * pos_stride + (place if POS_PREFIX else token)
        if INDEX:
            slot = tl.load(p_index + slot, mask=m_pos, other=0).to(tl.int64)
            slot = tl.minimum(tl.maximum(slot, 0), table_rows - 1)
        p_slots = p_pos + slot[:, None] * stride_pos + o_n[None, :]
        pos = tl.load(p_slots, mask=m_pos[:, None] & m_n[None, :], other=0.0)
        acc += pos.to(tl.float32)
    p_tile = p_out + o_row.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


# Sizes are not worth a compilation each.
@triton.jit(do_not_specialize=["total", "sample_rows", "prefix", "grid_t", "grid_h", "grid_w", "size_t", "size_h", "size_w", "pos_first", "pos_stride", "table_rows", "mask_first", "mask_stride"])  # fmt: skip # noqa: E501
def forward_kernel(
    p_x, p_weight, p_bias, p_pos, p_index, p_prefix, p_mask, p_mask_token, p_scale, p_shift, p_out,
    stride_xb, stride_xc, stride_xt, stride_xh, stride_xw, stride_bias, stride_pos,
    stride_prefix_b, stride_prefix_p,
    total, sample_rows, prefix, grid_t, grid_h, grid_w, size_t, size_h, size_w,
    pos_first, pos_stride, table_rows, mask_first, mask_stride,
    D: tl.constexpr, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, EDGES: tl.constexpr, POS: tl.constexpr, INDEX: tl.constexpr,
    POS_PREFIX: tl.constexpr, PREFIX: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
    NORMALIZED: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Tiles of out, BLOCK_M rows by BLOCK_N values, of one tensor of pixels.

    total: rows of all samples. sample_rows: of one, prefix tokens included.
    pos_first, pos_stride: slot of the first sample's first position, slots from sample to sample.
    mask_first, mask_stride: the same of token_mask.
    """
    SHAPE: tl.constexpr = (C, KT, KH, KW)
    STEP: tl.constexpr = (ST, SH, SW)
    LAYOUT: tl.constexpr = (WIDTH, CHUNKS)
    HOW: tl.constexpr = (BLOCK_ROWS, SCALED, NORMALIZED, PARTS, PAD, PRECISION, TMA)
    KIND: tl.constexpr = (BIAS, EDGES, POS, INDEX, POS_PREFIX, PREFIX, MASK)
    TILES_N: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    K: tl.constexpr = C * KT * KH * CHUNKS * WIDTH
    x = (p_x, stride_xb, stride_xc, stride_xt, stride_xh, stride_xw)
    grid = (grid_t, grid_h, grid_w)
    size = (size_t, size_h, size_w)
    bias = (p_bias, stride_bias)
    positions = (p_pos, stride_pos, p_index, pos_first, pos_stride, table_rows)
    prefixes = (p_prefix, stride_prefix_b, stride_prefix_p)
    masks = (p_mask, mask_first, mask_stride, p_mask_token)
    for tile in tl.range(tl.program_id(0), tl.cdiv(total, BLOCK_M) * TILES_N, tl.num_programs(0)):
        # What shares pixels runs side by side.
        o_row = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
        n0 = tile % TILES_N * BLOCK_N
        o_n = n0 + tl.arange(0, BLOCK_N)
        m_row = o_row < total
        b = (o_row // sample_rows).to(tl.int64)
        place = o_row % sample_rows
        token = tl.maximum(place - prefix, 0)
        m_patch = m_row & (place >= prefix)
        t, y, x_pos = patch_position(token, grid)
        o_patch = patch_offset(x, b, t, y, x_pos, STEP)
        edge = tl.where(t == grid_t - 1, 4, 0) + tl.where(y == grid_h - 1, 2, 0)
        edge += tl.where(x_pos == grid_w - 1, 1, 0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = _product(
            acc, x, (o_patch, m_patch, t, y, x_pos), (p_weight, n0, o_n, o_n < D, K),
            (p_scale, p_shift), size, SHAPE, STEP, LAYOUT, HOW,
        )  # fmt: skip
        rows = (o_row, b, place, token, edge, m_row, m_patch)
        if BLOCK_N > 128:  # half by half: positions and prefix of a whole tile would not fit
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = acc.reshape([BLOCK_M, 2, HALF]).permute([0, 2, 1]).split()
            _finish(left, p_out, rows, bias, positions, prefixes, masks, n0, HALF, D, KIND)
            _finish(right, p_out, rows, bias, positions, prefixes, masks, n0 + HALF, HALF, D, KIND)
        else:
            _finish(acc, p_out, rows, bias, positions, prefixes, masks, n0, BLOCK_N, D, KIND)


def forward(*inputs: Any) -> Tensor:
    """out (rows, D) in the weight's dtype; see `_core/ops.py`."""
    call = Call(*inputs)
    out = call.weight.new_empty(row_count(call), len(call.weight))
    layout = arguments.layout(call.weight.shape)
    weight = arguments.padded_weight(call.weight, layout)
    scaling = arguments.scale_arguments(call)
    for item in map(arguments.narrowed, items(call)):
        rows, dim, gpu = item.batch * item.rows, len(weight), gpu_of(out)
        if rows == 0:
            continue
        step = layout.WIDTH * layout.BLOCK_ROWS
        problem = configs.Problem("patch_forward", step, item.pixels.dtype, weight.dtype)
        config = configs.forward(problem, rows, dim, gpu)
        tiles = configs.tile_count(config, rows, dim)
        slots = gpu.processors * configs.row(weight.dtype, gpu).resident
        pixels = arguments.pixel_arguments(call, item)
        p_weight, tma = arguments.weight_pointer(gpu, weight, config.BLOCK_N, step)
        launch(
            forward_kernel, (min(tiles, slots),), **config._asdict(), **layout._asdict(), **pixels,
            **scaling, **arguments.bias_arguments(call, item, pixels["PAD"]),
            **arguments.tail_arguments(call, item), p_weight=p_weight,
            p_out=out[item.first_row : item.first_row + rows], D=dim,
            PRECISION=input_precision(weight.dtype), TMA=tma,
        )  # fmt: skip
    return out
