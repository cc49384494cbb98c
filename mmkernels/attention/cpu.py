"""Attention on torch's CPU flash kernel, run only on the keys that the mask leaves.

`plan.py` cuts the mask into pieces. Pieces of the same rows are merged by their lse,

    lse = log(sum_n exp(lse_n)),  out = sum_n exp(lse_n - lse) out_n

and share the merged lse in the backward pass: exp(s - lse) is then the right probability in every
piece, so the pieces' gradients add up. Two columns of arithmetic give what the kernel lacks:

* Dv != D: zero columns widen the narrower ones.
* The gradient of lse: one more column, 1 in dout and -dlse in out, turns the kernel's sum(dout *
  out) into delta - dlse, which is the one place where lse's gradient enters.

The kernel multiplies a hidden NaN or Inf by 0. Such a product shows in the output, which is
checked; all then runs again on `reference`, tile by tile.
"""

import torch
from torch import Tensor

from mmkernels._core.ops import lse_dtype
from mmkernels._core.registry import register
from mmkernels.attention import cpu_flash
from mmkernels.attention.cpu_flash import widened
from mmkernels.attention.cpu_work import Work, all_finite


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
    """out (B, Sq, Hq, Dv) and lse (B, Hq, Sq); arguments as in `_core/ops.py`."""
    plain = start is bias is alibi_slopes is sinks is None
    if plain and cpu_flash.serves(q, k, v):  # one call: here overhead shows
        out, lse = cpu_flash.forward(q, k, v, False, None, softmax_scale)
        return out.contiguous(), lse.contiguous()
    inputs = (q, k, v, start, end, bias, alibi_slopes, softmax_scale)
    work = Work(*inputs)
    out, lse = _forward(work, q, k, v)
    if work.hides and not all_finite(out):
        out, lse = _forward(Work(*inputs, careful=True), q, k, v)
    if sinks is not None:
        no_key = lse == -torch.inf
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        share = torch.exp(lse - total).masked_fill_(no_key, 0.0)
        out *= share.transpose(1, 2)[..., None]
        lse = total.masked_fill_(no_key, -torch.inf)
    return out, lse


def _forward(work: Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    value_dim = v.shape[-1]
    width = max(q.shape[-1], value_dim)
    q, k, v = widened(q, width), widened(k, width), widened(v, width)
    if work.whole:
        out, lse = work.forward(*work.blocks[0], q, k, v)
        out = out if width == value_dim else out[..., :value_dim]
        return out.contiguous(), lse.contiguous()
    batch_size, seqlen_q, heads = q.shape[:3]
    shape = (batch_size, seqlen_q, heads, value_dim)
    out = q.new_empty(shape) if work.covers else q.new_zeros(shape)
    lse = q.new_full((batch_size, heads, seqlen_q), -torch.inf, dtype=lse_dtype(q.dtype))
    for batch, block in work.blocks:
        block_out, block_lse = work.forward(batch, block, q, k, v)
        out[batch, block.rows] = block_out[..., :value_dim]
        lse[batch, :, block.rows] = block_lse
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    row_start: Tensor | None,
    row_end: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias (no elements), dsinks (no elements without sinks)."""
    none = q.new_empty(0)
    plain = dlse is start is bias is alibi_slopes is sinks is None
    if plain and cpu_flash.serves(q, k, v) and dout.stride(-1) == 1:
        dq, dk, dv = cpu_flash.backward(dout, q, k, v, out, lse, False, None, softmax_scale)
        dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
        return dq, dk, dv, none, none
    work = Work(q, k, v, start, end, bias, alibi_slopes, softmax_scale)
    if work.hides and not (all_finite(k) and all_finite(v)):
        work = Work(q, k, v, start, end, bias, alibi_slopes, softmax_scale, careful=True)
    # A row without a key has lse -inf; exp(s - inf) is the 0 it needs.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dsinks = none
    if sinks is not None:
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        sink_weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        dsinks = -(sink_weight * delta).sum((0, 2)).to(sinks.dtype)
    dims, dtype = (q.shape[-1], k.shape[-1], v.shape[-1]), q.dtype
    if dtype.itemsize == 2 and dlse is not None:  # float16 may not hold dlse
        q, k, v, out, dout = (x.to(lse.dtype) for x in (q, k, v, out, dout))
    width = max(dims) + (dlse is not None)
    q, k, v, out, dout = (widened(x, width) for x in (q, k, v, out, dout))
    if dlse is not None:
        dout[..., -1] = 1.0
        out[..., -1] = -dlse.transpose(1, 2)
    if work.whole and len(work.blocks[0][1].pieces) == 1:
        batch, block = work.blocks[0]
        (piece,) = block.pieces
        covers = piece.keys == slice(0, k.shape[1])
    else:
        covers = False
    if covers:
        grads = work.backward(batch, block, piece, dout, q, k, v, out, lse)
    else:
        # Many pieces may add to one key, so 16-bit gradients are summed in float32.
        sums = tuple(x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
        for batch, block in work.blocks:
            for piece in block.pieces:
                parts = work.backward(batch, block, piece, dout, q, k, v, out, lse)
                places = (block.rows, piece.keys, piece.keys)
                for total, part, place in zip(sums, parts, places, strict=True):
                    total[batch, place] += part
        dq, dk, dv = (total.to(dtype) for total in sums)
        grads = (dq, dk, dv)
    dq, dk, dv = (
        grad[..., :dim].to(dtype).contiguous() for grad, dim in zip(grads, dims, strict=True)
    )
    return dq, dk, dv, none, dsinks


def declines(q: Tensor, softcap: float, dropout_p: float) -> str | None:
    """Why torch's CPU flash kernel cannot serve a pass, or None."""
    if q.device.type != "cpu":
        return f"q is on {q.device}; this backend serves CPU tensors"
    if softcap > 0.0:
        return "softcap: torch's CPU flash kernel has none"
    if dropout_p > 0.0:
        return "dropout_p > 0: torch's CPU flash kernel has no dropout"
    return None


def forward_why_not(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, bias: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, softmax_scale: float,
    softcap: float, dropout_p: float,
) -> str | None:  # fmt: skip
    """Declines softcap, dropout and tensors that are not on the CPU."""
    return declines(q, softcap, dropout_p)


def backward_why_not(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    start: Tensor | None, end: Tensor | None, row_start: Tensor | None, row_end: Tensor | None,
    bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    softmax_scale: float, softcap: float, dropout_p: float, bias_grad: bool, deterministic: bool,
) -> str | None:  # fmt: skip
    """Declines what `forward_why_not` does, and a gradient of bias."""
    if bias_grad:
        return "bias needs a gradient: torch's CPU flash kernel gives none"
    return declines(q, softcap, dropout_p)


register("attention_forward", "cpu", forward, forward_why_not)
register("attention_backward", "cpu", backward, backward_why_not)
