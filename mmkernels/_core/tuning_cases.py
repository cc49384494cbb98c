"""What tuning attention runs: one call of an op, with the reference's results beside it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels import testing
from mmkernels._core import ops
from mmkernels._core.tuning import Problem
from mmkernels._core.tuning_search import Case
from mmkernels.attention.decode import bounds
from mmkernels.attention.interval import IntervalMask


class Sizes(NamedTuple):
    """Of a call's tensors."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int


# Timed: enough tiles for every multiprocessor. Checked: lengths that no tile divides, and (but for
# decode, which shares few heads' keys out) more keys than four stages of tiles hold.
TIMED, CHECKED = Sizes(4, 2048, 2048, 16, 4), Sizes(2, 261, 653, 4, 2)
TIMED_DECODE, CHECKED_DECODE = Sizes(32, 1, 4096, 32, 8), Sizes(3, 1, 653, 8, 2)
# Queries and page size, 0 for no pages, of what a configuration of decode serves besides: pages,
# looked up by key or by tile and with nearly twice the stages, and the most rows of a tile.
DECODE_VARIANTS, VARIED = ((1, 16), (1, 128), (13, 0), (13, 16)), Sizes(3, 1, 640, 8, 2)
# For a dry run.
TOY = {
    "timed": Sizes(1, 1, 35, 2, 1),
    "checked": Sizes(1, 5, 35, 2, 1),
    "varied": Sizes(1, 1, 128, 2, 1),
}


def make_case(
    problem: Problem,
    device: torch.device | str,
    *,
    timed: Sizes | None = None,
    checked: Sizes | None = None,
    varied: Sizes = VARIED,
    backend: str = "triton",
) -> Case:
    """The case of a problem, with the usual sizes unless others are given."""
    decode = problem.kernel == "decode"
    large = _Call(problem, timed or (TIMED_DECODE if decode else TIMED), device, "causal")
    large.made = large.forward(backend, problem.dtype) if large.backward else None
    small = _Call(problem, checked or (CHECKED_DECODE if decode else CHECKED), device, "ragged")
    checks = [_check(small, problem, backend)]
    for queries, page_size in DECODE_VARIANTS if decode else ():
        sizes = varied._replace(seqlen_q=queries)
        checks.append(_check(_Call(problem, sizes, device, "", page_size), problem, backend))

    def verify() -> None:
        for check in checks:
            check()

    return Case(problem, verify, lambda: large.run(backend, problem.dtype))


def _check(call: "_Call", problem: Problem, backend: str) -> Callable[[], None]:
    """Runs a call; raises unless the results obey the error rule."""
    # Its forward pass is the reference's, so that only the backward pass's error counts.
    call.made = out, lse = call.forward("reference", torch.float64)
    exact = call.run("reference", torch.float64)
    eager = call.eager()
    delta = (call.dout.double() * out).sum(-1).transpose(1, 2) - call.dlse
    rounding = testing.attention_rounding(problem.dtype, lse, *[delta] * call.backward)

    def check() -> None:
        got = call.run(backend, problem.dtype)
        for name, x, wanted, yardstick in zip(call.names, got, exact, eager, strict=True):
            testing.assert_accurate(name, x, wanted, yardstick, rounding)

    return check


