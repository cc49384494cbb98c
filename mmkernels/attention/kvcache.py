"""The arguments of `attention_with_kvcache`: checked, written into the cache, and run."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._core import ops, registry
from mmkernels._core.registry import Explanation
from mmkernels._core.values import readable
from mmkernels.attention import checks, masks

_WHERE = "attention_with_kvcache"


class Prepared(NamedTuple):
    """A checked call.

    Attributes:
        inputs: the decode op's inputs less `backend`; cache_seqlens counts the new keys.
        k: (B, Snew, Hkv, D) still to be written, or None.
        v: likewise.
        backend: the one asked for, or "auto".
    """

    inputs: tuple
    k: Tensor | None
    v: Tensor | None
    backend: str


def prepare(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Prepared:
    """Checks the arguments of `mmkernels.attention_with_kvcache`; writes nothing."""
    backend = registry.requested(backend)
    if isinstance(k_cache, Tensor):  # autocast must not take them away from the cache's dtype
        q, k, v = checks.autocast(q, k, v, unless=k_cache.dtype)
    checks.check_qkv(
        _WHERE, q, k_cache, v_cache, "k_cache", "v_cache", same_batch=block_table is None
    )
    _refuse_grad(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, sinks=sinks)
    new = _check_new(q, k_cache, v_cache, k, v)
    if block_table is not None:
        _check_block_table(q, block_table)
        if k_cache.shape[1] == 0:
            raise ValueError(
                f"{_WHERE}: k_cache has shape {tuple(k_cache.shape)}; its page_size, the second "
                "dimension, must be at least 1"
            )
        capacity = block_table.shape[1] * k_cache.shape[1]
    else:
        capacity = k_cache.shape[1]
    lengths = _check_lengths(q, cache_seqlens, capacity, new) + new
    if block_table is not None:
        _check_pages(block_table, lengths, k_cache)
    left, right = masks.check_window_size(_WHERE, window_size)
    if causal:
        right = 0
    if alibi_slopes is not None:
        alibi_slopes = checks.check_alibi(_WHERE, alibi_slopes, q)
    if sinks is not None:
        sinks = checks.check_per_head(_WHERE, "sinks", sinks, q, batched=False)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    softmax_scale, softcap, _ = checks.check_numbers(_WHERE, softmax_scale, softcap, 0.0)
    inputs = (
        q, k_cache, v_cache, lengths, block_table, alibi_slopes, sinks, softmax_scale, softcap,
        left, right,
    )  # fmt: skip
    return Prepared(inputs, k, v, backend)


def run(call: Prepared) -> tuple[Tensor, Tensor]:
    """Writes k and v into the cache and attends to it: out, lse."""
    _, k_cache, v_cache, lengths, block_table = call.inputs[:5]
    if call.backend != "auto":  # before the cache is touched
        registry.select("attention_decode", call.backend, call.inputs)
    if call.k is not None and call.v is not None:
        _write(k_cache, v_cache, call.k, call.v, lengths, block_table)
    return ops.call("attention_decode", *call.inputs, call.backend)


def explain(*args: object, return_lse: bool = False, **kwargs: object) -> Explanation:
    """Which backend would run the call; writes nothing."""
    call = prepare(*args, **kwargs)  # type: ignore[arg-type]
    return registry.explain_op("attention_decode", call.backend, call.inputs)


def _write(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
) -> None:
    """Stores k and v (B, Snew, Hkv, ..) at the last Snew of the first `lengths` (B,) positions."""
    new = torch.arange(k.shape[1], device=k.device)
    position = (lengths[:, None] - k.shape[1]) + new  # (B, Snew)
    if block_table is None:
        # Clamped, so that unchecked lengths on a GPU never write outside of the cache.
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        index = (row, position.clamp(0, k_cache.shape[1] - 1))
    else:
        pages, page_size = k_cache.shape[:2]
        entry = (position // page_size).clamp(0, block_table.shape[1] - 1)
        page = block_table.gather(1, entry.long()).clamp(0, pages - 1)
        index = (page, position % page_size)
    k_cache[index] = k
    v_cache[index] = v


def _refuse_grad(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{_WHERE}: {name} requires a gradient, and decoding has none; run it under "
                "torch.no_grad(), or train with mmkernels.attention"
            )


def _check_new(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> int:
    """Snew, the number of keys to write."""
    if (k is None) != (v is None):
        missing = "k" if k is None else "v"
        raise ValueError(f"{_WHERE}: {missing} is missing; k and v must be given together")
    if k is None or v is None:
        return 0
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if not isinstance(new, Tensor):
            raise TypeError(f"{_WHERE}: {name} is {type(new).__name__}; it must be a torch.Tensor")
        seqlen = k.shape[1] if isinstance(k, Tensor) and k.ndim == 4 else "Snew"
        wanted = (q.shape[0], seqlen, *cache.shape[2:])
        if tuple(new.shape) != wanted:
            raise ValueError(f"{_WHERE}: {name} has shape {tuple(new.shape)}; it must be {wanted}")
        checks.check_like(_WHERE, q=q, **{name: new})
    return k.shape[1]


def _check_lengths(
    q: Tensor, cache_seqlens: int | Tensor | None, capacity: int, new: int
) -> Tensor:
    """cache_seqlens as (B,) int32 on q's device."""
    room = capacity - new
    if cache_seqlens is None:
        if new:
            raise ValueError(
                f"{_WHERE}: cache_seqlens is None, a full cache, which has no room for k's {new} "
                "keys; pass the number of keys in the cache"
            )
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int) and masks.is_int(cache_seqlens):
        if not 0 <= cache_seqlens <= room:
            raise ValueError(
                f"{_WHERE}: cache_seqlens is {cache_seqlens}; it must lie in [0, {room}]: the "
                f"cache holds {capacity} keys and k has {new}"
            )
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    masks.check_integers(_WHERE, cache_seqlens=cache_seqlens)
    assert isinstance(cache_seqlens, Tensor)  # said once more, for the type checker
    if tuple(cache_seqlens.shape) != (q.shape[0],):
        raise ValueError(
            f"{_WHERE}: cache_seqlens has shape {tuple(cache_seqlens.shape)}; it must be "
            f"({q.shape[0]},)"
        )
    _check_device(q, cache_seqlens=cache_seqlens)
    if readable(cache_seqlens) and ((cache_seqlens < 0) | (cache_seqlens > room)).any():
        raise ValueError(
            f"{_WHERE}: cache_seqlens is {cache_seqlens.tolist()}; it must lie in [0, {room}]: the "
            f"cache holds {capacity} keys and k has {new}"
        )
    return cache_seqlens.to(torch.int32).clamp(0, room)


def _check_block_table(q: Tensor, block_table: Tensor) -> None:
    if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
        got = getattr(block_table, "dtype", type(block_table).__name__)
        raise TypeError(
            f"{_WHERE}: block_table is {got}; it must be an integer tensor, int32 or int64"
        )
    if block_table.ndim != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"{_WHERE}: block_table has shape {tuple(block_table.shape)}; it must be "
            f"({q.shape[0]}, max_blocks)"
        )
    _check_device(q, block_table=block_table)


def _check_pages(block_table: Tensor, lengths: Tensor, k_cache: Tensor) -> None:
    """Raises if an entry that some sequence needs is no page of the cache."""
    if not readable(block_table, lengths):
        return
    pages, page_size = k_cache.shape[:2]
    needed = (
        torch.arange(block_table.shape[1], device=lengths.device) * page_size < lengths[:, None]
    )
    wrong = needed & ((block_table < 0) | (block_table >= pages))
    if wrong.any():
        batch, entry = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{_WHERE}: block_table[{batch}, {entry}] is {int(block_table[batch, entry])}; the "
            f"cache has pages 0 to {pages - 1}"
        )


def _check_device(q: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{_WHERE}: {name} is on {tensor.device} and q on {q.device}; move it")
