"""Gradients of the patch embedding, for any pair of forward and backward backends.

Saved for the backward pass are the pixels as they came: bytes stay bytes.
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core import ops
from mmkernels._core.first_order import first_order
from mmkernels.patch_embed.call import Call

# Position of each differentiable argument among `embed`'s: weight, bias, pos_embed, prefix,
# mask_token.
_DIFFERENTIABLE = (0, 1, 2, 4, 6)


def embed(call: Call, backend: str) -> Tensor:
    """out (rows, D); differentiable in pixels, weight, bias, pos_embed, prefix, mask_token."""
    pixels, *others = call
    apply = (
        _TransformablePatchEmbed.apply
        if torch._C._are_functorch_transforms_active()
        else _PatchEmbed.apply
    )
    return apply(*others, backend, *pixels)


def _inputs(arguments: tuple) -> tuple:
    others, backend, pixels = arguments[:14], arguments[14], arguments[15:]
    return list(pixels), *others, backend


class _PatchEmbed(torch.autograd.Function):
    """With `ctx` in forward: torch 2.14 spends 100 µs more on a class with `setup_context`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _save(ctx, tuple(map(_stand_in, range(len(arguments)), arguments)))
        return ops.call("patch_embed_forward", *_inputs(arguments))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [any(needs[15:]), *(needs[index] for index in _DIFFERENTIABLE)]
        arguments = (*saved[:7], *ctx.numbers, *saved[7:])
        run = _FirstOrder.apply if torch.is_grad_enabled() else _backward_op
        grads = list(run(dout, wanted, *arguments))
        found: list[Tensor | None] = [None] * len(arguments)
        for index, want in zip(_DIFFERENTIABLE, wanted[1:], strict=True):
            grad = grads.pop(0)
            found[index] = grad if want else None
        for index, need in enumerate(needs[15:], 15):
            found[index] = grads[index - 15] if need else None
        return tuple(found)


class _TransformablePatchEmbed(_PatchEmbed):
    """In the form that `torch.func` needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return ops.call("patch_embed_forward", *_inputs(arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _save(ctx, inputs)


def _backward_op(dout: Tensor, wanted: list[bool], *arguments: Any) -> tuple:
    """dweight, dbias, dpos_embed, dprefix, dmask_token, then dpixels."""
    *inputs, backend = _inputs(arguments)
    dpixels, *others = ops.call("patch_embed_backward", dout, *inputs, wanted, backend)
    return *others, *dpixels


_FirstOrder = first_order("patch_embed", _backward_op)


def _stand_in(index: int, x: Any) -> Any:
    """For an argument of which the backward pass needs no value: a tensor of its kind and shape.

    So bias, positions, prefix and mask token may change between the passes, as in eager torch.
    """
    if index in _DIFFERENTIABLE[1:] and x is not None:
        return x.detach().new_empty(()).expand(x.shape)
    return x


def _save(ctx: Any, arguments: tuple) -> None:
    ctx.save_for_backward(*arguments[:7], *arguments[15:])
    ctx.numbers = arguments[7:15]
