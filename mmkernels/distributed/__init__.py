"""Beyond one GPU, on `torch.distributed`."""

from mmkernels.distributed.attention import all_to_all_attention, ring_attention
from mmkernels.distributed.context import context_parallel
from mmkernels.distributed.layout import Layout

__all__ = ["Layout", "all_to_all_attention", "context_parallel", "ring_attention"]
