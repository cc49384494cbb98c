"""Calls of the CUDA backward kernels that their tests share, and what stands in for the ops."""

from typing import Any

import torch
from torch import Tensor

from mmkernels import testing
from mmkernels.attention import cuda
from tests.attention import cuda_backward
from tests.attention.cuda_backward import Problem, attention_delta, problem
from tests.cuda_harness import on_device

SHAPE = (2, 200, 261, 4, 2)  # batch, Sq, Sk, heads, key heads
NAMES = ("dq", "dk", "dv")


def masked(mask: str, shape: tuple[int, int, int, int, int] = SHAPE, *args: Any) -> Any:
    return problem(shape, *args, mask=testing.MASKS[mask](*shape[:3]))


def forwarded(x: Problem) -> tuple[Tensor, ...]:
    """dout, q, k, v, lse and delta."""
    out, lse = cuda_backward.forward(x)
    return x.dout, *x.qkv, lse, attention_delta(x.dout, out, lse, x.dlse)[0]


def poisoned(x: Problem, which: str, bad: float) -> tuple[Problem, Problem, Tensor]:
    """x with `bad` in three keys or values, and with 0 there; which rows (B, Hq, Sq) see them."""
    dirty, clean = getattr(x, which).clone(), getattr(x, which).clone()
    batch, seqlen_q, heads, head_dim = x.q.shape
    touched = torch.zeros(batch, heads, seqlen_q, dtype=torch.bool)
    groups = heads // x.k.shape[2]
    for b, j, h, d in ((0, 12, 0, 3), (0, 150, 1, 5), (1, 199, 0, head_dim - 1)):
        dirty[b, j, h, d], clean[b, j, h, d] = bad, 0.0
        touched[b, groups * h : groups * (h + 1)] |= x.mask.to_dense().expand(batch, -1, -1)[
            b, :, j
        ]
    assert touched.any() and not touched.all()
    return (
        x._replace(**{which: on_device(dirty)}),
        x._replace(**{which: on_device(clean)}),
        touched,
    )


class EmulatedOps:
    """`torch.ops.mmkernels_cuda`, its backward ops run in the emulator."""

    def attention_delta(self, dout, out, dlse, lse, delta):
        delta.copy_(attention_delta(dout, out, lse, dlse)[0])

    def attention_backward(self, *inputs):
        dout, q, k, v, lse, delta, *bounds = inputs[:10]
        assert all(cuda.copyable(x) for x in (dout, q, k, v)) and lse.is_contiguous()
        bounds = tuple(on_device(x) for x in bounds if x is not None)
        made, _ = cuda_backward.attention_backward(
            *(on_device(x) for x in (dout, q, k, v, lse, delta)), bounds, *inputs[13:]
        )
        for target, x in zip(inputs[10:13], made, strict=True):
            target.copy_(x)
