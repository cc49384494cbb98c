"""Attention over a sequence that is spread over processes, beside the same in one process."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import mmkernels as mm
from mmkernels import distributed, testing
from mmkernels.attention.interval import IntervalMask
from mmkernels.distributed import Layout
from tests.distributed import world

FORMS = ("ring_attention", "all_to_all_attention")


class Problem(NamedTuple):
    """One call, the same on all processes."""

    form: str
    mask: str = "causal"
    layout: str = "zigzag"
    ranks: int = 2
    batch: int = 2
    seqlen: int = 45
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    lse: bool = True
    sinks: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012, never changed

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v, dout and dlse over the whole sequence, and sinks."""
        q, k, v = testing.make_qkv(
            self.batch, self.seqlen, self.seqlen, self.heads, self.kv_heads, self.head_dim,
            self.value_dim, dtype=self.dtype,
        )  # fmt: skip
        shape = (self.batch, self.seqlen, self.heads, self.value_dim)
        dout = torch.randn(shape).to(self.dtype)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        dlse = torch.randn(self.batch, self.heads, self.seqlen, dtype=wide)
        sinks = torch.randn(self.heads).to(self.dtype)
        return {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse, "sinks": sinks}

    def whole_mask(self) -> IntervalMask | None:
        """Over the whole sequence."""
        return testing.MASKS[self.mask](self.batch, self.seqlen, self.seqlen)

    def make_layout(self) -> Layout:
        """By its name."""
        if self.layout == "zigzag":
            return Layout.zigzag(self.seqlen, self.ranks)
        if self.layout == "unequal":
            shares = torch.tensor([5, 0, 1, 2, 7][: self.ranks] if self.ranks > 2 else [1, 3])
            ends = (shares.cumsum(0) * self.seqlen // shares.sum()).tolist()
            return Layout.contiguous([b - a for a, b in zip([0, *ends], ends, strict=False)])
        if self.layout == "balanced":
            mask = self.whole_mask() or mm.masks.full(self.seqlen)
            return Layout.balanced(mask, self.ranks)
        drawn = torch.randint(
            self.ranks, (self.seqlen,), generator=torch.Generator().manual_seed(1)
        )
        return Layout([(drawn == rank).nonzero()[:, 0] for rank in range(self.ranks)])


def spread(problem: Problem) -> dict[str, Tensor]:
    """Results of this process, on the CPU."""
    rank, device = torch.distributed.get_rank(), world.device_type(problem.ranks)
    mesh = init_device_mesh(device, (problem.ranks,))
    layout = problem.make_layout()
    whole = problem.inputs()
    mine = {name: layout.shard(whole[name], rank).to(device) for name in ("q", "k", "v", "dout")}
    mine["dlse"] = layout.shard(whole["dlse"], rank, dim=2).to(device)
    leaves = {name: mine[name].requires_grad_() for name in ("q", "k", "v")}
    sinks = None
    if problem.sinks:
        leaves["sinks"] = sinks = whole["sinks"].to(device).requires_grad_()
    mask = problem.whole_mask()
    result = getattr(distributed, problem.form)(
        leaves["q"], leaves["k"], leaves["v"], mesh, layout,
        mask=None if mask is None else mask.to(device), sinks=sinks, return_lse=problem.lse,
        **problem.options,
    )  # fmt: skip
    out, lse = result if problem.lse else (result, None)
    loss = (out * mine["dout"]).sum()
    if lse is not None:
        loss = loss + (lse.where(lse.isfinite(), 0.0) * mine["dlse"]).sum()
    loss.backward()
    results = {"out": out} | ({} if lse is None else {"lse": lse})
    results |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: x.detach().cpu() for name, x in results.items()}


def together(problem: Problem) -> dict[str, Tensor]:
    """The results of all processes as those of one."""
    parts = world.run(problem.ranks, spread, problem)
    layout = problem.make_layout()
    whole = {}
    for name in parts[0]:
        shards = [part[name] for part in parts]
        if name == "dsinks":
            whole[name] = torch.stack(shards).sum(0)
        else:
            whole[name] = layout.unshard(shards, dim=2 if name == "lse" else 1)
    return whole


def alone(problem: Problem, dtype: torch.dtype, eager: bool = False) -> dict[str, Tensor]:
    """The same in one process: `reference` in dtype, or eager PyTorch."""
    whole = problem.inputs()
    leaves = {
        name: whole[name].to(dtype).requires_grad_()
        for name in ("q", "k", "v", *(["sinks"] if problem.sinks else []))
    }
    mask, options = problem.whole_mask(), dict(problem.options)
    if eager:
        for name in ("causal", "window_size", "backend", "deterministic"):
            given = options.pop(name, None)
            if name == "causal" and given:
                mask = mm.masks.causal(problem.seqlen)
            if name == "window_size" and given:
                mask = mm.masks.window(problem.seqlen, window_size=given)
        dense = None if mask is None else mask.to_dense(problem.seqlen)[:, None]
        out, lse = testing.eager_attention(**leaves, mask=dense, **options)
    else:
        options["backend"] = "reference"
        out, lse = mm.attention(**leaves, mask=mask, return_lse=True, **options)
    loss = (out * whole["dout"].to(dtype)).sum()
    if problem.lse:
        loss = loss + (lse.where(lse.isfinite(), 0.0) * whole["dlse"].to(lse.dtype)).sum()
    loss.backward()
    results = {"out": out, "lse": lse} if problem.lse else {"out": out}
    results |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: x.detach() for name, x in results.items()}


def check(problem: Problem) -> None:
    """Raises unless all outputs and gradients obey the error rule."""
    torch.manual_seed(0)
    got = together(problem)
    torch.manual_seed(0)
    exact = alone(problem, torch.float64)
    torch.manual_seed(0)
    eager = alone(problem, problem.dtype, eager=True)
    assert got.keys() == exact.keys()
    shared = [exact["lse"]] if problem.lse else []
    delta = (problem.inputs()["dout"].double() * exact["out"]).sum(-1)
    for name in got:
        rounding = testing.attention_rounding(
            problem.dtype, *shared, *([delta] if name.startswith("d") else [])
        )
        testing.assert_accurate(name, got[name], exact[name], eager[name], rounding)
