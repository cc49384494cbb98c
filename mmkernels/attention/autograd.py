"""Gradients of attention, for any pair of forward and backward backends.

The two share only (out, lse), so either pass picks its backend by itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from mmkernels._core import ops


class Attention(torch.autograd.Function):
    """out, lse = attention; differentiable in q, k, v, bias and sinks, through out and lse."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        deterministic: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Runs the forward op; arguments as in `_core/ops.py`."""
        return ops.attention_forward(
            q, k, v, start, end, bias, alibi_slopes, sinks, seed,
            softmax_scale, softcap, dropout_p, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keeps what the backward pass reads."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:11])
        ctx.numbers = inputs[11:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        """Runs the backward op."""
        q, k, v, out, lse, start, end, row_start, row_end, bias, *rest = ctx.saved_tensors
        softmax_scale, softcap, dropout_p, deterministic, backend = ctx.numbers
        bias_grad = ctx.needs_input_grad[7]
        # Gradients of the gradients are wanted (create_graph=True) only if grad mode is on here.
        run = _FirstOrder.apply if torch.is_grad_enabled() else ops.attention_backward
        dq, dk, dv, dbias, dsinks = run(
            torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse,
            start, end, row_start, row_end, bias, *rest,
            softmax_scale, softcap, dropout_p, bias_grad, deterministic, backend,
        )  # fmt: skip
        return (
            dq, dk, dv, None, None, None, None, dbias if bias_grad else None,
            None, dsinks if ctx.needs_input_grad[9] else None, *[None] * 6,
        )  # fmt: skip


class _FirstOrder(torch.autograd.Function):
    """The backward op, with an error for whoever differentiates it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return ops.attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple:
        raise RuntimeError(
            "attention: a second derivative was asked for, and this backend's backward pass has none; "
            "use backend='reference', which is plain torch under autograd"
        )
