"""Attention on the CUDA kernels of `csrc/attention`, which the compiled extension holds.

The extension registers its launcher as an op of its own, `torch.ops.mmkernels_cuda`; it is loaded
when a call first asks whether it could serve. The backward pass is in `cuda_backward.py`.
"""

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmkernels._core import library
from mmkernels._core.registry import register

HEAD_DIMS = (64, 72, 80, 96, 128)
MIN_CAPABILITY = (8, 0)
REDO_ROWS = 16  # of csrc/attention/forward.h


def copyable(x: Tensor) -> bool:
    """Can rows be copied 16 bytes at a time?"""
    return (
        x.stride(3) == 1
        and all(
            n <= 1 or step % 8 == 0 for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
        and (isinstance(x, FakeTensor) or x.data_ptr() % 16 == 0)
    )


def _shape_why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(q.dtype).removeprefix("torch.")
        return f"q is {dtype}; the CUDA kernels take float16 and bfloat16"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        dims = ", ".join(map(str, HEAD_DIMS))
        return (
            f"the head dims are {q.shape[3]} and {v.shape[3]}; the CUDA kernels take one of {dims}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not copyable(x):
            return (
                f"{name} has strides {tuple(x.stride())}; the CUDA kernels want a last stride of "
                "1, all others multiples of 8, and a start at a multiple of 16 bytes: "
                f"{name}.contiguous()"
            )
    return None


def _device_why_not(q: Tensor) -> str | None:
    if torch.version.hip:
        return "this torch is built for ROCm; the CUDA kernels run on NVIDIA GPUs"
    if (reason := library.load_error()) is not None:
        return reason
    return _instance_why_not(q.device.index, q.dtype, q.shape[3])


@functools.cache  # every call of `auto` asks
def _instance_why_not(device: int | None, dtype: torch.dtype, head_dim: int) -> str | None:
    if torch.cuda.is_available():  # fake tensors say "cuda" on machines without a GPU, too
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < MIN_CAPABILITY:
            return f"the GPU has compute capability {major}.{minor}; the CUDA kernels need 8.0"
    if not torch.ops.mmkernels_cuda.attention_forward_built(head_dim, dtype == torch.bfloat16):
        return f"the extension was built without a kernel for {dtype} and head dim {head_dim}"
    return None


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> str | None:
    """Why the forward kernel cannot serve a call, or None."""
    if q.device.type != "cuda":
        return f"q is on {q.device.type}; the CUDA kernels run on NVIDIA GPUs"
    if (reason := _shape_why_not(q, k, v)) is not None:
        return reason
    extras = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    for name, x in extras.items():
        if x is not None:
            return f"{name} is given; the CUDA kernels know interval masks and softcap only"
    if dropout_p > 0.0:
        return "dropout_p is above 0; the CUDA kernels drop nothing"
    if not softmax_scale >= torch.finfo(torch.float32).tiny:
        return f"softmax_scale is {softmax_scale}; the CUDA kernels need one above 0"
    return _device_why_not(q)


def only_by_name(*_: object) -> str:
    """Why `auto` passes over the kernels."""
    return "only by name: not yet measured on a GPU"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq) float32; see `_core/ops.py`."""
    q, k, v = (x.resolve_neg() for x in (q, k, v))
    batch, seqlen_q, heads, head_dim = q.shape
    out = torch.empty((batch, seqlen_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seqlen_q), dtype=torch.float32, device=q.device)
    redo = None
    if start is not None:
        tiles = -(-seqlen_q // REDO_ROWS)
        redo = torch.empty((batch, heads, tiles), dtype=torch.int32, device=q.device)
    torch.ops.mmkernels_cuda.attention_forward(
        q, k, v, start, end, out, lse, redo, softmax_scale, softcap
    )
    return out, lse


register("attention_forward", "cuda", forward, why_not, only_by_name)
