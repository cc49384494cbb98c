"""What attention should return, and the check of what an implementation did return."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention.interval import IntervalMask

# Key heads that are checked, the scores of all of them, and those in memory at once, in float64.
CHECKED_HEADS = 64
CHECKED_SCORES = {"cpu": 2**25, "cuda": 2**32}
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}


class Expected:
    """The results of some heads from the oracle and from eager PyTorch, made when first needed.

    As many key heads, each with its query heads and whole, as CHECKED_HEADS and CHECKED_SCORES
    allow, spread over batch and heads; at least the last one of the last batch element.

    Args:
        qkv: (B, S, Hq or Hkv, D) each.
        dout: like q; None: gradients are not checked.
        interval: the mask; None: full.
        real: (B, S, 1, 1) bool, False at rows whose out is nobody's affair; None: all matter.
    """

    def __init__(
        self,
        qkv: Sequence[Tensor],
        dout: Tensor | None,
        interval: IntervalMask | None,
        real: Tensor | None,
    ) -> None:
        self.qkv, self.dout, self.interval, self.real = qkv, dout, interval, real
        batch, seqlen, self.kv_heads = qkv[1].shape[:3]
        self.group = qkv[0].shape[2] // self.kv_heads
        count, scores = batch * self.kv_heads, self.group * seqlen**2
        most = max(1, CHECKED_SCORES[qkv[0].device.type] // scores)
        checked = min(count, most, CHECKED_HEADS)
        self.checked = [
            divmod(count - 1 - index * count // checked, self.kv_heads) for index in range(checked)
        ]

    def check(self, results: Mapping[str, Tensor]) -> float:
        """The largest error of out, dq, dk and dv, as many as are there.

        Raises:
            AssertionError: one of them breaks the error rule; names it.
        """
        worst = 0.0
        for name, result in results.items():
            if name == "out" and self.real is not None:
                result = result.where(self.real, 0.0)
            assert result.isfinite().all(), f"{name}: not finite"  # heads not checked among them
            heads = [self._head(name, result.detach(), *which) for which in self.checked]
            got = torch.stack(heads)
            exact, eager = self._exact[name], self._eager[name]
            testing.assert_accurate(name, got, exact, eager, rounding=self._rounding)
            worst = max(worst, float((got.double() - exact).abs().max()))
        return worst

    def _head(self, name: str, x: Tensor, batch: int, kv_head: int) -> Tensor:
        """Of a result: a key head's (S, D), or for out and dq its query heads' (S, group, D)."""
        if name in ("dk", "dv"):
            return x[batch, :, kv_head]
        return x[batch].unflatten(1, (self.kv_heads, self.group))[:, kv_head]

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        def oracle(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None) -> Any:
            return mm.attention(q, k, v, mask=mask, return_lse=True, backend="reference")

        return self._solved(oracle, torch.float64)

    @functools.cached_property
    def _eager(self) -> dict[str, Tensor]:
        def eager(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask | None) -> Any:
            dense = None if mask is None else mask.to_dense()[:, None]
            return testing.eager_attention(q, k, v, mask=dense)

        return self._solved(eager, self.qkv[0].dtype)

    @functools.cached_property
    def _rounding(self) -> float:
        shared = [self._exact[name] for name in ("lse", "delta") if name in self._exact]
        return testing.attention_rounding(self.qkv[0].dtype, *shared)

    def _solved(self, attention: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        heads = [self._solved_head(attention, dtype, *which) for which in self.checked]
        return {name: torch.stack([head[name] for head in heads]) for name in heads[0]}

    def _solved_head(
        self, attention: Callable[..., Any], dtype: torch.dtype, batch: int, kv_head: int
    ) -> dict[str, Tensor]:
        """Results, lse and delta, in runs of rows: memory does not grow with the square of S."""
        q, k, v = (
            self._head(name, x.detach(), batch, kv_head).to(dtype)
            for name, x in zip(("dq", "dk", "dv"), self.qkv, strict=True)
        )
        key, value = (x[None, :, None] for x in (k, v))
        dkey, dvalue = (torch.zeros_like(x, dtype=torch.float64) for x in (key, value))
        found: dict[str, list[Tensor]] = {}
        step = max(1, SCORES_AT_ONCE[q.device.type] // (self.group * len(k)))
        for first in range(0, len(q), step):
            rows = slice(first, first + step)
            inputs = [
                x.detach().requires_grad_(self.dout is not None)
                for x in (q[None, rows], key, value)
            ]
            out, lse = attention(*inputs, self._rows(rows, batch))
            parts = {"out": out.detach()[0], "lse": lse.detach()[0].T}
            if self.dout is not None:
                dout = self._head("out", self.dout, batch, kv_head)[rows].to(dtype)
                dq, dk, dv = torch.autograd.grad(out, inputs, dout[None])
                dkey += dk
                dvalue += dv
                parts |= {"dq": dq[0], "delta": (dout * parts["out"]).sum(-1)}
            for name, part in parts.items():
                found.setdefault(name, []).append(part)
        whole = {name: torch.cat(parts) for name, parts in found.items()}
        return whole | {"dk": dkey[0, :, 0], "dv": dvalue[0, :, 0]}

    def _rows(self, rows: slice, batch: int) -> IntervalMask | None:
        if self.interval is None:
            return None
        which = batch if self.interval.shape[0] > 1 else 0
        start, end = (x[which : which + 1, rows] for x in (self.interval.start, self.interval.end))
        return IntervalMask(start, end, self.interval.seqlen_k)
