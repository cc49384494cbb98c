"""Where patches lie in memory: what the Triton kernels of the patch embedding share.

A patch's values are counted in the order (c, t, h, w) of the weight, with every row of KW values
filled up to CHUNKS * WIDTH, WIDTH being a power of two: 14 becomes 16, so that a row begins where
the products' steps do and all masks along it are known when the kernel is compiled.

What belongs together travels as a tuple:

    x        (pointer, strides of B, C, T, H, W)
    SHAPE    (C, KT, KH, KW), of a patch
    STEP     (ST, SH, SW), from patch to patch
    grid     (grid_t, grid_h, grid_w): patches of a sample
    size     (size_t, size_h, size_w): pixels of a sample, read where PAD
    LAYOUT   (WIDTH, CHUNKS)
"""

import triton
import triton.language as tl


@triton.jit
def patch_position(token, grid):
    """t, y, x of a token in its sample's grid."""
    _, grid_h, grid_w = grid
    area = grid_h * grid_w
    rest = token % area
    return token // area, rest // grid_w, rest % grid_w


@triton.jit
def patch_offset(x, b, t, y, x_pos, STEP: tl.constexpr):
    """64-bit offset of a patch's first value."""
    _, stride_b, _, stride_t, stride_h, stride_w = x
    return (
        b.to(tl.int64) * stride_b
        + t.to(tl.int64) * (STEP[0] * stride_t)
        + y.to(tl.int64) * (STEP[1] * stride_h)
        + x_pos.to(tl.int64) * (STEP[2] * stride_w)
    )


@triton.jit
def inside(t, y, x_pos, k_t, k_h, k_w, size, STEP: tl.constexpr):
    """Whether a value of a patch lies in the image. All broadcast against each other."""
    size_t, size_h, size_w = size
    return (
        (t * STEP[0] + k_t < size_t)
        & (y * STEP[1] + k_h < size_h)
        & (x_pos * STEP[2] + k_w < size_w)
    )


@triton.jit
def normalize(x, mask, scale, shift):
    """scale x + shift in float32, 0 outside of mask."""
    return tl.where(mask, x.to(tl.float32) * scale + shift, 0.0)
