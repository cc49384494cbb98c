"""Attention over a sequence that is spread over processes, by giving each process some heads.

Before the attention every process sends each other one the heads that are that one's; then it has
all positions of its own heads, and calls `mmkernels.attention` as if it were alone. Afterwards the
outputs go back. Heads need not divide evenly, and a key head goes to every process that reads it.

Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme
Long Sequence Transformer Models", 2023.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.distributed.layout import Layout
from mmkernels.distributed.transfer import Exchange
from mmkernels.distributed.volume import head_split

# q, k, v over the whole sequence, and which query heads they are -> out, lse.
Attend = Callable[[Tensor, Tensor, Tensor, slice], tuple[Tensor, Tensor]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: dist.ProcessGroup, whole: Attend,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out (B, S_r, Hq, Dv) and lse (B, Hq, S_r) of this process's rows; both differentiable.

    Args:
        q: (B, S_r, Hq, D).
        k: (B, S_r, Hkv, D).
        v: (B, S_r, Hkv, Dv).
        layout: who holds what.
        group: the processes.
        whole: attention over the whole sequence, of this process's heads.
        return_lse: else lse stays where it is, and None is returned.
    """
    rank = dist.get_rank(group)
    split = head_split(q.shape[2], k.shape[2], layout.ranks)
    # To each process its heads of these positions.
    parts = []
    for first, count, kv_heads in split:
        parts.append([q[:, :, first : first + count], k[:, :, kv_heads], v[:, :, kv_heads]])
    first, heads, kv_heads = split[rank]
    batch = q.shape[0]
    shapes = [
        [
            (batch, length, heads, q.shape[3]),
            (batch, length, len(kv_heads), k.shape[3]),
            (batch, length, len(kv_heads), v.shape[3]),
        ]
        for length in layout.lengths
    ]
    received = _exchange(parts, shapes, group)
    q, k, v = (layout.unshard(shards) for shards in zip(*received, strict=True))
    out, lse = whole(q, k, v, slice(first, first + heads))
    # To each process its positions of these heads.
    length = layout.lengths[rank]
    out_shapes = [[(batch, length, count, v.shape[3])] for _, count, _ in split]
    out_parts = [[layout.shard(out, r)] for r in range(layout.ranks)]
    shards = _exchange(out_parts, out_shapes, group)
    out = torch.cat([x for (x,) in shards], 2)
    if not return_lse:
        return out, None
    lse_shapes = [[(batch, count, length)] for _, count, _ in split]
    lse_parts = [[layout.shard(lse, r, dim=2)] for r in range(layout.ranks)]
    lse = torch.cat([x for (x,) in _exchange(lse_parts, lse_shapes, group)], 1)
    return out, lse


def _exchange(
    parts: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Sends parts[r], tensors of one dtype, to each rank r.

    Returns:
        What came from each rank, of shapes[r].
    """
    send = [sum(x.numel() for x in part) for part in parts]
    sizes = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    flat = torch.cat([x.reshape(-1) for part in parts for x in part])
    got = Exchange.apply(flat, [sum(of_rank) for of_rank in sizes], send, group)
    views = got.split([size for of_rank in sizes for size in of_rank])
    shaped = iter(views)
    return [[next(shaped).view(shape) for shape in of_rank] for of_rank in shapes]
