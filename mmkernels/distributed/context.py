"""An existing model on sequences that are spread over processes.

    with context_parallel(model, mesh, layout):
        hidden = model(layout.shard(x, rank))
        loss(hidden, layout.shard(targets, rank)).backward()

Everything but attention treats each position by itself, so it runs on a shard as it is. Attention
is what mmkernels serves, and what is exchanged here.
"""

from contextlib import ExitStack
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from mmkernels._core import spread
from mmkernels.attention.interval import IntervalMask
from mmkernels.distributed.attention import all_to_all_attention, ring_attention
from mmkernels.distributed.layout import Layout
from mmkernels.distributed.transfer import check_mesh

METHODS = {"ring": ring_attention, "all_to_all": all_to_all_attention}


class context_parallel:
    """Makes a model's attention that of the whole sequence, from this process's part of it.

    Within the block, calls of `mmkernels.attention` and `scaled_dot_product_attention` by modules
    of `model` get this process's rows and the mask of the whole sequence: an `IntervalMask` of (1
    or B, S) rows, causal and window_size in positions of the whole sequence. Of a model with towers
    give the part that sees the sequence, e.g. its decoder; call it, and not a method of it.

    The backward pass has to be in the block, too. torch's checkpoint runs modules again in it, so
    outside of the block it is an error, which use_reentrant=True does not notice.

    What else depends on a position is the caller's: shard the positions with `layout.shard`, give
    them to the model, and let the loss be this process's share of the whole. Gradients of
    parameters are shares, too, which data parallelism over the mesh sums. A model of transformers
    needs its position_ids, and an attention_mask, (B, S) of the whole sequence, for without one it
    takes positions that jump as packed sequences.

    One may be entered again and again; a compiled model is traced once for each.

    Args:
        model: its attention has to run on mmkernels; see `mmkernels.replace`.
        mesh: one dimension, of as many processes as the layout has ranks.
        layout: the positions that each process holds.
        method: "ring", or "all_to_all", for which there must be as many query heads as processes.

    Raises:
        TypeError, ValueError: an argument is wrong; within the block, an argument of attention that
            has no form for a spread sequence, or no position_ids for a model that takes them.
        RuntimeError: the model is in such a block already; within the block, a module calls
            attention of torch's own, or at its end none has called attention of mmkernels: each
            process would attend to its own part alone.
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
        self._active = spread.Spread(layout.seqlen, self._attention)
        self._calls = 0
        self._outside: list[spread.Spread | None] = []
        self._within = ExitStack()

    def __enter__(self) -> "context_parallel":
        modules = list(self.model.modules())
        if any(module in _open for module in modules):
            raise RuntimeError(
                "context_parallel: a module of the model is in such a block already; use one block"
            )
        self._calls = 0
        # At every module, for what is checkpointed runs again from one in the middle.
        for module in modules:
            for hook in (
                module.register_forward_pre_hook(self._begin, prepend=True),
                module.register_forward_hook(self._end, always_call=True),
            ):
                self._within.callback(hook.remove)
            _open.add(module)
            self._within.callback(_open.discard, module)
        if "position_ids" in signature(self.model.forward).parameters:
            hook = self.model.register_forward_pre_hook(_check_positions, with_kwargs=True)
            self._within.callback(hook.remove)
        self._within.enter_context(_NoOtherAttention())
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._within.close()
        if self._outside:  # an error has left modules without their hooks
            spread.active = self._outside[0]
            self._outside.clear()
        if kind is None and not self._calls:
            raise RuntimeError(
                "context_parallel: the model called no attention of mmkernels in the block, so "
                "each process has attended to its own part alone; call mmkernels.replace(model) "
                "first, and the model within the block"
            )

    def _begin(self, *_: object) -> None:
        self._outside.append(spread.active)
        spread.active = self._active

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


# Modules that are in a block.
_open: WeakSet[nn.Module] = WeakSet()


class _NoOtherAttention(TorchFunctionMode):
    """Refuses attention of torch's own in the modules of a block: it would see a part alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every other function runs as it is."""
        if func in _TORCHS_OWN and spread.active is not None:
            raise RuntimeError(
                f"context_parallel: a module of the model calls torch's {func.__name__}, which "
                "would attend to this process's part alone; call mmkernels.replace(model), or "
                "enter mmkernels.integrations.sdpa.sdpa_override() within the block"
            )
        return func(*args, **(kwargs or {}))


_TORCHS_OWN = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def _check_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    given = signature(module.forward).bind_partial(*args, **kwargs).arguments
    if given.get("position_ids") is None:
        raise ValueError(
            f"context_parallel: {type(module).__name__} is called without position_ids, and would "
            "count from 0 in every process; give layout.shard(positions, rank)"
        )
