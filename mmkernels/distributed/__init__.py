"""Beyond one GPU, on `torch.distributed`: sequences that are spread over processes.

Every process holds some positions of a sequence, as its `Layout` says, and calls attention with its
rows of q, k and v and the mask of the whole sequence. The README has a script to run.
"""

from mmkernels.distributed.attention import all_to_all_attention, ring_attention
from mmkernels.distributed.context import context_parallel
from mmkernels.distributed.layout import Layout

__all__ = ["Layout", "all_to_all_attention", "context_parallel", "ring_attention"]
