"""The patch embedding's backward pass in Triton: the weight's gradient, and sums over samples.

    dweight[n, k] = sum over patches m of dout[m, n] z[m, k]         z: normalised pixels
    sums[i, n]    = sum over samples of dout[b, i, n]                i: row of a sample

`weight_kernel` gathers patches from the pixels as the forward pass does, bytes as bytes. Its
programs share out the patches, and their parts are added in a fixed order. With s = 1 / (255 std)
for bytes, scale and mean are applied to the sum:

    dweight = s (sum of dout pixels) - (mean / std) (sum of dout)

`sums_kernel` reads dout once; the gradients of bias, positions, prefix and mask token are sums of
what it leaves, a batch smaller. Rows whose token was masked count for those of positions and mask
token alone. No atomics: equal calls give equal bits.

Layout: as in `triton_forward.py`; dout (rows, D) contiguous; dweight (D, K) float32, rows of KW
values filled up.

Source: the derivative of a linear map.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._core.triton_runtime import gpu_of, input_precision, launch
from mmkernels._core.tuning_choice import configuration
from mmkernels.patch_embed import gradients
from mmkernels.patch_embed import triton_arguments as arguments
from mmkernels.patch_embed import triton_config as configs
from mmkernels.patch_embed.call import Call, Item, constants, items
from mmkernels.patch_embed.triton_fit import BLOCK_P
from mmkernels.patch_embed.triton_tiles import inside, normalize, patch_offset, patch_position


@triton.jit(do_not_specialize=["patches", "share", "sample_rows", "prefix", "grid_t", "grid_h", "grid_w", "size_t", "size_h", "size_w", "mask_first", "mask_stride"])  # fmt: skip # noqa: E501
def weight_kernel(
    p_dout, p_x, p_mask, p_scale, p_shift, p_dweight,
    stride_xb, stride_xc, stride_xt, stride_xh, stride_xw,
    patches, share, sample_rows, prefix, grid_t, grid_h, grid_w, size_t, size_h, size_w,
    mask_first, mask_stride,
    D: tl.constexpr, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    MASK: tl.constexpr, NORMALIZED: tl.constexpr, PAD: tl.constexpr, VIDEO: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M values of a token by BLOCK_N of a patch, summed over `share` of the patches."""
    STEP: tl.constexpr = (ST, SH, SW)
    ROW: tl.constexpr = CHUNKS * WIDTH
    K: tl.constexpr = C * KT * KH * ROW
    TILES_M: tl.constexpr = (D + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    split = pid // (TILES_M * TILES_N)
    tile = pid % (TILES_M * TILES_N)
    o_d = tile % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tile // TILES_M * BLOCK_N + tl.arange(0, BLOCK_N)
    m_d = o_d < D
    k_w = o_k % ROW
    k_h = o_k // ROW % KH
    k_t = o_k // (ROW * KH) % KT
    c = o_k // (ROW * KH * KT)
    m_k = (k_w < KW) & (c < C)
    x = (p_x, stride_xb, stride_xc, stride_xt, stride_xh, stride_xw)
    size = (size_t, size_h, size_w)
    o_value = c.to(tl.int64) * stride_xc + k_t.to(tl.int64) * stride_xt
    o_value += k_h.to(tl.int64) * stride_xh + k_w.to(tl.int64) * stride_xw
    if NORMALIZED:
        scale = tl.load(p_scale + c, mask=m_k, other=0.0)[None, :]
        shift = tl.load(p_shift + c, mask=m_k, other=0.0)[None, :]

    first = split * share
    last = tl.minimum(first + share, patches)
    o_patch = first + tl.arange(0, BLOCK_P)
    tokens = grid_t * grid_h * grid_w
    b = o_patch // tokens
    token = o_patch % tokens
    t, y, x_pos = patch_position(token, (grid_t, grid_h, grid_w))
    # BLOCK_P patches further on, digit by digit: the loop adds and carries, and nothing else. A
    # carry goes from the end of a row, or an image, to the start of the next.
    step_b = BLOCK_P // tokens
    step_t = BLOCK_P % tokens // (grid_h * grid_w)
    step_y = BLOCK_P % (grid_h * grid_w) // grid_w
    step_x = BLOCK_P % grid_w
    # Counted in units of ALIGN, or the compiler would not see through the carries what divides all.
    wide = split.to(tl.int64) * 0  # a stride of 1 is a constexpr, which has no .to
    way_b = (wide + stride_xb) // ALIGN
    way_t = (wide + stride_xt) * ST // ALIGN
    way_y = (wide + stride_xh) * SH // ALIGN
    way_x = (wide + stride_xw) * SW // ALIGN
    o_pixel = patch_offset(x, b, t, y, x_pos, STEP) // ALIGN
    o_row = b.to(tl.int64) * sample_rows + prefix + token
    way = step_b * way_b + step_t * way_t + step_y * way_y + step_x * way_x
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m0 in tl.range(first, last, BLOCK_P):
        m_row = m0 + tl.arange(0, BLOCK_P) < last
        if MASK:  # a masked token knows nothing of its pixels
            sample = (m0 + tl.arange(0, BLOCK_P)) // tokens
            o_slot = sample.to(tl.int64) * (mask_stride - tokens) + m0 + tl.arange(0, BLOCK_P)
            masked = tl.load(p_mask + mask_first + o_slot, mask=m_row, other=1)
            m_row = m_row & (masked == 0)
        p_rows = p_dout + o_row[:, None] * D + o_d[None, :]
        dout = tl.load(p_rows, mask=m_row[:, None] & m_d[None, :], other=0.0)
        p_values = p_x + (o_pixel * ALIGN)[:, None] + o_value[None, :]
        m_value = m_row[:, None] & m_k[None, :]
        if PAD:
            m_value = m_value & inside(t[:, None], y[:, None], x_pos[:, None], k_t[None, :],
                                       k_h[None, :], k_w[None, :], size, STEP)  # fmt: skip
        pixels = tl.load(p_values, mask=m_value, other=0)
        if NORMALIZED:
            pixels = normalize(pixels, m_value, scale, shift)
        pixels = pixels.to(dout.dtype)
        acc = tl.dot(tl.trans(dout), pixels, acc, input_precision=PRECISION)
        o_pixel += way
        o_row += BLOCK_P + step_b * prefix
        x_pos += step_x
        carry = x_pos >= grid_w
        x_pos -= tl.where(carry, grid_w, 0)
        o_pixel += tl.where(carry, way_y - grid_w * way_x, 0)
        y += step_y + tl.where(carry, 1, 0)
        carry = y >= grid_h
        y -= tl.where(carry, grid_h, 0)
        o_pixel += tl.where(carry, (way_t if VIDEO else way_b) - grid_h * way_y, 0)
        if VIDEO:
            t += step_t + tl.where(carry, 1, 0)
            carry = t >= grid_t
            t -= tl.where(carry, grid_t, 0)
            o_pixel += tl.where(carry, way_b - grid_t * way_t, 0)
        o_row += tl.where(carry, prefix, 0)
    p_tile = p_dweight + (split.to(tl.int64) * D + o_d)[:, None] * K + o_k[None, :]
    tl.store(p_tile, acc, mask=m_d[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=["batch", "sample_rows", "prefix", "mask_first", "mask_stride"])
def sums_kernel(
    p_dout, p_mask, p_sums, p_masked, batch, sample_rows, prefix, mask_first, mask_stride,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Sums over the samples of BLOCK_M rows by BLOCK_N values, apart for rows that are masked.

    BLOCK_B samples are loaded at once, to have as much underway as hides the memory's latency.
    """
    TILES_N: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    o_b = tl.arange(0, BLOCK_B)
    o_row = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_row < sample_rows)[:, None] & (o_n < D)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * D + o_n[None, :]
    m_token = (o_row >= prefix) & (o_row < sample_rows)
    o_sample = o_b.to(tl.int64) * sample_rows * D
    p_samples = p_dout + o_sample[:, None, None] + o_tile[None, :, :]
    p_slots = p_mask
    if MASK:
        o_slot = mask_first + o_b.to(tl.int64)[:, None] * mask_stride + (o_row - prefix)[None, :]
        p_slots = p_mask + o_slot
    sums = tl.zeros([BLOCK_B, BLOCK_M, BLOCK_N], tl.float32)
    masked = sums
    for b0 in tl.range(0, batch, BLOCK_B):
        m_b = b0 + o_b < batch
        m_load = m_b[:, None, None] & m_tile[None, :, :]
        dout = tl.load(p_samples, mask=m_load, other=0.0).to(tl.float32)
        p_samples += sample_rows.to(tl.int64) * (BLOCK_B * D)
        if MASK:
            hit = tl.load(p_slots, mask=m_b[:, None] & m_token[None, :], other=0) != 0
            p_slots += BLOCK_B * mask_stride
            masked += tl.where(hit[:, :, None], dout, 0.0)
            sums += tl.where(hit[:, :, None], 0.0, dout)
        else:
            sums += dout
    tl.store(p_sums + o_tile, tl.sum(sums, 0), mask=m_tile)
    if MASK:
        tl.store(p_masked + o_tile, tl.sum(masked, 0), mask=m_tile)


MIN_STEPS = 4  # of a program's share
BLOCK_B = 8  # samples that `sums_kernel` loads at once


def backward(dout: Tensor, *inputs: Any) -> tuple:
    """The gradients that are wanted; see `_core/ops.py`."""
    *arguments_, wanted = inputs
    call = Call(*arguments_)
    dout = dout.contiguous()
    listed = [arguments.narrowed(item) for item in items(call) if item.batch * item.rows]
    mean = arguments.is_raw(call) and any(call.pixel_mean)
    sums = []
    if any(wanted[2:]) or (wanted[1] and mean):
        sums = [_sums(dout, call, item) for item in listed]
    dweight = None
    if wanted[1]:
        dweight = torch.zeros(call.weight.shape, dtype=torch.float32, device=dout.device)
        for item in listed:
            dweight += _weight_gradient(dout, call, item)
        if mean:
            for one in sums:
                dweight -= arguments.mean_gradient(call, one.item, one.kept)
    dpixels = gradients.pixel_gradients(dout, call) if wanted[0] else []
    return gradients.results(dout, call, wanted, dpixels, dweight, sums)


def _sums(dout: Tensor, call: Call, item: Item) -> gradients.Sums:
    dim, masks = len(call.weight), call.token_mask is not None
    kept = torch.empty((item.rows, dim), dtype=torch.float32, device=dout.device)
    masked = torch.empty_like(kept) if masks else None
    config = configs.SUMS
    launch(
        sums_kernel, (configs.tile_count(config, item.rows, dim),), **config._asdict(),
        BLOCK_B=min(BLOCK_B, triton.next_power_of_2(item.batch)),
        p_dout=dout[item.first_row : item.first_row + item.batch * item.rows],
        p_sums=kept, p_masked=masked, batch=item.batch, D=dim,
        **arguments.row_arguments(call, item),
    )  # fmt: skip
    return gradients.Sums(item, kept, masked)


def _weight_gradient(dout: Tensor, call: Call, item: Item) -> Tensor:
    """(D, C, KT, KH, KW) float32, of one tensor of pixels, the mean of raw ones left out."""
    dim, dtype, gpu = len(call.weight), call.weight.dtype, gpu_of(dout)
    layout = arguments.layout(call.weight.shape)
    width = layout.WIDTH * layout.CHUNKS
    columns = call.weight[0, ..., 0].numel() * width
    step = layout.WIDTH * layout.BLOCK_ROWS
    problem = configs.Problem("patch_weight", step, item.pixels.dtype, dtype)
    config = configuration(problem, gpu)
    tiles, patches = configs.tile_count(config, dim, columns), item.batch * item.tokens
    block_p = BLOCK_P[dtype.itemsize]
    splits = max(1, min(gpu.processors // tiles, patches // (MIN_STEPS * block_p)))
    share = triton.cdiv(triton.cdiv(patches, splits), block_p) * block_p
    parts = torch.empty((splits, dim, columns), dtype=torch.float32, device=dout.device)
    scaling = arguments.scale_arguments(call)
    launch(
        weight_kernel, (splits * tiles,), **config._asdict(), BLOCK_P=block_p, WIDTH=layout.WIDTH,
        CHUNKS=layout.CHUNKS, **arguments.pixel_arguments(call, item), patches=patches,
        share=share, D=dim, p_dweight=parts, VIDEO=item.grid[0] > 1,
        ALIGN=arguments.alignment(call, item), PRECISION=input_precision(dtype),
        p_dout=dout[item.first_row : item.first_row + item.batch * item.rows],
        **arguments.row_arguments(call, item),
        **{name: scaling[name] for name in ("p_scale", "p_shift", "NORMALIZED")},
    )  # fmt: skip
    dweight = (parts.sum(0) if splits > 1 else parts[0]).view(*call.weight.shape[:4], width)
    dweight = dweight[..., : call.weight.shape[4]]
    if not arguments.is_raw(call):
        return dweight
    return dweight * constants(arguments.scales(call), dout.device).view(1, -1, 1, 1, 1)
