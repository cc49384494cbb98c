"""The functions: attention over a sequence that is spread over the processes of a mesh."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import mmkernels as mm
from mmkernels._core import dtensors, registry
from mmkernels.attention import checks
from mmkernels.attention.interval import IntervalMask
from mmkernels.distributed import all_to_all, ring
from mmkernels.distributed.layout import Layout
from mmkernels.distributed.transfer import check_mesh


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_lse; Any lets type checkers take either
    """`mmkernels.attention` over a whole sequence, from each process's part of it.

    Keys and values travel round a ring while attention runs. Every process of the mesh has to call
    it, in the same order, with gradients wanted on all or on none, and to go through its backward.

    Args:
        q: (B, S_r, Hq, D), this process's rows, in the layout's order.
        k: (B, S_r, Hkv, D), Hq a multiple of Hkv.
        v: (B, S_r, Hkv, Dv).
        mesh: one dimension, of as many processes as the layout has ranks.
        layout: the positions that each process holds.
        mask: over the whole sequence, alike on all processes: an `IntervalMask` of (1 or B, S)
            rows, or a bool tensor that is one.
        causal: position i sees the keys j <= i of the whole sequence.
        window_size: (left, right) in positions of the whole sequence; -1 is unbounded.
        softmax_scale: factor on q k^T; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 means none.
        sinks: (Hq,), alike on all processes. Its gradient here is this process's share, to be
            summed over the mesh as that of any parameter.
        return_lse: also return lse.
        deterministic: gradients are the same in every run.
        backend: "auto", or a backend's name; see `mmkernels.explain`.

    Returns:
        out (B, S_r, Hq, Dv), this process's rows; with return_lse also lse (B, Hq, S_r).

    Raises:
        ValueError, TypeError: as for `mmkernels.attention`; q, k or v of another length than the
            layout's, a mesh of another size, or a mask that is no interval mask.
        BackendUnavailable: `backend` was named and cannot serve the call.

    A second derivative needs `all_to_all_attention` with backend="reference".

    Numerics: parts are merged, and gradients of keys summed, in float32 (float64 for float64).
    Bytes sent are those of `volume.ring_forward` and `volume.ring_backward`.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", ICLR 2024.
    """
    where = "ring_attention"
    q, k, v = checks.autocast(q, k, v)
    whole = _check(where, q, k, v, mesh, layout, mask, causal, window_size)
    if sinks is not None:
        sinks = checks.check_per_head(where, "sinks", sinks, q, batched=False)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scale, softcap, _ = checks.check_numbers(where, scale, softcap, 0.0)
    backend = registry.requested(backend)
    out, lse = ring.attend(
        q, k, v,
        ring.Ring(layout, mesh.get_group(), whole, scale, softcap, deterministic, backend),
    )  # fmt: skip
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | Any:  # a pair with return_lse; Any lets type checkers take either
    """`mmkernels.attention` over a whole sequence, from each process's part of it.

    Every process gets all positions of some heads, attends, and sends the outputs back. The mesh
    may have no more processes than there are query heads.

    Args:
        q: as in `ring_attention`.
        k: as in `ring_attention`.
        v: as in `ring_attention`.
        mesh: as in `ring_attention`.
        layout: as in `ring_attention`.
        mask: as in `ring_attention`.
        causal: as in `ring_attention`.
        window_size: as in `ring_attention`.
        softmax_scale: as in `ring_attention`.
        softcap: as in `ring_attention`.
        sinks: as in `ring_attention`.
        return_lse: as in `ring_attention`.
        deterministic: as in `ring_attention`.
        backend: as in `ring_attention`.

    Returns:
        As `ring_attention`.

    Raises:
        ValueError, TypeError: as for `ring_attention`; fewer query heads than processes.
        BackendUnavailable: as for `ring_attention`.

    Numerics: those of one process. Bytes sent are those of `volume.all_to_all_forward` and
    `volume.all_to_all_backward`.

    Source: Jacobs et al., "DeepSpeed Ulysses", 2023.
    """
    where = "all_to_all_attention"
    q, k, v = checks.autocast(q, k, v)
    whole = _check(where, q, k, v, mesh, layout, mask, causal, window_size)
    if q.shape[2] < layout.ranks:
        raise ValueError(
            f"{where}: q has {q.shape[2]} heads for {layout.ranks} processes, and each needs one; "
            "use ring_attention, or a mesh of fewer processes"
        )
    if sinks is not None:
        sinks = checks.check_per_head(where, "sinks", sinks, q, batched=False)
    softmax_scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    softmax_scale, softcap, _ = checks.check_numbers(where, softmax_scale, softcap, 0.0)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        out, lse = mm.attention(
            q, k, v, mask=whole, softmax_scale=softmax_scale, softcap=softcap,
            sinks=None if sinks is None else sinks[heads], return_lse=True,
            deterministic=deterministic, backend=backend,
        )  # fmt: skip
        return out, lse

    out, lse = all_to_all.attend(q, k, v, layout, mesh.get_group(), attend, return_lse)
    return (out, lse) if return_lse else out


def _check(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    layout: Layout,
    mask: IntervalMask | Tensor | None,
    causal: bool,
    window_size: tuple[int, int],
) -> IntervalMask | None:
    """The mask over the whole sequence, of checked arguments."""
    checks.check_types(where, causal, None)
    checks.check_qkv(where, q, k, v)
    if not isinstance(layout, Layout):
        raise TypeError(
            f"{where}: layout is {type(layout).__name__}; it must be a Layout, e.g. "
            "Layout.zigzag(seqlen, mesh.size())"
        )
    check_mesh(where, mesh, layout.ranks)
    if dtensors.is_dtensor(q):
        raise TypeError(
            f"{where}: q, k and v are DTensors; give this process's part as plain tensors, e.g. by "
            "ColwiseParallel(use_local_output=True)"
        )
    # On all processes alike, else those that see nothing wrong would wait for the others.
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"{where}: q has {q.shape[1]} rows and k {k.shape[1]}; a spread sequence attends to "
            "itself. Leave cross attention out of it"
        )
    rank = dist.get_rank(mesh.get_group())
    if q.shape[1] != layout.lengths[rank]:
        raise ValueError(
            f"{where}: q has {q.shape[1]} rows, and the layout gives rank {rank} "
            f"{layout.lengths[rank]} of {layout.seqlen} positions; use layout.shard(q, {rank})"
        )
    if isinstance(mask, IntervalMask) and mask.shape[1] != layout.seqlen:
        raise ValueError(
            f"{where}: mask has shape {tuple(mask.shape)}; it must be over the whole sequence of "
            f"{layout.seqlen} positions, alike on all processes"
        )
    shape = (q.shape[0], q.shape[2], layout.seqlen, layout.seqlen)
    interval, dense = checks.merged_mask(where, mask, causal, window_size, shape, q.device)
    if dense is not None:
        raise ValueError(
            f"{where}: mask is a bool tensor that is no interval mask, or cannot be read; only "
            "interval masks can be cut between processes. Use mmkernels.masks"
        )
    return interval


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with a logit a head that takes part in the softmax and has no value."""
    no_key = lse == -torch.inf
    # Rows without a key are 0 as they are; of -inf beside -inf there is no gradient.
    total = torch.logaddexp(lse.masked_fill(no_key, 0.0), sinks.to(lse.dtype)[:, None])
    share = (lse.masked_fill(no_key, 0.0) - total).exp().transpose(1, 2)[..., None]
    return (out.to(lse.dtype) * share).to(out.dtype), total.masked_fill(no_key, -torch.inf)
