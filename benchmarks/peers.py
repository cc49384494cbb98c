"""One attention problem, the implementations that solve it, and the check of what they return.

All of them read the same memory, (B, S, H, D) as a model's projections leave it; torch's functions
get transposed views. Masks are built before the clock starts.
"""

import functools
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mm
from benchmarks.environment import SEED
from mmkernels import testing
from mmkernels.attention.interval import IntervalMask

# (q, k, v) -> out, all (B, S, H, D).
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# FlexAttention's (b, h, q_idx, kv_idx) -> bool.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """Batch is 1; queries and keys are equally many and so are their heads."""

    seqlen: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"B1 H{self.heads} S{self.seqlen} D{self.head_dim}"


class Expected(NamedTuple):
    """One head's out, dq, dk and dv: exact, from eager PyTorch, and their rounding."""

    exact: Sequence[Tensor]
    eager: Sequence[Tensor]
    rounding: float


class Problem:
    """Seeded q, k, v and dout (1, S, H, D) under a mask; a mask of None shows every key."""

    def __init__(self, size: Size, mask: IntervalMask | None, dtype: torch.dtype) -> None:
        self.size, self.mask, self.dtype = size, mask, dtype
        shape = (1, size.seqlen, size.seqlen, size.heads, size.heads, size.head_dim)
        qkv = testing.make_qkv(*shape, dtype=dtype, seed=SEED)
        self.qkv = [x.requires_grad_() for x in qkv]
        self.dout = testing.make_qkv(*shape, dtype=dtype, seed=SEED + 1)[0]

    def solver(self, attention: Attention, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """A call that returns (out,), or with `backward` (out, dq, dk, dv)."""

        inference = [x.detach() for x in self.qkv]

        def forward() -> tuple[Tensor, ...]:
            return (attention(*inference),)

        def forward_backward() -> tuple[Tensor, ...]:
            out = attention(*self.qkv)
            return (out.detach(), *torch.autograd.grad(out, self.qkv, self.dout))

        return forward_backward if backward else forward

    @functools.cached_property
    def expected(self) -> Expected:
        """The last head's results; all heads at once would not fit into memory."""

        def solve(
            attention: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
        ) -> list[Tensor]:
            qkv = [x[:, :, -1:].detach().to(dtype).requires_grad_() for x in self.qkv]
            out, lse = attention(*qkv)
            grads = torch.autograd.grad(out, qkv, self.dout[:, :, -1:].to(dtype))
            return [out.detach(), *grads, lse.detach()]

        dense = None if self.mask is None else self.mask.to_dense()[:, None]
        *exact, lse = solve(
            lambda *qkv: mm.attention(*qkv, mask=self.mask, return_lse=True, backend="reference"),
            torch.float64,
        )
        *eager, _ = solve(lambda *qkv: testing.eager_attention(*qkv, mask=dense), self.dtype)
        delta = (self.dout[:, :, -1:].double() * exact[0]).sum(-1)
        return Expected(exact, eager, testing.attention_rounding(self.dtype, lse, delta))

    def check(self, who: str, results: tuple[Tensor, ...]) -> float:
        """The largest error of `results`; raises if one breaks the error rule."""
        exact, eager, rounding = self.expected
        errors = []
        for name, got, *wanted in zip(
            ("out", "dq", "dk", "dv"), results, exact, eager, strict=False
        ):
            got = got[:, :, -1:]
            testing.assert_accurate(f"{who}: {name}", got, *wanted, rounding=rounding)
            errors.append(float((got.double() - wanted[0]).abs().max()))
        return max(errors)


def ours(mask: IntervalMask | None) -> Attention:
    """`mmkernels.attention`."""
    return lambda q, k, v: mm.attention(q, k, v, mask=mask)


def sdpa(
    dtype: torch.dtype, mask: IntervalMask | None = None, is_causal: bool = False
) -> Attention:
    """torch's SDPA with the dense mask it needs, in the form that it converts least.

    Additive, in q's dtype, and of four dimensions: with three, SDPA leaves its flash kernel.
    """
    dense = None
    if mask is not None:
        dense = torch.zeros((), dtype=dtype).where(mask.to_dense()[:, None], -torch.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=is_causal)
        return out.transpose(1, 2)

    return attention


def flex(mask_mod: MaskMod, size: Size) -> Attention:
    """torch's FlexAttention, compiled, its block mask built; on a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(mask_mod, None, None, size.seqlen, size.seqlen, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return attention


def why_not_flex() -> str | None:
    """Why FlexAttention cannot run on this machine."""
    return None if shutil.which("g++") else "FlexAttention on a CPU needs g++, which is not on PATH"
