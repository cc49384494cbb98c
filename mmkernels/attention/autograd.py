"""Gradients of attention, for any pair of forward and backward backends.

The two share only (out, lse), so either pass picks its backend by itself.
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import ops
from mmkernels._core.first_order import first_order


def attend(*inputs: Any) -> tuple[Tensor, Tensor]:
    """out, lse; differentiable in q, k, v, bias and sinks, through out and lse.

    Args:
        *inputs: q, k, v, start, end, row_start, row_end, bias, alibi_slopes, sinks, seed,
            softmax_scale, softcap, dropout_p, deterministic, backend; see `_core/ops.py`.
    """
    if torch._C._are_functorch_transforms_active():
        return _TransformableAttention.apply(*inputs)
    return _Attention.apply(*inputs)


class _Attention(torch.autograd.Function):
    """With `ctx` in forward: torch 2.14 spends 100 µs more on a class with `setup_context`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward_op(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse, start, end, row_start, row_end, bias, *rest = ctx.saved_tensors
        softmax_scale, softcap, dropout_p, deterministic, backend = ctx.numbers
        bias_grad, sinks_grad = ctx.needs_input_grad[7], ctx.needs_input_grad[9]
        # Gradients of the gradients are wanted (create_graph=True) only if grad mode is on here.
        run = _FirstOrder.apply if torch.is_grad_enabled() else _backward_op
        dq, dk, dv, dbias, dsinks = run(
            torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse,
            start, end, row_start, row_end, bias, *rest,
            softmax_scale, softcap, dropout_p, bias_grad, deterministic, backend,
        )  # fmt: skip
        return (
            dq, dk, dv, None, None, None, None, dbias if bias_grad else None, None,
            dsinks if sinks_grad else None, None, None, None, None, None, None,
        )  # fmt: skip


class _TransformableAttention(_Attention):
    """In the form that `torch.func` needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)


def _forward_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, k, v, start, end, _, _, bias, alibi_slopes, sinks, seed, *numbers, _, backend = inputs
    return ops.call(
        "attention_forward", q, k, v, start, end, bias, alibi_slopes, sinks, seed, *numbers, backend
    )


def _backward_op(*inputs: Any) -> tuple[Tensor, ...]:
    return ops.call("attention_backward", *inputs)


_FirstOrder = first_order("attention", _backward_op)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:11])
    ctx.numbers = inputs[11:]
