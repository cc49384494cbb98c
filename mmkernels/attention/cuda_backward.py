"""Attention's backward pass on the CUDA kernels of `csrc/attention`, and Triton's behind it.

A call by name whose forward pass they serve gets its gradients in any case: what the backward
kernels cannot do, Triton's do.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mmkernels._core.registry import register
from mmkernels.attention import cuda, triton_backend

SUM_ROWS = 128  # of csrc/attention/backward.h


@functools.cache
def _built_why_not(dtype: torch.dtype, head_dim: int) -> str | None:
    if not torch.ops.mmkernels_cuda.attention_backward_built(head_dim, dtype == torch.bfloat16):
        return (
            f"the extension was built without backward kernels for {dtype} and head dim {head_dim}"
        )
    return None


def kernels_why_not(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    """Why the backward kernels cannot serve a call, or None; arguments as of `cuda.why_not`.

    dout, out and lse may have any strides.
    """
    reason = cuda.why_not(q, k, v, *rest)
    return _built_why_not(q.dtype, q.shape[3]) if reason is None else reason


def backward_why_not(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    row_start: Tensor | None,
    row_end: Tensor | None,
    *rest: Any,
) -> str | None:
    """Why neither the backward kernels nor Triton's can serve a call, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device.type}; the CUDA kernels run on NVIDIA GPUs"
    if kernels_why_not(q, k, v, start, end, *rest[:7]) is None:
        return None
    return triton_backend.declines(q, v)


def _copyable(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows can be copied 16 bytes at a time."""
    x = x.resolve_neg()
    return x if cuda.copyable(x) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def is_hopper(device: int | None) -> bool:
    """Has the GPU the compute capability for which the Hopper kernels are compiled?"""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _sums(q: Tensor) -> tuple[Tensor, Tensor]:
    """Where the Hopper kernels sum dq in whatever order, and mark tiles to make again."""
    batch, seqlen_q, heads, head_dim = q.shape
    tiles = (batch, heads, -(-seqlen_q // SUM_ROWS))
    padded = 80 if head_dim == 72 else head_dim
    dq_sum = torch.zeros((*tiles, SUM_ROWS * padded), dtype=torch.float32, device=q.device)
    return dq_sum, torch.empty(tiles, dtype=torch.int32, device=q.device)


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
    """dq, dk, dv like q, k and v, dbias and dsinks; see `_core/ops.py`."""
    scores = (bias, alibi_slopes, sinks, seed, softmax_scale, softcap, dropout_p)
    if kernels_why_not(q, k, v, start, end, *scores) is not None:
        return triton_backend.backward(
            dout, dlse, q, k, v, out, lse, start, end, row_start, row_end, *scores, bias_grad,
            deterministic,
        )  # fmt: skip
    q, k, v = (x.resolve_neg() for x in (q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    absent = q.new_empty(0)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), absent, absent.clone()
    dout, out, lse = _copyable(dout), _copyable(out), lse.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dlse = None if dlse is None else dlse.resolve_neg()
    torch.ops.mmkernels_cuda.attention_delta(dout, out, dlse, lse, delta)
    torch.ops.mmkernels_cuda.attention_backward(
        dout,
        q,
        k,
        v,
        lse,
        delta,
        start,
        end,
        row_start,
        row_end,
        dq,
        dk,
        dv,
        softmax_scale,
        softcap,
        *(() if deterministic or not is_hopper(q.device.index) else _sums(q)),
    )
    return dq, dk, dv, absent, absent.clone()


register("attention_backward", "cuda", backward, backward_why_not, cuda.only_by_name)
