"""What the predictions rest on: the model, the GPUs and their links, with their sources.

Bytes and seconds, without prefixes; GB are 10⁹ bytes. What is assumed, not published, says so.
"""

# The decoder of an 8B model: "The Llama 3 Herd of Models" (arXiv 2407.21783), table 3, and the
# vocabulary of its released configuration. Images and sounds arrive as positions of the sequence;
# their embedders are left out.
LAYERS = 32
WIDTH = 4096
HEADS = 32
KV_HEADS = 8
HEAD_DIM = 128
FFN = 14336
VOCABULARY = 128_256
# One context.
POSITIONS = 2**20
# Sequences of one step: 16 Mi positions, the batch of the same paper's long contexts (table 4).
MAX_SEQUENCES = 16

# NVIDIA H200 SXM datasheet: dense bfloat16 (half of the figure with sparsity), memory, its speed,
# and NVLink, of which 900 GB/s are both directions together.
PEAK_FLOPS = 989e12
MEMORY = 141e9
MEMORY_SPEED = 4.8e12
NVLINK = 450e9
# NVIDIA DGX H200 datasheet: 8 GPUs in a node, and for each a ConnectX-7 adapter of 400 Gbit/s.
NODE = 8
NETWORK = 50e9

# Assumed: shares of the peak that kernels reach. For attention, FlashAttention-3 (arXiv 2407.08608)
# reports up to 740 TFLOP/s forward on an H100, 0.75; backward passes are below.
MATMUL_SHARE = 0.7
ATTENTION_SHARE = 0.6
# Assumed: with fewer positions a rank, kernels fall short of those shares.
LEAST_ROWS = 1024
# Assumed: seconds from the start of a transfer to its first byte, launch and rendezvous included.
LATENCY = 10e-6
# Assumed: the share of memory that tensors may fill; the rest is for CUDA, NCCL and fragmentation.
MEMORY_SHARE = 0.9

# Bytes of an element: bfloat16 for compute and what is gathered, float32 for what is summed.
ITEM = 2
SUM = 4
# Of a parameter: float32 weight, gradient and Adam's two moments, each in one shard.
STATE = 4 * SUM

# Products of a backward pass of attention over those of the forward pass: five over two.
ATTENTION_BACKWARD = 2.5
# Full activation checkpointing: every layer runs forward once more before its backward pass.
FORWARDS = 2
# Positions whose logits exist at once, in float32 and with their gradient.
LOGIT_ROWS = 4096

LAYER_PARAMETERS = WIDTH * HEAD_DIM * 2 * (HEADS + KV_HEADS) + 3 * WIDTH * FFN
HEAD_PARAMETERS = WIDTH * VOCABULARY
# The embedding is not tied to the head; norms are left out.
PARAMETERS = LAYERS * LAYER_PARAMETERS + 2 * HEAD_PARAMETERS
