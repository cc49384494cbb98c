"""`IntervalTensor`: an interval mask that passes for the dense bool mask it stands for.

Models hand their mask from layer to layer, now and then slice, cast or move it, and look at its
shape. A dense one has Sq * Sk elements; this one has two bounds per row until somebody
computes with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmkernels._core.values import captured
from mmkernels.attention.interval import IntervalMask

aten = torch.ops.aten
# What may leave the mask as it is, or a part of it.
_VIEWS = {
    aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.view.default,
    aten.expand.default, aten.slice.Tensor,
}  # fmt: skip
_COPIES = {aten.clone.default, aten._to_copy.default}


class IntervalTensor(Tensor):
    """Looks like a (B, 1, Sq, Sk) bool tensor, True = attend, and holds bounds of O(B Sq).

    Moving, copying and slicing it keep the bounds. Any other operation makes the dense mask, once,
    and goes on with that, so its result is right and a plain tensor. Writing into the mask or into
    a view of it is noticed: `interval` is None from then on.

    Make one with `of`; the constructor takes tensors and numbers only, so that Dynamo can trace it.

    Args:
        start: (1 or B, Sq) int32, valid bounds as of an `IntervalMask`.
        end: the same.
        shape: (B, 1, Sq, Sk).
    """

    _interval: IntervalMask | None
    _dense: Tensor | None
    _view_of: Callable[[], Tensor] | None
    _parts: dict[tuple, IntervalMask]

    @staticmethod
    def __new__(cls, start: Tensor, end: Tensor, shape: Sequence[int]) -> "IntervalTensor":  # noqa: D102
        self = cls._empty(shape, start.device)
        self._interval = IntervalMask._of(start, end, shape[3])
        return self

    @classmethod
    def of(cls, interval: IntervalMask, batch: int | None = None) -> "IntervalTensor":
        """The tensor that stands for `interval`.

        Args:
            interval: (1 or B, Sq) bounds that know their number of keys.
            batch: B; None: as many as there are rows of bounds.

        Raises:
            ValueError: interval does not know its number of keys, or has other than 1 or B rows.
        """
        rows, seqlen_q = interval.shape
        batch = rows if batch is None else batch
        if interval.seqlen_k is None:
            raise ValueError(
                "IntervalTensor: interval does not know its number of keys; build it with seqlen_k"
            )
        if rows not in (1, batch):
            raise ValueError(
                f"IntervalTensor: interval has {rows} rows of bounds; it must have 1 or {batch}"
            )
        self = cls(interval.start, interval.end, (batch, 1, seqlen_q, interval.seqlen_k))
        self._interval = interval
        return self

    @classmethod
    def _empty(cls, shape: Sequence[int], device: torch.device) -> "IntervalTensor":
        # Inference tensors would not tell that somebody has written into them.
        with torch.inference_mode(False):
            self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self._interval, self._dense, self._view_of, self._parts = None, None, None, {}
        return self

    # Results of operations are what __torch_dispatch__ makes them, not made to this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def is_interval(self) -> bool:
        """Are the bounds valid? Not once somebody has written into the mask."""
        return self._interval is not None and self._version == 0

    @property
    def interval(self) -> IntervalMask | None:
        """The bounds, where they are valid; the same object each time."""
        return self._interval if self.is_interval else None

    def dense(self) -> Tensor:
        """The (B, 1, Sq, Sk) bool mask that this one stands for, made once."""
        if self._dense is None:
            with torch.inference_mode(False):
                if self._view_of is not None:
                    self._dense = self._view_of()
                else:
                    assert self._interval is not None
                    dense = self._interval.to_dense()[:, None]
                    self._dense = dense.expand(self.shape).clone()
        return self._dense

    def _part(self, dim: int, first: int, last: int) -> IntervalMask:
        """The bounds of the mask sliced [first:last] in `dim`, once for all layers."""
        assert self._interval is not None
        if first == 0 and last == self.shape[dim]:
            return self._interval
        key = (dim, first, last)
        part = self._parts.get(key) or _sliced(self._interval, *key)
        if not captured(self.device):  # the memory is the graph's
            self._parts[key] = part
        return part

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            kept = _kept(func, args[0], args[1:], kwargs) if args else None
            if kept is not None:
                return kept
            if torch.is_inference_mode_enabled():  # which skips the decomposition
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*_to_dense(args), **_to_dense(kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.is_write:
                torch.autograd.graph.increment_version(value)
        return result

    # torch refuses these two for subclasses.
    def tolist(self) -> list:
        """As of the dense mask."""
        return self.dense().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of the dense mask."""
        return self.dense().numpy(force=force)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"IntervalTensor({tuple(self.shape)}, {self.interval or self._dense})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        interval = self.interval
        if interval is None:
            return self.dense().__reduce_ex__(protocol)
        return IntervalTensor, (interval.start, interval.end, tuple(self.shape))

    start = property(lambda self: self._interval.start, doc="(1 or B, Sq) int32.")
    end = property(lambda self: self._interval.end, doc="(1 or B, Sq) int32.")

    def __tensor_flatten__(self) -> tuple[list[str], bool]:
        if not self.is_interval:
            self.dense()
        return (["start", "end"] if self.is_interval else ["_dense"]), self.is_interval

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: dict[str, Tensor],
        is_interval: bool,
        shape: Sequence[int],
        stride: Sequence[int],
    ) -> "IntervalTensor":
        if is_interval:
            return cls(inner["start"], inner["end"], shape)
        self = cls._empty(shape, inner["_dense"].device)
        self._dense = inner["_dense"]
        return self


