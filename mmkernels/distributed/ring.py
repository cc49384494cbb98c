"""Attention over a sequence that is spread over processes, the keys going round a ring.

Every process keeps its rows. Keys and values move on by one process a step, so that after as many
steps as there are processes every row has met every key. The parts merge by their lse,

    lse = log(sum_n exp(lse_n)),  out = sum_n exp(lse_n - lse) out_n

and in the backward pass exp(s - lse) is the right probability in every part, so each part's
gradients follow from the merged out and lse alone. dk and dv travel with their keys and gather what
every process adds; one step more brings them home.

A transfer is started before the attention of its step, and waited for behind it.

Source: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", ICLR
2024; for the merge, Dao, "FlashAttention-2", ICLR 2024.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels._core import ops
from mmkernels._core.first_order import first_order
from mmkernels._core.ops import lse_dtype
from mmkernels.attention.interval import IntervalMask
from mmkernels.distributed.layout import Layout
from mmkernels.distributed.transfer import finish, pass_on

# Whose keys are here in each step, and what this process's rows see of them.
Steps = list[tuple[int, IntervalMask | None]]


class Ring(NamedTuple):
    """What a pass round the ring needs beside q, k and v.

    Attributes:
        layout: who holds what.
        group: the processes.
        mask: over the whole sequence; None: every row sees every key.
        softmax_scale: factor on q k^T.
        softcap: 0: none.
        deterministic: of the backward kernels.
        backend: of the kernels.
    """

    layout: Layout
    group: dist.ProcessGroup
    mask: IntervalMask | None
    softmax_scale: float
    softcap: float
    deterministic: bool
    backend: str

    def steps(self) -> Steps:
        """Of this process."""
        rank, ranks = dist.get_rank(self.group), self.layout.ranks
        owners = [(rank - step) % ranks for step in range(ranks)]
        if self.mask is None:
            return [(owner, None) for owner in owners]
        return list(zip(owners, pieces(self.mask, self.layout, rank), strict=True))


def pieces(mask: IntervalMask, layout: Layout, rank: int) -> list[IntervalMask]:
    """The mask of each step; kept on the mask, for the layers that use the same one."""
    made_from = (layout, rank, mask.identity(), mask.start, mask.end)
    kept = mask._pieces
    if kept is not None and kept[0][:3] == made_from[:3] and made_from[2] is not None:
        return kept[1]
    owners = [(rank - step) % layout.ranks for step in range(layout.ranks)]
    made = [layout.mask_between(mask, rank, owner) for owner in owners]
    mask._pieces = (made_from, made)
    return made


def attend(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """out (B, S_r, Hq, Dv) and lse (B, Hq, S_r) of this process's rows; both differentiable."""
    return _RingAttention.apply(q, k, v, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        ctx.steps = ring.steps()
        out, lse = _forward(q, k, v, ring, ctx.steps)
        ctx.set_materialize_grads(False)
        # The first is none that attention of one process saves: checkpointing, which compares
        # shapes, then tells that it ran without the other processes when it ran again.
        ctx.save_for_backward(q.new_empty(0, ring.layout.ranks), q, k, v, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        _, q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        # Gradients of the gradients are wanted (create_graph=True) only if grad mode is on here.
        run = _FirstOrder.apply if torch.is_grad_enabled() else _backward
        return *run(dout, dlse, q, k, v, out, lse, ctx.ring, ctx.steps), None


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring, steps: Steps) -> tuple[Tensor, Tensor]:
    keys = _Keys(k, v)
    here = keys.pack(k, v)
    out = lse = None
    for index, (owner, mask) in enumerate(steps):
        coming = None
        if index + 1 < len(steps):
            size = keys.size(ring.layout.lengths[steps[index + 1][0]])
            coming = pass_on(here, size, ring.group)
        part_k, part_v = keys.unpack(here, ring.layout.lengths[owner])
        start, end = (None, None) if mask is None else (mask.start, mask.end)
        part, part_lse = ops.call(
            "attention_forward", q, part_k, part_v, start, end, None, None, None, None,
            ring.softmax_scale, ring.softcap, 0.0, ring.backend,
        )  # fmt: skip
        out, lse = _merged(out, lse, part, part_lse)
        if coming is not None:
            here = finish(coming)
    assert out is not None and lse is not None
    return out.to(q.dtype), lse


def _merged(
    out: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, out in lse's dtype."""
    if out is None or lse is None:
        return part.to(part_lse.dtype), part_lse
    total = torch.logaddexp(lse, part_lse)
    # A row that has seen no key yet: exp(-inf - 0) is the 0 it needs.
    pivot = total.masked_fill(total == -torch.inf, 0.0)
    old, new = ((x - pivot).exp().transpose(1, 2)[..., None] for x in (lse, part_lse))
    return out.mul_(old).addcmul_(part.to(out.dtype), new), total


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    ring: Ring, steps: Steps,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys = _Keys(k, v)
    here = keys.pack(k, v)
    # Many processes add to one key, so 16-bit gradients are summed in float32.
    dq = q.new_zeros(q.shape, dtype=lse_dtype(q.dtype))
    dkeys: Tensor | None = None  # of the keys that are here, from the processes before
    lengths = ring.layout.lengths
    for index, (owner, mask) in enumerate(steps):
        coming = None
        if index + 1 < len(steps):
            coming = pass_on(here, keys.size(lengths[steps[index + 1][0]]), ring.group)
        part_k, part_v = keys.unpack(here, lengths[owner])
        bounds: tuple[Tensor | None, ...] = (None,) * 4
        if mask is not None:
            rows = mask.key_rows() if q.device.type != "cpu" or ring.backend == "triton" else ()
            bounds = (mask.start, mask.end, *(rows or (None, None)))
        part_dq, part_dk, part_dv, _, _ = ops.call(
            "attention_backward", dout, dlse, q, part_k, part_v, out, lse, *bounds, None, None,
            None, None, ring.softmax_scale, ring.softcap, 0.0, False, ring.deterministic,
            ring.backend,
        )  # fmt: skip
        dq += part_dq
        added = keys.pack(part_dk.to(dq.dtype), part_dv.to(dq.dtype))
        del part_k, part_v, part_dq, part_dk, part_dv  # before the next step makes its own
        dkeys = added if dkeys is None else finish(dkeys).add_(added)
        del added
        # On to the next process, and after the last step home: the owner is the next one then.
        if len(steps) > 1:
            following = steps[(index + 1) % len(steps)][0]
            dkeys = pass_on(dkeys, keys.size(lengths[following]), ring.group)
        if coming is not None:
            here = finish(coming)
    assert dkeys is not None
    dk, dv = keys.unpack(finish(dkeys), k.shape[1])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_FirstOrder = first_order("ring_attention", _backward)


class _Keys:
    """k and v of any length as one flat buffer, so that a step is one transfer."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k_shape, self.v_shape = k.shape, v.shape

    def size(self, length: int) -> int:
        """Elements of the buffer of so many keys."""
        batch, _, heads, dim = self.k_shape
        return batch * length * heads * (dim + self.v_shape[3])

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """(n,), newly made."""
        return torch.cat((k.reshape(-1), v.reshape(-1)))

    def unpack(self, buffer: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Views (B, length, Hkv, D) and (B, length, Hkv, Dv)."""
        batch, _, heads, dim = self.k_shape
        count = batch * length * heads * dim
        return (
            buffer[:count].view(batch, length, heads, dim),
            buffer[count:].view(batch, length, heads, self.v_shape[3]),
        )
