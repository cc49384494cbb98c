"""The mask tensors that models hand to their attention, read once a forward and not by every layer.

What was found is kept with the tensor and is valid as long as nobody has written into it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask, dense_bounds
from mmkernels.integrations.interval_tensor import IntervalTensor, over_keys
from mmkernels.integrations.transformers_masks import traced

# Tensor that owns the memory -> what identifies a view of it -> version, readers and finding.
_findings: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_VIEWS_OF_ONE = 64


def mask_over_keys(
    mask: Tensor, module: nn.Module, seqlen_q: int, seqlen_k: int
) -> IntervalMask | Tensor:
    """A model's mask in the cheapest form, cut to the keys there are.

    Args:
        mask: broadcasts to (B, Hq, Sq, Sk or more): bool, True = attend, or float to be added.
        module: the layer that asks.
        seqlen_q: Sq.
        seqlen_k: Sk.

    Returns:
        Bounds, else a bool tensor, else a float one.

    Raises:
        ValueError: mask is not 4-dimensional.
    """
    if isinstance(mask, IntervalTensor):
        return over_keys(mask, seqlen_k)
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be 4-dimensional and broadcast "
            "to (batch, heads, seqlen_q, seqlen_k). A padding mask (batch, seqlen_k), 1 at real "
            "tokens, becomes one by mask[:, None, None, :].bool()"
        )
    # Of keys that are one and the same, none can be told from the next.
    if mask.shape[3] >= seqlen_k and not traced(mask.device, mask):
        found = _once(mask, module, ("rows", seqlen_q), lambda: _read(mask, seqlen_q))
        if isinstance(found, IntervalTensor):
            return over_keys(found, seqlen_k)
        mask = mask if found is None else found
    return mask[..., :seqlen_k] if mask.shape[3] > seqlen_k else mask


def separated(
    mask: IntervalMask | Tensor | None,
    module: nn.Module,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
    query: Tensor,
    key: Tensor,
) -> IntervalMask | Tensor:
    """`mask` within each of the packed sequences only.

    Args:
        mask: None: a sequence sees all of itself.
        module: the layer that asks.
        cu_seq_lens_q: (N + 1,) integers, the bounds of the sequences in the queries.
        cu_seq_lens_k: the same for the keys; None: as for the queries.
        query: (1, Hq, Sq, D).
        key: (1, Hkv, Sk, D).

    Raises:
        ValueError: the batch is not one.
    """
    if query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q describes sequences packed into a batch of one; "
            f"the batch is {query.shape[0]}"
        )
    total_q, total_k = query.shape[2], key.shape[2]

    def build() -> tuple[Any, IntervalMask | Tensor]:
        packed = masks.packed(cu_seq_lens_q, cu_seq_lens_k, total_q=total_q, total_k=total_k)
        packed = packed if packed.device == query.device else packed.to(query.device)
        if mask is None:
            return mask, packed
        if isinstance(mask, IntervalMask):
            return mask, packed & mask
        return mask, packed.to_dense()[:, None] & mask

    one = cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q
    if not one or isinstance(mask, Tensor) or traced(query.device, cu_seq_lens_q):
        return build()[1]
    # The finding holds the mask, so that no other can have its id.
    return _once(cu_seq_lens_q, module, (id(mask), total_q, total_k, query.device), build)[1]


def _once(tensor: Tensor, module: nn.Module, what: tuple, read: Callable[[], Any]) -> Any:
    """read(), or what it gave before for these very elements of `tensor`.

    Layers that make the same view of one tensor share what the first has found. An inference tensor
    does not tell when it is written to; there a layer that comes back begins a new forward, for
    which it is read again.
    """
    owner = tensor if tensor._base is None else tensor._base
    views = _findings.get(owner)
    if views is None or len(views) > _VIEWS_OF_ONE:
        views = _findings[owner] = {}
    place = (*what, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    version = None if tensor.is_inference() else tensor._version
    known = views.get(place)
    if known is None or known[0] != version or (version is None and id(module) in known[1]):
        known = views[place] = version, set(), read()
    if version is None:
        known[1].add(id(module))
    return known[2]


def _read(mask: Tensor, seqlen_q: int) -> IntervalTensor | Tensor | None:
    """The mask as bounds, else as bool; None where it is itself the best form.

    It must not come back itself: its finding would keep it alive.
    """
    seen = mask
    if mask.is_floating_point():
        if mask.requires_grad:
            return None
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not ((mask == 0) | hidden).all():
            return None
        seen = ~hidden
    if seen.dtype == torch.bool and (seen.shape[1] == 1 or seen.stride(1) == 0):
        start, end, contiguous = dense_bounds(seen[:, 0])
        if contiguous.all():
            start, end = start.expand(-1, seqlen_q), end.expand(-1, seqlen_q)
            return IntervalTensor.of(IntervalMask._of(start, end, mask.shape[3]))
    return None if seen is mask else seen
