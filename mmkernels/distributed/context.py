"""An existing model on sequences that are spread over processes.

    with context_parallel(model, mesh, layout):
        hidden = model(layout.shard(x, rank))
        loss(hidden, layout.shard(targets, rank)).backward()

Everything but attention treats each position by itself, so it runs on a shard as it is. Attention
is what mmkernels serves, and what is exchanged here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mmkernels._core import spread
from mmkernels.attention.interval import IntervalMask
from mmkernels.distributed.attention import all_to_all_attention, ring_attention
from mmkernels.distributed.layout import Layout
from mmkernels.distributed.transfer import check_mesh

METHODS = {"ring": ring_attention, "all_to_all": all_to_all_attention}


class context_parallel:
    """Makes a model's attention that of the whole sequence, from this process's part of it.

    Within the block, calls of `mmkernels.attention` and `scaled_dot_product_attention` that are
    made inside of `model` get this process's rows and the mask of the whole sequence: an
    `IntervalMask` of (1 or B, S) rows, causal and window_size in positions of the whole sequence.
    The backward pass, with what is checkpointed, has to be in the block, too. Of a model with
    towers give the part that sees the sequence, e.g. its decoder.

    What else depends on a position is the caller's: shard the positions with `layout.shard`, give
    them to the model, and let the loss be this process's share of the whole. Gradients of
    parameters are shares, too, which data parallelism over the mesh sums. A model of transformers
    also wants an attention_mask, (B, S) of the whole sequence, for without one it takes positions
    that jump as packed sequences.

    Args:
        model: its attention has to run on mmkernels; see `mmkernels.replace`.
        mesh: one dimension, of as many processes as the layout has ranks.
        layout: the positions that each process holds.
        method: "ring", or "all_to_all", for which there must be as many query heads as processes.

    Raises:
        TypeError, ValueError: an argument is wrong; within the block, an argument of attention that
            has no form for a spread sequence.
        RuntimeError: at the end of the block, if no attention of mmkernels was called in it: each
            process would have attended to its own part alone.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, layout: Layout, *, method: str = "ring"
    ) -> None:
        where = "context_parallel"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{where}: model is {type(model).__name__}; it must be a nn.Module")
        if not isinstance(layout, Layout):
            raise TypeError(f"{where}: layout is {type(layout).__name__}; it must be a Layout")
        if method not in METHODS:
            raise ValueError(f"{where}: method is {method!r}; it must be one of {list(METHODS)}")
        check_mesh(where, mesh, layout.ranks)
        self.model, self.mesh, self.layout, self.method = model, mesh, layout, method
        self._calls = 0
        self._outside: list[spread.Spread | None] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "context_parallel":
        # At every module, for what is checkpointed runs again from one in the middle.
        for module in self.model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin, prepend=True))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._outside:  # an error has left modules without their hooks
            spread.active = self._outside[0]
        self._hooks, self._outside = [], []
        if kind is None and not self._calls:
            raise RuntimeError(
                "context_parallel: the model called no attention of mmkernels in the block, so "
                "each process has attended to its own part alone; call mmkernels.replace(model) "
                "first, and the model within the block"
            )

    def _begin(self, *_: object) -> None:
        self._outside.append(spread.active)
        spread.active = spread.Spread(self.layout.seqlen, self._attention)

    def _end(self, *_: object) -> None:
        spread.active = self._outside.pop()

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: IntervalMask | Tensor | None,
        bias: Tensor | None,
        alibi_slopes: Tensor | None,
        dropout_p: float,
        generator: torch.Generator | None,
        **options: Any,
    ) -> Any:
        """What `mmkernels.attention` gives back in the block."""
        for name, given, why in (
            ("bias", bias is not None, "hide keys by an IntervalMask"),
            ("alibi_slopes", alibi_slopes is not None, "use rotary positions"),
            ("dropout_p", dropout_p > 0.0, "set it to 0"),
        ):
            if given:
                raise ValueError(
                    f"attention: {name} is given within context_parallel, and has no form for a "
                    f"sequence that is spread over processes; {why}"
                )
        self._calls += 1
        outside, spread.active = spread.active, None
        try:
            return METHODS[self.method](q, k, v, self.mesh, self.layout, mask=mask, **options)
        finally:
            spread.active = outside
