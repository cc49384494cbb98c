"""Beyond one GPU, on `torch.distributed`: sequences that are spread over processes.

Every process holds some positions of a sequence, as its `Layout` says, and calls attention with its
rows of q, k and v and the mask of the whole sequence.

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from mmkernels.distributed import Layout, ring_attention

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    layout = Layout.zigzag(seqlen, mesh.size())
    q, k, v = (layout.shard(x, mesh.get_local_rank()) for x in (q, k, v))  # (B, S_r, H, D)
    out = ring_attention(q, k, v, mesh, layout, causal=True)  # (B, S_r, H, D)
"""

from mmkernels.distributed.attention import all_to_all_attention, ring_attention
from mmkernels.distributed.context import context_parallel
from mmkernels.distributed.layout import Layout

__all__ = ["Layout", "all_to_all_attention", "context_parallel", "ring_attention"]
