"""Backward ops that end with an error for whoever differentiates them."""

from collections.abc import Callable
from typing import Any

import torch


def first_order(where: str, run: Callable[..., tuple]) -> type[torch.autograd.Function]:
    """`run` as a Function: its results carry a graph that says why there is no second derivative.

    Args:
        where: name of the public function, for the message.
        run: the backward op.
    """

    class FirstOrder(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            raise RuntimeError(
                f"{where}: a second derivative was asked for, and this backend's backward pass has "
                "none; use backend='reference', which is plain torch under autograd"
            )

    return FirstOrder
