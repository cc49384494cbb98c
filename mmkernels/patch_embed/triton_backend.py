"""Registers the Triton kernels. They are imported when first one runs, for triton is optional."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import triton_runtime
from mmkernels._core.registry import register


def _resolved(x: Any) -> Any:
    """x, lazily negated tensors carried out: a kernel reads the memory behind them."""
    if isinstance(x, list):
        return [_resolved(one) for one in x]
    return x.resolve_neg() if isinstance(x, Tensor) else x


def forward(*inputs: Any) -> Tensor:
    """The forward op; see `triton_forward.py`."""
    from mmkernels.patch_embed import triton_forward

    return triton_forward.forward(*map(_resolved, inputs))


def backward(dout: Tensor, *inputs: Any) -> tuple:
    """The backward op; see `triton_backward.py`."""
    from mmkernels.patch_embed import triton_backward

    return triton_backward.backward(*map(_resolved, (dout, *inputs)))


def why_not(pixels: list[Tensor], weight: Tensor, *_: object) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if (reason := triton_runtime.why_not(weight, "weight")) is not None:
        return reason
    if weight.dtype == torch.float64:
        return "weight is float64; the Triton kernels compute in float32"
    return None


def backward_why_not(
    dout: Tensor | None, pixels: list[Tensor], weight: Tensor, *_: object
) -> str | None:
    """The backward pass declines what the forward pass does."""
    return why_not(pixels, weight)


def only_by_name(pixels: list[Tensor], weight: Tensor, *_: object) -> str | None:
    """Why `auto` passes over the forward pass."""
    return triton_runtime.only_by_name(weight)


def backward_only_by_name(
    dout: Tensor | None, pixels: list[Tensor], weight: Tensor, *_: object
) -> str | None:
    """Why `auto` passes over the backward pass."""
    return triton_runtime.only_by_name(weight)


register("patch_embed_forward", "triton", forward, why_not, only_by_name)
register("patch_embed_backward", "triton", backward, backward_why_not, backward_only_by_name)