def over_keys(mask: IntervalTensor, seqlen_k: int) -> IntervalMask | Tensor:
    """What attention over the first seqlen_k keys takes: bounds, or the dense mask if written to.

    A function, for Dynamo does not look into methods of tensors.
    """
    width = mask.shape[3]
    if torch.compiler.is_compiling():  # a mask of the graph itself has tensors and numbers only
        if not mask.is_interval:
            return (mask & True)[..., :seqlen_k]
        # Its width and seqlen_k may be two symbols for one number, of which checks want the latter.
        whole = IntervalMask._of(mask.start, mask.end, seqlen_k if width == seqlen_k else width)
        return _sliced(whole, 3, 0, seqlen_k) if width > seqlen_k else whole
    if not mask.is_interval:
        return mask.dense()[..., :seqlen_k]
    return mask._part(3, 0, min(seqlen_k, width))


def _to_dense(tree: Any) -> Any:
    return tree_map_only(IntervalTensor, IntervalTensor.dense, tree)


def _sliced(interval: IntervalMask, dim: int, first: int, last: int) -> IntervalMask:
    start, end = interval.start, interval.end
    if dim == 3:
        start, end = ((bound - first).clamp(0, last - first) for bound in (start, end))
        empty = start >= end
        start, end = start.masked_fill(empty, 0), end.masked_fill(empty, 0)
        return IntervalMask._of(start, end, last - first)
    rows = slice(first, last)
    if dim == 2:
        return IntervalMask._of(start[:, rows], end[:, rows], interval.seqlen_k)
    return IntervalMask._of(start[rows], end[rows], interval.seqlen_k)


def _kept(func: Any, mask: Any, rest: tuple, kwargs: dict[str, Any]) -> IntervalTensor | None:
    """func(mask, *rest, **kwargs) as an interval mask; None where it is none."""
    if not isinstance(mask, IntervalTensor) or mask.interval is None:
        return None
    interval, batch = mask.interval, mask.shape[0]
    if func in _COPIES:
        if kwargs.get("dtype") not in (None, torch.bool):
            return None
        device = kwargs.get("device")
        return IntervalTensor.of(interval if device is None else interval.to(device), batch)
    if func not in _VIEWS:
        return None
    if func is aten.slice.Tensor:
        dim, first, last, step = rest + (0, None, None, 1)[len(rest) :]
        first, last, _ = slice(first, last).indices(mask.shape[dim])
        if step != 1 or last < first or dim % 4 == 1:
            return None
        if dim % 4 == 0:
            batch = last - first
        if dim % 4 != 0 or interval.shape[0] > 1:
            interval = mask._part(dim % 4, first, last)
    elif rest:  # view or expand, to a size
        size = [
            n if wanted == -1 else wanted for n, wanted in zip(mask.shape, rest[0], strict=False)
        ]
        if len(rest[0]) != 4 or size[1:] != list(mask.shape[1:]) or size[0] < 1:
            return None
        batch = size[0]
    kept = IntervalTensor.of(interval, batch)
    kept._view_of = lambda: func(mask.dense(), *rest, **kwargs)
    return kept
