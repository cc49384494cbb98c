"""The errors that the public attention functions raise for wrong arguments.

Shapes, dtypes and devices are always checked; values where reading them synchronises nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels._core import dtensors
from mmkernels._core.ops import lse_dtype
from mmkernels._core.values import readable
from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask, dense_bounds

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast(*tensors: Tensor | None, unless: torch.dtype = torch.float64) -> Any:
    """Casts floating tensors but float64 to autocast's dtype, as SDPA does; q is the first.

    Those of dtype `unless` stay as they are.
    """
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype not in (torch.float64, unless)
        else tensor
        for tensor in tensors
    )


def check_qkv(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_name: str = "k",
    v_name: str = "v",
    same_batch: bool = True,
) -> None:
    """Raises unless q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv) fit together."""
    for name, tensor in (("q", q), (k_name, k), (v_name, v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{where}: {name} is {type(tensor).__name__}; it must be a torch.Tensor"
            )
        if tensor.ndim != 4:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}; it must be 4-dimensional: "
                "(batch, seqlen, heads, head_dim)"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{where}: {name} is {tensor.layout}; it must be strided, e.g. {name}.to_dense()"
            )
    if q.dtype not in DTYPES:
        raise TypeError(
            f"{where}: q is {q.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    dtype, device = q.dtype, q.device
    alike = type(q) is type(k) is type(v) and k.dtype == v.dtype == dtype
    if not alike or k.device != device or v.device != device:
        check_like(where, q=q, **{k_name: k, v_name: v})
    batch, _, heads, dim = q.shape
    k_batch, seqlen_k, kv_heads, k_dim = k.shape
    v_batch, v_seqlen, v_heads, v_dim = v.shape
    if k_batch != v_batch or seqlen_k != v_seqlen or kv_heads != v_heads:
        raise ValueError(
            f"{where}: {k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}; all but "
            "the last dimension must agree"
        )
    if same_batch and batch != k_batch:
        raise ValueError(
            f"{where}: q has batch size {batch} and {k_name} {k_batch}; they must agree "
            "(.expand copies nothing)"
        )
    if dim != k_dim or dim == 0 or v_dim == 0:
        raise ValueError(
            f"{where}: the head dim of q is {dim}, of {k_name} {k_dim} and of {v_name} {v_dim}; "
            f"q's and {k_name}'s must agree and none be 0"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{where}: q has {heads} heads and {k_name} {kv_heads}; q's must be a multiple. "
            "Tensors laid out (batch, heads, seqlen, head_dim) need .transpose(1, 2)"
        )


def check_like(where: str, **tensors: Tensor) -> None:
    """Raises unless all tensors have the dtype, device and mesh of the first."""
    dtensors.check_together(where, **tensors)
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{where}: {first_name} is {first.dtype} and {name} {tensor.dtype}; cast one, e.g. "
                f"{name}.to({first_name}.dtype)"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{where}: {first_name} is on {first.device} and {name} on {tensor.device}; move "
                f"one, e.g. {name}.to({first_name}.device)"
            )


def check_types(where: str, causal: bool, generator: torch.Generator | None) -> None:
    """Raises unless causal is a bool and generator a Generator or None."""
    if not isinstance(causal, bool):
        raise TypeError(f"{where}: causal is {causal!r}; it must be True or False")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{where}: generator is {type(generator).__name__}; it must be a torch.Generator, e.g. "
            "torch.Generator(q.device).manual_seed(0)"
        )


def check_numbers(
    where: str, softmax_scale: float, softcap: float, dropout_p: float
) -> tuple[float, float, float]:
    """The three as floats in their ranges."""
    try:
        scale, cap, p = float(softmax_scale), float(softcap), float(dropout_p)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where}: softmax_scale is {softmax_scale!r}, softcap {softcap!r} and dropout_p "
            f"{dropout_p!r}; all must be numbers"
        ) from None
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{where}: softmax_scale is {scale}; it must be finite")
    if not 0.0 <= cap < math.inf:
        raise ValueError(f"{where}: softcap is {cap}; it must be finite and >= 0 (0 means none)")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{where}: dropout_p is {p}; it must lie in [0, 1]")
    return scale, cap, p


def check_per_head(where: str, name: str, tensor: Tensor, q: Tensor, batched: bool) -> Tensor:
    """A (Hq,) tensor, or (B, Hq) where `batched`, in lse's dtype on q's device."""
    wanted = f"({q.shape[2]},)" + (f" or ({q.shape[0]}, {q.shape[2]})" if batched else "")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{where}: {name} is {got}; it must be a floating-point tensor {wanted}")
    shapes = [q.shape[2:3]] + ([torch.Size((q.shape[0], q.shape[2]))] if batched else [])
    if tensor.shape not in shapes:
        raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}; it must be {wanted}")
    if tensor.device != q.device:
        raise ValueError(
            f"{where}: {name} is on {tensor.device} and q on {q.device}; move it there"
        )
    return tensor.to(lse_dtype(q.dtype))


def check_alibi(where: str, alibi_slopes: Tensor, q: Tensor) -> Tensor:
    """alibi_slopes (Hq,) or (B, Hq), which no backend gives a gradient."""
    slopes = check_per_head(where, "alibi_slopes", dtensors.gathered(alibi_slopes), q, batched=True)
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{where}: alibi_slopes needs a gradient, and gets none; detach it, or train the "
            "slopes through bias=-slopes[:, None, None] * distance"
        )
    return slopes


def check_bias(where: str, bias: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """bias as a 4-d tensor that broadcasts to `shape` (B, Hq, Sq, Sk)."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"{where}: bias is {type(bias).__name__}; it must be a torch.Tensor")
    if bias.dtype not in DTYPES:
        hint = (
            "a bool mask (True = attend) goes to mask=" if bias.dtype == torch.bool else "cast it"
        )
        raise TypeError(f"{where}: bias is {bias.dtype}; it must be floating point ({hint})")
    return broadcastable(where, "bias", bias, shape, device)


