"""One attention problem: seeded inputs, and what the modes of its implementations return.

All of them read the same memory, (B, S, H, D) as a model's projections leave it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from mmkernels import testing
from mmkernels.bench import compiling
from mmkernels.bench.attention_expected import Expected
from mmkernels.bench.attention_masks import BenchMask
from mmkernels.bench.case import SEED, Call, Results

# (q, k, v) -> out, all (B, S, H, D).
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Makes the attention of one implementation for a problem, or raises `Unavailable`.
Prepare = Callable[["AttentionProblem"], Attention]

# Mode -> the results of a call, and useful floating point operations relative to a forward pass.
MODES = {
    "forward": (("out",), 1.0),
    "forward that records a graph": (("out",), 1.0),
    "forward + backward": (("out", "dq", "dk", "dv"), 3.5),
    "backward": (("dq", "dk", "dv"), 2.5),
}


class Size(NamedTuple):
    """Queries and keys are equally many."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        groups = "" if self.heads == self.kv_heads else f"/{self.kv_heads}"
        return f"B{self.batch} H{self.heads}{groups} S{self.seqlen} D{self.head_dim}"


class AttentionProblem:
    """Self-attention under a mask, in one of MODES.

    Args:
        size: of q, k and v.
        mask: what rows see.
        dtype: of all tensors.
        mode: what a call does.
        device: of all tensors.
        peers: the implementations, by name.

    Attributes:
        qkv: the inputs.
        interval: the mask as mmkernels takes it, None for full.
        flops: 4 D for each pair of a query and a key that it sees, times what the mode asks.
        bytes: q, k, v and out once; gradients and what they need likewise.
        implementations: as in `Problem`.
    """

    flops: float | None
    bytes: float | None

    def __init__(
        self,
        size: Size,
        mask: BenchMask,
        dtype: torch.dtype,
        mode: str,
        device: torch.device,
        peers: Mapping[str, Prepare],
    ) -> None:
        compiling.forget()
        self.size, self.mask, self.dtype, self.mode, self.device = size, mask, dtype, mode, device
        shape = (size.batch, size.seqlen, size.seqlen, *size[2:])
        self.qkv = testing.make_qkv(*shape, dtype=dtype, device=device, seed=SEED)
        self._names, factor = MODES[mode]
        self.backward = "dq" in self._names
        self.interval = mask.interval(device)()
        self.real = self._real_rows()
        self._dout: Tensor | None = None
        if self.backward:
            dout = testing.make_qkv(*shape, dtype=dtype, device=device, seed=SEED + 1)[0]
            # What comes out at padding goes nowhere in a model.
            self._dout = dout if self.real is None else dout * self.real
        self._expected = Expected(self.qkv, self._dout, self.interval, self.real)
        self.flops = factor * 4 * self._pairs() * size.heads * size.head_dim
        self.bytes = self._bytes()
        if mode != "forward":
            for x in self.qkv:
                x.requires_grad_()
        self.implementations: Mapping[str, Callable[[], Call]] = {
            name: functools.partial(self._prepared, prepare) for name, prepare in peers.items()
        }

    def check(self, results: Results) -> float:
        """The largest error; raises AssertionError if a result breaks the error rule."""
        return self._expected.check(dict(zip(self._names, results, strict=True)))

    def dense(self) -> Tensor | None:
        """The mask as (1 or B, 1, S, S) bool, in which padding sees itself; None: full.

        A row without a key makes a softmax NaN, so that models let padding see something.
        """
        if self.interval is None:
            return None
        dense = self.interval.to_dense()
        if self.real is not None:
            own = torch.eye(self.size.seqlen, dtype=torch.bool, device=self.device)
            dense |= own & ~self.real[..., 0]
        return dense[:, None]

    def _prepared(self, prepare: Prepare) -> Call:
        attention = prepare(self)

        def forward() -> Results:
            return (attention(*self.qkv),)

        def forward_backward() -> Results:
            out = attention(*self.qkv)
            return (out.detach(), *torch.autograd.grad(out, self.qkv, self._dout))

        if self.mode == "forward + backward":
            return forward_backward
        if self.mode != "backward":
            return forward
        # A compiled backward pass may otherwise overwrite what its next call needs.
        with functorch_config.patch(donated_buffer=False):
            out = attention(*self.qkv)
        return lambda: torch.autograd.grad(out, self.qkv, self._dout, retain_graph=True)

    def _real_rows(self) -> Tensor | None:
        """(B, S, 1, 1) bool, False at padding; None: there is none."""
        if not self.mask.padded:
            return None
        first = self.size.seqlen - torch.tensor(self.mask.lengths, device=self.device)
        row = torch.arange(self.size.seqlen, device=self.device)
        return (row >= first[:, None])[..., None, None]

    def _pairs(self) -> int:
        """Pairs of a query and a key that it sees, in the whole batch."""
        if self.interval is None:
            return self.size.batch * self.size.seqlen**2
        pairs = int((self.interval.end - self.interval.start).sum(dtype=torch.int64))
        return pairs * (self.size.batch // self.interval.shape[0])

    def _bytes(self) -> int:
        q, k, v = (x.nbytes for x in self.qkv)
        forward, gradients = 2 * q + k + v, q + k + v
        if self.mode == "backward":  # reads q, k, v, out, dout and lse
            return forward + q + 4 * self.qkv[0][..., 0].numel() + gradients
        return forward + (q + gradients if self.backward else 0)
