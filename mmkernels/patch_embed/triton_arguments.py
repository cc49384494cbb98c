"""The host's side of the Triton patch embedding kernels: their parameters from a call."""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmkernels._core.triton_runtime import Gpu
from mmkernels.patch_embed.call import Call, Item, constants, prefix_count, raw_scale

MAX_STEP = 64  # values of a patch in one step of the product
MIN_STEP = 16  # the least that tensor cores take


class Layout(NamedTuple):
    """How the values of a patch are counted; see `triton_tiles.py`.

    Attributes:
        WIDTH: values of one chunk, a power of two.
        CHUNKS: chunks of one row of KW values.
        BLOCK_ROWS: rows in one step of the product, a power of two that divides KH.
    """

    WIDTH: int
    CHUNKS: int
    BLOCK_ROWS: int


def layout(kernel: torch.Size) -> Layout:
    """The layout of a weight (D, C, KT, KH, KW)."""
    height, width = kernel[3:]
    rows = height & -height  # the largest power of two that divides it
    if width > MAX_STEP:
        # Half as long a step where a whole one would be filled up by more than 15 %.
        filled = triton.cdiv(width, MAX_STEP) * MAX_STEP
        step = MAX_STEP if filled <= 1.15 * width else MAX_STEP // 2
        return Layout(step, triton.cdiv(width, step), 1)
    chunk = max(triton.next_power_of_2(width), triton.cdiv(MIN_STEP, rows))
    return Layout(chunk, 1, min(rows, MAX_STEP // chunk))


def padded_weight(weight: Tensor, layout: Layout) -> Tensor:
    """weight (D, C, KT, KH, KW) as (D, K), every row of KW values filled up with zeros."""
    missing = layout.CHUNKS * layout.WIDTH - weight.shape[4]
    return (F.pad(weight, (0, missing)) if missing else weight.contiguous()).flatten(1)


def weight_pointer(gpu: Gpu, weight: Tensor, block_n: int, block_k: int) -> tuple[Any, bool]:
    """A tensor descriptor of weight (D, K) for tiles of that size where one can be, and if so.

    It needs 16 bit, an aligned start and aligned rows. float32 tiles go through registers anyway.
    """
    size = weight.element_size()
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * size % 16 == 0
    if not gpu.tma or size != 2 or not aligned:
        return weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, strides = list(weight.shape), list(weight.stride())
    return TensorDescriptor(weight, shape, strides, [block_n, block_k]), True


def narrowed(item: Item) -> Item:
    """The item with pixels of no more than 32 bit: tiles of wider ones would not fit."""
    wide = item.pixels.dtype == torch.float64
    return item._replace(pixels=item.pixels.float()) if wide else item


def pixel_arguments(call: Call, item: Item) -> dict[str, Any]:
    """Where the pixels of an item lie and how they are cut into patches."""
    x, kernel = item.pixels, call.weight.shape[2:]
    names = ("stride_xb", "stride_xc", "stride_xt", "stride_xh", "stride_xw")
    return {
        "p_x": x,
        **dict(zip(names, x.stride(), strict=True)),
        **dict(zip(("grid_t", "grid_h", "grid_w"), item.grid, strict=True)),
        **dict(zip(("size_t", "size_h", "size_w"), x.shape[2:], strict=True)),
        **dict(zip(("C", "KT", "KH", "KW"), call.weight.shape[1:], strict=True)),
        **dict(zip(("ST", "SH", "SW"), call.stride, strict=True)),
        "PAD": any(
            (n - 1) * s + k > size
            for n, s, k, size in zip(item.grid, call.stride, kernel, x.shape[2:], strict=True)
        ),
    }


def alignment(call: Call, item: Item) -> int:
    """The largest power of two, at most 16, that divides the way from any patch to another."""
    steps = (1, *call.stride)
    strides = (item.pixels.stride(0), *item.pixels.stride()[2:])
    counts = (item.batch, *item.grid)
    ways = (s * n for s, n, count in zip(steps, strides, counts, strict=True) if count > 1)
    return math.gcd(16, *ways)


def last_dense(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_arguments(call: Call, item: Item) -> dict[str, Any]:
    """A sample's rows, and which of them are masked."""
    mask = call.token_mask
    return {
        "sample_rows": item.rows,
        "prefix": prefix_count(call),
        "p_mask": None if mask is None else mask.contiguous(),
        "mask_first": item.first_token if call.mask_per_sample else 0,
        "mask_stride": item.tokens if call.mask_per_sample else 0,
        "MASK": mask is not None,
    }


def tail_arguments(call: Call, item: Item) -> dict[str, Any]:
    """Positions, prefix and token mask of an item's rows."""
    pos, prefix = call.pos_embed, call.prefix
    first, size = item.first_token, item.tokens
    if call.pos_prefix:
        first, size = item.first_row, item.rows
    pos = None if pos is None else last_dense(pos)
    prefix = None if prefix is None else last_dense(prefix)
    return {
        **row_arguments(call, item),
        "total": item.batch * item.rows,
        "p_pos": pos,
        "stride_pos": 0 if pos is None else pos.stride(0),
        "table_rows": 0 if pos is None else len(pos),
        "p_index": None if call.pos_index is None else call.pos_index.contiguous(),
        "pos_first": first if call.pos_per_sample else 0,
        "pos_stride": size if call.pos_per_sample else 0,
        "p_prefix": prefix,
        "stride_prefix_b": 0 if prefix is None or len(prefix) == 1 else prefix.stride(0),
        "stride_prefix_p": 0 if prefix is None else prefix.stride(1),
        "p_mask_token": None if call.mask_token is None else call.mask_token.contiguous(),
        "POS": pos is not None,
        "INDEX": call.pos_index is not None,
        "POS_PREFIX": call.pos_prefix,
        "PREFIX": prefix is not None,
    }


def scales(call: Call) -> list[float]:
    """What the pixels of each channel are multiplied by."""
    factor = raw_scale(call.pixels[0].dtype)
    return [factor / std for std in call.pixel_std] or [factor] * call.weight.shape[1]


def is_raw(call: Call) -> bool:
    """Whether bytes enter the product as they are, and what they mean is applied after it.

    16-bit floats hold them exactly, and would round what is made of them. float32 hardly rounds
    either, and without the mean its sums are smaller.
    """
    exact = call.weight.dtype != torch.float32 or not any(call.pixel_mean)
    return call.pixels[0].dtype == torch.uint8 and exact


def scale_arguments(call: Call) -> dict[str, Any]:
    """The factors of pixels, or of the sums that they make, channel by channel.

    SCALED: by `p_scale` the sums are multiplied after each of PARTS runs of channels; with several
    the factors of all but the last are ratios to the next channel's.
    NORMALIZED: pixels become p_scale[c] * pixels + p_shift[c].
    """
    factors, device = scales(call), call.weight.device
    scaled, normalized, parts, scale, shift = False, False, 1, None, None
    if is_raw(call):
        scaled = True
        if len(set(factors)) > 1:
            parts = len(factors)
            factors = [a / b for a, b in itertools.pairwise(factors)] + factors[-1:]
        scale = constants(factors[-parts:], device)
    elif call.pixel_mean:
        normalized, parts = True, len(factors)
        scale = constants(factors, device)
        shift = -shifts(call)
    return {
        "p_scale": scale,
        "p_shift": shift,
        "SCALED": scaled,
        "NORMALIZED": normalized,
        "PARTS": parts,
    }


def shifts(call: Call) -> Tensor:
    """(C,) mean / std: what is subtracted from scaled pixels."""
    ratios = [m / s for m, s in zip(call.pixel_mean, call.pixel_std, strict=True)]
    return constants(ratios, call.weight.device)


def bias_arguments(call: Call, item: Item, pad: bool) -> dict[str, Any]:
    """The bias, less what the mean of the channels contributes to a product of raw pixels.

    Where patches reach beyond the image, EDGES, the mean counts inside of it only: the bias is then
    (8, D), by whether the patch is the last along t (4), y (2) and x (1).
    """
    bias, weight = call.bias, call.weight
    edges = False
    if is_raw(call) and any(call.pixel_mean):
        edges = pad
        valid = last_extents(call, item) if edges else [weight.shape[2:]]
        sums = [weight[:, :, :t, :h, :w].float().sum((2, 3, 4)) @ shifts(call) for t, h, w in valid]
        folded = (0.0 if bias is None else bias.float()) - torch.stack(sums)
        bias = folded if edges else folded[0]
    return {
        "p_bias": bias,
        "stride_bias": 0 if bias is None else bias.stride(-1),
        "BIAS": bias is not None,
        "EDGES": edges,
    }


def mean_gradient(call: Call, item: Item, sums: Tensor) -> Tensor:
    """What `shifts` contribute to the weight's gradient; broadcasts to it, float32.

    sums: (rows of a sample, D), of dout over the samples, without masked tokens. The mean counts
    inside the image only.
    """
    made = sums[prefix_count(call) :].unflatten(0, item.grid)  # (t, h, w, D)
    extents = last_extents(call, item)
    for axis, (kernel, valid) in enumerate(zip(extents[0], extents[-1], strict=True)):
        whole = made.sum(axis, keepdim=True)
        if valid < kernel:  # the last patch holds the first values alone
            inner = made.narrow(axis, 0, made.shape[axis] - 1).sum(axis, keepdim=True)
            copies = (valid, kernel - valid)
            parts = zip((whole, inner), copies, strict=True)
            whole = torch.cat([x.repeat_interleave(n, axis) for x, n in parts], axis)
        made = whole
    return made.movedim(-1, 0)[:, None] * shifts(call).view(1, -1, 1, 1, 1)


def last_extents(call: Call, item: Item) -> list[tuple[int, ...]]:
    """How much of a patch lies in the image, (t, h, w), by the 8 edges of `bias_arguments`."""
    kernel, sizes = call.weight.shape[2:], item.pixels.shape[2:]
    last = [
        min(k, size - (n - 1) * s)
        for n, s, k, size in zip(item.grid, call.stride, kernel, sizes, strict=True)
    ]
    pairs = [(k, least) for k, least in zip(kernel, last, strict=True)]
    return list(itertools.product(*pairs))
