"""Registers the Triton kernels. They are imported when first one runs, for triton is optional."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import triton_runtime
from mmkernels._core.registry import register

MAX_HEAD_DIM = 256


def _resolved(inputs: tuple) -> tuple:
    """The inputs, lazily negated tensors carried out: a kernel reads the memory behind them."""
    return tuple(x.resolve_neg() if isinstance(x, Tensor) else x for x in inputs)


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The forward op; see `triton_forward.py`."""
    from mmkernels.attention import triton_forward

    return triton_forward.forward(*_resolved(inputs))


def backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward op; see `triton_backward.py`."""
    from mmkernels.attention import triton_backward

    return triton_backward.backward(*_resolved(inputs))


def decode(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The decode op; see `triton_decode.py`."""
    from mmkernels.attention import triton_decode

    return triton_decode.decode(*_resolved(inputs))


def declines(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot serve q (.., D) and v (.., Dv), or None."""
    if (reason := triton_runtime.why_not(q)) is not None:
        return reason
    if q.dtype == torch.float64:
        return "q is float64; the Triton kernels compute in float32"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"a head dim is {max(q.shape[-1], v.shape[-1])}; the Triton kernels go to 256"
    return None


def forward_why_not(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    """Also for decode, whose first arguments are the same."""
    return declines(q, v)


def backward_why_not(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> str | None:
    """The backward pass declines what the forward pass does."""
    return declines(q, v)


def forward_only_by_name(q: Tensor, *_: object) -> str | None:
    """Why `auto` passes over the forward pass and decode."""
    return triton_runtime.only_by_name(q)


def backward_only_by_name(dout: object, dlse: object, q: Tensor, *_: object) -> str | None:
    """Why `auto` passes over the backward pass."""
    return triton_runtime.only_by_name(q)


register("attention_forward", "triton", forward, forward_why_not, forward_only_by_name)
register("attention_backward", "triton", backward, backward_why_not, backward_only_by_name)
register("attention_decode", "triton", decode, forward_why_not, forward_only_by_name)
