"""The host's side of the Triton attention kernels: their parameters from an op's arguments."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import Gpu
from mmkernels.attention.dropout import keep_threshold

# Share of the L2 cache that the keys and values of heads running side by side may take.
L2_SHARE = 0.6
NO_BIAS, FLOAT_BIAS, BOOL_BIAS = 0, 1, 2  # as in triton_tiles.py


def dense(x: Tensor | None) -> Tensor | None:
    """A tensor whose elements a kernel may count."""
    return None if x is None else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """stride_<name>b, s, h and d of a (B, S, H, D) tensor."""
    return {f"stride_{name}{dim}": stride for dim, stride in zip("bshd", x.stride(), strict=True)}


def expanded_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of x, 0 in dimensions of one element, which may be broadcast."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def mask_arguments(start: Tensor | None, end: Tensor | None) -> dict[str, Any]:
    """The pointers and strides of the bounds (1 or B, Sq)."""
    rows: tuple[int, ...] = (0, 0)
    ends: tuple[int, ...] = (0, 0)
    if start is not None and end is not None:
        rows, ends = expanded_strides(start), expanded_strides(end)
    return {
        "p_start": start,
        "p_end": end,
        "stride_start_b": rows[0],
        "stride_start_s": rows[1],
        "stride_end_b": ends[0],
        "stride_end_s": ends[1],
        "MASK": start is not None,
    }


def row_arguments(row_start: Tensor | None, row_end: Tensor | None) -> dict[str, Any]:
    """The pointers and strides of the transposed bounds (1 or B, Sk); None: look at all rows."""
    start: tuple[int, ...] = (0, 0)
    end: tuple[int, ...] = (0, 0)
    if row_start is not None and row_end is not None:
        start, end = expanded_strides(row_start), expanded_strides(row_end)
    return {
        "p_row_start": row_start,
        "p_row_end": row_end,
        "stride_row_start_b": start[0],
        "stride_row_start_s": start[1],
        "stride_row_end_b": end[0],
        "stride_row_end_s": end[1],
        "ROWS": row_start is not None,
    }


def bias_arguments(bias: Tensor | None) -> dict[str, Any]:
    """The pointer and strides of a bias that broadcasts to (B, Hq, Sq, Sk)."""
    b, h, s, k = (0, 0, 0, 0) if bias is None else expanded_strides(bias)
    kind = NO_BIAS if bias is None else BOOL_BIAS if bias.dtype == torch.bool else FLOAT_BIAS
    if bias is not None and bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    elif bias is not None and bias.dtype == torch.float64:
        bias = bias.to(torch.float32)
        b, h, s, k = expanded_strides(bias)
    return {
        "p_bias": bias,
        "stride_bias_b": b,
        "stride_bias_h": h,
        "stride_bias_s": s,
        "stride_bias_k": k,
        "BIAS": kind,
    }


def score_arguments(
    alibi_slopes: Tensor | None, bias: Tensor | None, softmax_scale: float, softcap: float
) -> dict[str, Any]:
    """What turns raw products into scores."""
    b, h = (0, 0)
    if alibi_slopes is not None:
        b, h = expanded_strides(torch.atleast_2d(alibi_slopes))
    # A scale that float32 has not, or flushes to 0, takes the way that scales before it hides.
    positive = softmax_scale >= torch.finfo(torch.float32).tiny
    plain = bias is None and alibi_slopes is None and softcap == 0.0 and positive
    return {
        "p_alibi": alibi_slopes,
        "stride_alibi_b": b,
        "stride_alibi_h": h,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "ALIBI": alibi_slopes is not None,
        "SOFTCAP": softcap > 0.0,
        "PLAIN": plain,
    }


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    """The seed, and the largest 32-bit word that drops, as the int32 of the same bits."""
    last_dropped = keep_threshold(dropout_p) - 1
    dropout = dropout_p > 0.0 and last_dropped >= 0
    if last_dropped >= 2**31:
        last_dropped -= 2**32
    return {
        "p_seed": seed if dropout else None,
        "last_dropped": last_dropped,
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 1.0,
        "DROPOUT": dropout,
    }


def width_arguments(head_dim: int, value_dim: int) -> dict[str, int]:
    """The head dims and the tiles that hold them."""
    (d1, d2), (v1, v2) = tuning.split_dim(head_dim), tuning.split_dim(value_dim)
    return {"D": head_dim, "DV": value_dim, "D1": d1, "D2": d2, "V1": v1, "V2": v2}


def size_arguments(q: Tensor, k: Tensor) -> dict[str, int]:
    """Lengths and heads."""
    return {
        "seqlen_q": q.shape[1],
        "seqlen_k": k.shape[1],
        "heads": q.shape[2],
        "groups": q.shape[2] // k.shape[2],
    }


def wave(gpu: Gpu, total: int, unit: int, *streamed: Tensor) -> int:
    """How many of `total` heads run side by side, so that what they stream stays in L2.

    Args:
        gpu: whose L2.
        total: all heads of all batch elements.
        unit: heads that share what is streamed.
        *streamed: (B, S, H, ..) tensors, of which every tile of a head reads all S rows.
    """
    size = sum(x.shape[1] * x.shape[3] * x.element_size() for x in streamed)
    return min(max(int(gpu.l2 * L2_SHARE) // max(size, 1), 1) * unit, total)


def eights(*tensors: Tensor) -> bool:
    """Are all strides but the last, which is 1, multiples of 8?"""
    return all(
        x.stride(3) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3]) for x in tensors
    )


def tma_pointers(gpu: Gpu, block: int, *tensors: Tensor) -> tuple[list[Any], bool]:
    """Tensor descriptors for tiles of `block` rows, if the GPU and all strides allow, and if so.

    They need 16 bit, an aligned start, aligned strides, a last stride of 1, and head dims that are
    one tile. Products of float32 read their tiles into registers, and spill with descriptors.
    Dimensions of one element come first, as (B, H, S, D): only then a tile stays in shared memory
    on its way to the product.
    """
    if not gpu.tma or not all(_describable(x) for x in tensors):
        return list(tensors), False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[3]])
        for x in (x.transpose(1, 2) for x in tensors)
    ], True


def _describable(x: Tensor) -> bool:
    size = x.element_size()
    return (
        size == 2
        and x.stride(3) == 1
        and tuning.split_dim(x.shape[3]) == (x.shape[3], 0)
        and x.data_ptr() % 16 == 0
        # A stride of 0 (an expanded tensor) is no stride that a descriptor can have.
        and all(0 < n * size < 2**40 and n * size % 16 == 0 for n in x.stride()[:3])
        and all(0 < n < 2**31 for n in x.shape)
    )
