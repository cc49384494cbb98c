"""Memory of one windowed forward in a fresh process, as JSON.

python -m benchmarks.peak_memory SEQLEN HEADS HEAD_DIM WINDOW
"""

import json
import sys

import torch

import mmkernels as mm
from benchmarks.environment import SEED, peak_memory
from mmkernels import masks, testing

ROWS = 128  # the last rows, compared with the reference


def measure(seqlen: int, heads: int, head_dim: int, window: int) -> dict[str, int]:
    """Peak bytes of the process before the inputs exist, and after one call."""
    warm = testing.make_qkv(1, 2 * window, 2 * window, heads, heads, head_dim)
    mm.attention(*warm, mask=masks.window(2 * window, window_size=(window - 1, 0)))
    before = peak_memory()
    q, k, v = testing.make_qkv(1, seqlen, seqlen, heads, heads, head_dim, seed=SEED)
    out = mm.attention(q, k, v, mask=masks.window(seqlen, window_size=(window - 1, 0)))
    after = peak_memory()
    keys = slice(max(seqlen - ROWS - window, 0), seqlen)
    arguments = (q[:, -ROWS:], k[:, keys], v[:, keys])
    settings = {"window_size": (window - 1, 0), "backend": "reference"}
    exact = mm.attention(*(x.double() for x in arguments), **settings)
    torch.testing.assert_close(out[:, -ROWS:].double(), exact, rtol=1e-4, atol=1e-5)
    tensors = sum(x.nbytes for x in (q, k, v, out))
    return {"before": before, "after": after, "tensors": tensors}


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