class _Call:
    """The inputs of the op that runs a problem's kernel.

    Attributes:
        table: of a decode call whose cache is cut into pages, where each of them lies.
        backward: it is a backward op.
        names: of its results.
        made: out, lse of the forward pass, for a backward op.
    """

    made: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        problem: Problem,
        sizes: Sizes,
        device: torch.device | str,
        mask: str,
        page_size: int = 0,
    ) -> None:
        kernel, head_dim, value_dim, dtype, masked, _ = problem
        self.kernel, self.dtype = kernel, dtype
        self.qkv = testing.make_qkv(*sizes, head_dim, value_dim, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(1)
        batch, seqlen_q, seqlen_k, heads, _ = sizes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.bias = None
        if problem.bias or kernel == "backward_bias":
            self.bias = normal(1, heads, seqlen_q, seqlen_k).to(dtype)
        self.dout = normal(batch, seqlen_q, heads, value_dim).to(dtype)
        self.dlse = normal(batch, heads, seqlen_q)
        self.mask: IntervalMask | None = None
        if kernel == "decode":
            lengths = seqlen_k - torch.arange(batch, dtype=torch.int32) * (seqlen_k // (2 * batch))
            self.lengths = lengths.to(device)
            self.mask = IntervalMask(*bounds(self.lengths, seqlen_q, -1, 0), seqlen_k)
        elif masked:
            built = testing.MASKS[mask](batch, seqlen_q, seqlen_k)
            self.mask = built.to(device) if built is not None else None
        self.table = None
        if page_size:
            pages = batch * seqlen_k // page_size
            order = torch.randperm(pages, generator=generator, dtype=torch.int32)
            self.table = order.view(batch, -1).to(device)
        self.backward = kernel.startswith("backward")
        self.names = ["dq", "dk", "dv"] if self.backward else ["out", "lse"]
        if kernel == "backward_bias":
            self.names.append("dbias")

    def forward(self, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out, lse."""
        q, k, v = (x.to(dtype) for x in self.qkv)
        start, end = (None, None) if self.mask is None else (self.mask.start, self.mask.end)
        bias = None if self.bias is None else self.bias.to(dtype)
        scale = q.shape[-1] ** -0.5
        return ops.attention_forward(
            q, k, v, start, end, bias, None, None, None, scale, 0.0, 0.0, backend
        )

    def run(self, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """The results that `names` says, from inputs cast to dtype."""
        if self.made is not None and self.backward:
            return self._run_backward(backend, dtype, *self.made)
        if self.kernel != "decode":
            return list(self.forward(backend, dtype))
        q, k, v = (x.to(dtype) for x in self.qkv)
        if self.table is not None:
            place = self.table.flatten().long().argsort()
            k, v = (x.reshape(len(place), -1, *x.shape[2:])[place] for x in (k, v))
        numbers = (q.shape[-1] ** -0.5, 0.0, -1, 0)
        return list(
            ops.attention_decode(q, k, v, self.lengths, self.table, None, None, *numbers, backend)
        )

    def _run_backward(
        self, backend: str, dtype: torch.dtype, out: Tensor, lse: Tensor
    ) -> list[Tensor]:
        dout, q, k, v, out = (x.to(dtype) for x in (self.dout, *self.qkv, out))
        dlse, lse = (x.to(ops.lse_dtype(dtype)) for x in (self.dlse, lse))
        ranges: tuple[Tensor | None, ...] = (None,) * 4
        if self.mask is not None:
            ranges = (self.mask.start, self.mask.end, *self.mask.key_rows(k.shape[1]))
        bias = None if self.bias is None else self.bias.to(dtype)
        results = ops.attention_backward(
            dout, dlse, q, k, v, out, lse, *ranges, bias, None, None, None,
            q.shape[-1] ** -0.5, 0.0, 0.0, self.kernel == "backward_bias", True, backend,
        )  # fmt: skip
        return list(results[: len(self.names)])

    def eager(self) -> list[Tensor]:
        """The same of eager PyTorch in the problem's dtype."""
        leaves = [x.clone().requires_grad_() for x in self.qkv]
        if self.bias is not None:
            leaves.append(self.bias.clone().requires_grad_())
        dense = None if self.mask is None else self.mask.to_dense(leaves[1].shape[1])[:, None]
        bias = leaves[3] if self.bias is not None else None
        out, lse = testing.eager_attention(*leaves[:3], mask=dense, bias=bias)
        if not self.backward:
            return [out.detach(), lse.detach()]
        results = [out, lse.where(lse > -torch.inf, 0.0)]
        cotangents = [self.dout, self.dlse.to(lse.dtype)]
        return list(torch.autograd.grad(results, leaves[: len(self.names)], cotangents))
