"""One backend's forward pass with another's backward pass, held to the error rule."""

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops
from mmkernels.attention.interval import IntervalMask
from tests.attention import backends

Tensors = list[Tensor]


def run_eager(
    inputs: Tensors, mask: IntervalMask | None, extra: tuple[str, ...], cotangents: Tensors
) -> Tensors:
    """out, lse and the gradients of eager PyTorch in the inputs' dtype."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    dense = None if mask is None else mask.to_dense()[:, None]
    named = dict(zip(extra, leaves[3:], strict=True))
    out, lse = testing.eager_attention(*leaves[:3], mask=dense, **named)
    results = [(out, cotangents[0]), (lse.where(lse > -torch.inf, 0.0), cotangents[1])]
    tensors, grads = zip(*results, strict=True)
    grads = torch.autograd.grad(
        tensors, leaves, [g.to(t.dtype) for t, g in zip(tensors, grads, strict=True)]
    )
    return [out, lse, *grads]


def run_exact(
    inputs: Tensors, mask: IntervalMask | None, extra: tuple[str, ...], cotangents: Tensors
) -> Tensors:
    """The reference in float64, under autograd."""
    leaves = [x.double().requires_grad_() for x in inputs]
    named = dict(zip(extra, leaves[3:], strict=True))
    results = mm.attention(*leaves[:3], mask=mask, return_lse=True, backend="reference", **named)
    grads = torch.autograd.grad(results, leaves, [g.double() for g in cotangents])
    return [*results, *grads]


def run_ops(
    inputs: Tensors,
    mask: IntervalMask | None,
    extra: tuple[str, ...],
    cotangents: Tensors,
    forward: str,
    backward: str,
) -> Tensors:
    """One backend's forward with another one's backward."""
    q, k, v = inputs[:3]
    named = dict(zip(extra, inputs[3:], strict=True))
    bias, sinks = named.get("bias"), named.get("sinks")
    bounds, rows = (None, None), (None, None)
    if mask is not None:
        bounds = (mask.start, mask.end)
        # They spare work, and may be missing.
        rows = mask.key_rows(k.shape[1]) if forward == backward else rows
    scores = (bias, None, sinks, None)
    numbers = (q.shape[-1] ** -0.5, 0.0, 0.0)
    out, lse = ops.attention_forward(q, k, v, *bounds, *scores, *numbers, forward)
    dq, dk, dv, dbias, dsinks = ops.attention_backward(
        *cotangents, q, k, v, out, lse, *bounds, *rows, *scores, *numbers,
        bias is not None, True, backward,
    )  # fmt: skip
    extras = {"bias": dbias, "sinks": dsinks}
    return [out, lse, dq, dk, dv, *(extras[name] for name in extra)]


def problem(
    sizes: tuple[int, ...],
    mask_name: str,
    dtype: torch.dtype,
    extra: tuple[str, ...] = (),
    seed: int = 0,
) -> tuple[Tensors, IntervalMask | None, tuple[str, ...], Tensors]:
    """Inputs (q, k, v and those of `extra`), mask, extra and the gradients of out and lse.

    Args: as for `check`.
    """
    batch, seqlen_q, seqlen_k, heads, _, _, value_dim = sizes
    generator = torch.Generator().manual_seed(seed + 1)
    make = {
        "bias": lambda: torch.randn((heads, seqlen_q, seqlen_k), generator=generator)[None],
        "sinks": lambda: torch.randn(heads, generator=generator),
    }
    inputs = [*testing.make_qkv(*sizes, dtype=dtype, seed=seed)]
    inputs += [make[name]().to(dtype) for name in extra]
    mask = testing.MASKS[mask_name](batch, seqlen_q, seqlen_k)
    dout = torch.randn((batch, seqlen_q, heads, value_dim), generator=generator).to(dtype)
    dlse = torch.randn((batch, heads, seqlen_q), generator=generator).to(ops.lse_dtype(dtype))
    return inputs, mask, extra, [dout, dlse]


def hold(
    got: Tensors,
    inputs: Tensors,
    mask: IntervalMask | None,
    extra: tuple[str, ...],
    cotangents: Tensors,
) -> None:
    """Raises unless `got` (out, lse and all gradients) obeys the error rule for a `problem`."""
    arguments = (inputs, mask, extra, cotangents)
    exact, eager = run_exact(*arguments), run_eager(*arguments)
    names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in extra)]
    exact = [x.detach() for x in exact]
    dout, dlse = cotangents
    delta = (dout.double() * exact[0]).sum(-1).transpose(1, 2) - dlse
    rounding = testing.attention_rounding(inputs[0].dtype, exact[1], delta)
    for name, *values in zip(names, got, exact, eager, strict=True):
        limit = rounding
        if name == "dsinks":  # a sum over all rows, in which large terms cancel
            terms = torch.exp(inputs[-1].double()[:, None] - exact[1]).where(
                exact[1] > -torch.inf, 0
            )
            limit *= float((terms * delta.abs()).sum((0, 2)).max() / values[1].abs().max())
        testing.assert_accurate(name, *values, rounding=limit)


def check(
    sizes: tuple[int, ...],
    mask_name: str,
    dtype: torch.dtype,
    forward: str,
    backward: str,
    extra: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Raises unless out, lse and all gradients obey the error rule.

    Args:
        sizes: batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, value_dim.
        mask_name: of `testing.MASKS`.
        dtype: of the inputs.
        forward: the backend of the forward pass.
        backward: the backend of the backward pass.
        extra: any of "bias" (1, Hq, Sq, Sk) and "sinks", which also get a gradient.
        seed: of the inputs.
    """
    device = "cuda" if "cuda" in map(testing.device_for, (forward, backward)) else "cpu"
    inputs, mask, extra, cotangents = problem(sizes, mask_name, dtype, extra, seed)
    arguments = backends.moved((inputs, mask, extra, cotangents), device)
    hold(run_ops(*arguments, forward, backward), *arguments)