def broadcastable(
    where: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """The tensor as a 4-dimensional one, or an error if it does not broadcast to `shape`."""
    if tensor.ndim > 4 or any(
        n not in (1, m) for n, m in zip(reversed(tensor.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"{where}: {name} has shape {tuple(tensor.shape)}; it must broadcast to (batch, heads, "
            f"seqlen_q, seqlen_k) = {shape}"
        )
    if tensor.device != device:
        raise ValueError(f"{where}: {name} is on {tensor.device} and q on {device}; move it there")
    return tensor if tensor.ndim == 4 else tensor[(None,) * (4 - tensor.ndim)]


def merged_mask(
    where: str,
    mask: IntervalMask | Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[IntervalMask | None, Tensor | None]:
    """The intersection of mask, causal and window_size; `shape` is (B, Hq, Sq, Sk).

    Returns:
        An interval mask, and a (1 or B, 1 or Hq, 1 or Sq, 1 or Sk) bool mask for what is no
        interval; each may be None.
    """
    batch, _, seqlen_q, seqlen_k = shape
    left, right = masks.check_window_size(where, window_size)
    if causal:
        right = 0
    interval = dense = None
    # A single row stands at the last key: a bound on the right hides nothing from it.
    if left >= 0 or (right >= 0 and seqlen_q != 1):
        interval = masks.window(seqlen_q, seqlen_k, window_size=(left, right), device=device)
    given = None
    if isinstance(mask, IntervalMask):
        check_interval(where, mask, batch, seqlen_q, seqlen_k, device)
        given = mask
    elif mask is not None:
        given, dense = _recognised(where, mask, shape, device)
    if given is not None:
        interval = given if interval is None else given & interval
    return interval, dense


def check_interval(
    where: str, mask: IntervalMask, batch: int, seqlen_q: int, seqlen_k: int, device: torch.device
) -> None:
    """Raises unless the mask fits (B, Sq) rows over Sk keys."""
    if mask.shape[1] != seqlen_q or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"{where}: mask has shape {tuple(mask.shape)}; it must be (1 or {batch}, {seqlen_q}): "
            "a row for each query"
        )
    if mask.seqlen_k not in (None, seqlen_k):
        raise ValueError(f"{where}: mask is over {mask.seqlen_k} keys and k has {seqlen_k}")
    if mask.device != device:
        raise ValueError(
            f"{where}: mask is on {mask.device} and q on {device}; use mask.to(q.device)"
        )
    if mask.seqlen_k is None and mask.end.numel() and readable(mask.end):
        last = int(mask.end.max())
        if last > seqlen_k:
            raise ValueError(f"{where}: mask ends at key {last} and k has {seqlen_k} keys")


def _recognised(
    where: str, mask: Tensor, shape: tuple[int, ...], device: torch.device
) -> tuple[IntervalMask | None, Tensor | None]:
    """A bool mask as an interval mask if it is one and is free to read, else as it is."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{where}: mask is {got}; it must be an IntervalMask or a bool tensor, True = attend. "
            "A floating-point mask that is added to the scores goes to bias="
        )
    mask = broadcastable(where, "mask", dtensors.gathered(mask), shape, device)
    one_head = mask[:, :1] if mask.stride(1) == 0 else mask
    if one_head.shape[1] == 1 and readable(mask):
        # Broadcast rows stay one row here, so a key padding mask costs O(Sk) to read.
        rows = one_head[:, 0].expand(-1, -1, shape[3])
        start, end, contiguous = dense_bounds(rows)
        if bool(contiguous.all()):
            start, end = (bound.expand(-1, shape[2]) for bound in (start, end))
            return IntervalMask._of(start, end, shape[3]), None
    return None, mask


def check_packed(where: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are 3-dimensional."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{where}: {name} is {type(tensor).__name__}; it must be a torch.Tensor"
            )
        if tensor.ndim != 3:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}; it must be (total, heads, "
                "head_dim), the sequences packed end to end"
            )


def check_max_seqlen(where: str, name: str, max_seqlen: int, cu_seqlens: Tensor) -> None:
    """Raises unless max_seqlen is an int at least as large as the longest sequence."""
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(
            f"{where}: {name} is {type(max_seqlen).__name__}; it must be an int, e.g. "
            f"int({name}) where it is a tensor"
        )
    if readable(cu_seqlens) and len(cu_seqlens) > 1:
        longest = int(cu_seqlens.diff().max())
        if longest > max_seqlen:
            raise ValueError(
                f"{where}: {name} is {max_seqlen} and the longest sequence has {longest} rows; it "
                "must be at least that"
            )


def check_sdpa(
    where: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value and attn_mask with their leading dimensions as (batch, heads)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{where}: {name} is {type(tensor).__name__}; it must be a torch.Tensor"
            )
        if tensor.ndim < 2 or tensor.ndim != query.ndim:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)} and query {tuple(query.shape)}; "
                "all must be (..., heads, seqlen, head_dim), with as many dimensions"
            )
    if query.dtype not in DTYPES:
        raise TypeError(
            f"{where}: query is {query.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    check_like(where, query=query, key=key, value=value)
    if key.shape[-2] != value.shape[-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{where}: query has shape {tuple(query.shape)}, key has shape {tuple(key.shape)} and "
            f"value {tuple(value.shape)}; query's and key's head_dim must agree, and key's and "
            "value's seqlen"
        )
    if query.ndim >= 3 and not enable_gqa and query.shape[-3] != key.shape[-3]:
        if 1 not in (query.shape[-3], key.shape[-3]):
            raise ValueError(
                f"{where}: query has {query.shape[-3]} heads and key {key.shape[-3]}; pass "
                "enable_gqa=True to share key heads, or repeat them"
            )
        heads = max(query.shape[-3], key.shape[-3])
        query, key, value = (x.expand(*x.shape[:-3], heads, -1, -1) for x in (query, key, value))
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    query, key, value = (
        x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:]) for x in (query, key, value)
    )
    if attn_mask is not None:
        _check_attn_mask(where, attn_mask, is_causal, (*query.shape[:-1], key.shape[-2]))
    if query.ndim == 4:
        return query, key, value, attn_mask
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        attn_mask = _batch_and_heads(attn_mask)
    query, key, value = (_batch_and_heads(x) for x in (query, key, value))
    return query, key, value, attn_mask


def _check_attn_mask(
    where: str, attn_mask: Tensor, is_causal: bool, shape: tuple[int, ...]
) -> None:
    if is_causal:
        raise ValueError(
            f"{where}: both attn_mask and is_causal are given; put the causal part into attn_mask"
        )
    if not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"{where}: attn_mask is {type(attn_mask).__name__}; it must be a torch.Tensor"
        )
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise TypeError(
            f"{where}: attn_mask is {attn_mask.dtype}; it must be bool (True = attend) or floating "
            "point (added to the scores)"
        )
    ends = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    if attn_mask.ndim > len(shape) or any(n not in (1, m) for n, m in ends):
        raise ValueError(
            f"{where}: attn_mask has shape {tuple(attn_mask.shape)}; it must broadcast to "
            f"(..., heads, seqlen_q, seqlen_k) = {shape}"
        )


def _batch_and_heads(x: Tensor) -> Tensor:
    """(..., H, S, D) with the dimensions before H as one; missing ones are 1."""
    if x.ndim < 4:
        return x[(None,) * (4 - x.ndim)]
    return x.flatten(0, x.ndim - 4)
