"""Attention, materialised: the one oracle for tests, benchmarks and fallback.

    s = softcap(softmax_scale * q k^T) + bias - slope * |i' - j|,  -inf where row i may not see key
    j p = exp(s - lse),  lse = log(sum_j exp(s) + exp(sink)),  out = dropout(p) v

with i' = i + Sk - Sq. Computed in float32, or float64 for float64 inputs, in O(Sq * Sk) memory.
`forward` is plain torch, so autograd runs through it, twice if asked; `backward` is the closed form
from (out, lse), which any backend's forward may have made:

    dv = dropout(p)^T dout,  dp = dropout(dout v^T),  delta = sum(dout * out) - dlse,
    ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dsink = -exp(sink - lse) delta

A row without a key has out 0, lse -inf and gradients 0. NaN or Inf in a key or value makes the rows
that see it NaN (a value: in its column) and reaches no other row.

Source: Dao et al., "FlashAttention", NeurIPS 2022, for the backward from (out, lse).
"""

from typing import Any

import torch
from torch import Tensor

from mmkernels._core.registry import register
from mmkernels.attention.dropout import keep_mask


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
    """out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq); arguments as in `_core/ops.py`."""
    visible = visible_keys(q, k, start, end, bias)
    scores, _ = _scores(q, k, visible, bias, alibi_slopes, softmax_scale, softcap)
    sink = scores.new_full((), -torch.inf) if sinks is None else sinks.to(scores.dtype)
    sink = sink.view(-1, 1, 1)
    if scores.shape[-1] == 0:
        pivot = scores.new_zeros((*scores.shape[:-1], 1))
    else:
        pivot = torch.maximum(scores.detach().amax(-1, keepdim=True), sink.detach())
        pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weights = torch.exp(scores - pivot)
    has_key = _has_key(weights, visible)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - pivot)
    total = torch.where(has_key, total, 1.0)
    lse = torch.where(has_key, pivot + torch.log(total), -torch.inf).squeeze(-1)
    kept = weights / total
    if visible is not None:  # where a row that saw NaN has made NaN of everything
        kept = kept.masked_fill(~visible, 0.0)
    if dropout_p > 0.0:
        kept = kept * _dropout_scale(seed, dropout_p, kept)
    values, poison = _values(v, q.shape[2], visible, kept.dtype)
    out = (kept @ values + poison).transpose(1, 2)
    return out.to(q.dtype).contiguous(), lse


def differentiable(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    """`forward` in its own precision whatever autocast says, for use under autograd."""
    with torch.autocast(q.device.type, enabled=False):
        return forward(q, *inputs)


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
    """dq, dk, dv, dbias, dsinks (the last two without elements where there is none)."""
    visible = visible_keys(q, k, start, end, bias)
    scores, softcap_slope = _scores(q, k, visible, bias, alibi_slopes, softmax_scale, softcap)
    dtype, heads = scores.dtype, q.shape[2]
    # A row without a key has lse -inf; exp(-inf - inf) is the 0 it needs.
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)[..., None]
    probabilities = torch.exp(scores - lse)
    values, _ = _values(v, heads, visible, dtype)
    dout = dout.to(dtype).transpose(1, 2)
    delta = (dout * out.to(dtype).transpose(1, 2)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(dtype)[..., None]
    kept, dprobabilities = probabilities, dout @ values.transpose(-1, -2)
    if dropout_p > 0.0:
        scale = _dropout_scale(seed, dropout_p, probabilities)
        kept, dprobabilities = probabilities * scale, dprobabilities * scale
    dscores = probabilities * (dprobabilities - delta)
    if visible is not None:  # where a row that saw NaN has made 0 * NaN
        kept, dscores = kept.masked_fill(~visible, 0.0), dscores.masked_fill(~visible, 0.0)
    dbias = _sum_to(dscores, bias) if bias is not None and bias_grad else q.new_empty(0)
    dsinks = q.new_empty(0)
    if sinks is not None:
        weight = torch.exp(sinks.to(dtype).view(-1, 1, 1) - lse)
        dsinks = -(weight * delta).sum((0, 2, 3)).to(sinks.dtype)
    if softcap_slope is not None:
        dscores = dscores * softcap_slope
    dscores = dscores * softmax_scale
    dq = dscores @ _per_query_head(_finite(k), heads, dtype)
    dk = dscores.transpose(-1, -2) @ q.to(dtype).transpose(1, 2)
    dv = kept.transpose(-1, -2) @ dout
    groups = (k.shape[2], heads // k.shape[2] if k.shape[2] else 1)
    dk, dv = (grad.unflatten(1, groups).sum(2) for grad in (dk, dv))
    dq, dk, dv = (
        grad.transpose(1, 2).to(tensor.dtype).contiguous()
        for grad, tensor in ((dq, q), (dk, k), (dv, v))
    )
    return dq, dk, dv, dbias, dsinks


def visible_keys(
    q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """(1 or B, 1 or Hq, Sq, Sk) bool, True where a row sees a key; None if every row sees all.

    A bool bias shows the keys where it is True, a float one hides those where it is -inf.
    """
    visible = None
    if start is not None and end is not None:
        keys = torch.arange(k.shape[1], device=k.device, dtype=torch.int32)
        visible = ((keys >= start[..., None]) & (keys < end[..., None]))[:, None]
    if bias is not None:
        shown = bias if bias.dtype == torch.bool else bias.detach() != -torch.inf
        visible = shown if visible is None else visible & shown
        visible = visible.expand(*visible.shape[:2], q.shape[1], k.shape[1])
    return visible


def _scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, Hq, Sq, Sk), -inf where hidden, and the derivative of the softcap or None."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = _per_query_head(_finite(k), q.shape[2], dtype)
    scores = (q.to(dtype).transpose(1, 2) @ keys.transpose(-1, -2)) * softmax_scale
    softcap_slope = None
    if softcap > 0.0:
        tanh = torch.tanh(scores / softcap)
        scores, softcap_slope = softcap * tanh, 1.0 - tanh * tanh
    if alibi_slopes is not None:
        scores = scores - alibi_distance(q, k, alibi_slopes.to(dtype))
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(dtype)
    # NaN for a key with an element that is not finite, else 0.
    poison = _per_query_head((k.detach() * 0.0).sum(-1, keepdim=True), q.shape[2], dtype)
    scores = scores + poison.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores, softcap_slope


def alibi_distance(q: Tensor, k: Tensor, alibi_slopes: Tensor) -> Tensor:
    """slope * |i + Sk - Sq - j|: (1 or B, Hq, Sq, Sk) from slopes (Hq,) or (B, Hq)."""
    row = torch.arange(q.shape[1], device=q.device) + (k.shape[1] - q.shape[1])
    key = torch.arange(k.shape[1], device=q.device)
    return torch.atleast_2d(alibi_slopes)[..., None, None] * (row[:, None] - key).abs()


def _has_key(weights: Tensor, visible: Tensor | None) -> Tensor:
    """(.., Sq, 1) bool, broadcastable to the rows: does the row see any key."""
    if visible is not None:
        return visible.any(-1, keepdim=True)
    return weights.new_full((), weights.shape[-1] > 0, dtype=torch.bool)


def _dropout_scale(seed: Tensor | None, dropout_p: float, like: Tensor) -> Tensor:
    """1 / (1 - dropout_p) where dropout keeps, else 0: (B, Hq, Sq, Sk)."""
    assert seed is not None  # the API draws one whenever dropout_p > 0
    keep = keep_mask(seed, dropout_p, *like.shape).to(like.dtype)
    return keep / (1.0 - dropout_p) if dropout_p < 1.0 else keep


def _values(
    v: Tensor, heads: int, visible: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values (B, Hq, Sk, Dv), 0 where not finite, and a term that is NaN where a row saw that."""
    hit = _per_query_head(v.detach() * 0.0, heads, dtype).isnan()
    everywhere = hit.any(-2, keepdim=True)
    hits = everywhere if visible is None else visible.to(dtype) @ hit.to(dtype) > 0.0
    poison = torch.zeros_like(hits, dtype=dtype).masked_fill(hits, torch.nan)
    return _per_query_head(_finite(v), heads, dtype), poison


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.detach().isfinite(), x, 0.0)


def _per_query_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, S, Hkv, D) -> (B, Hq, S, D): query head h reads key head h // (Hq / Hkv)."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _sum_to(grad: Tensor, bias: Tensor) -> Tensor:
    """Sums (B, Hq, Sq, Sk) over the dimensions in which bias is broadcast."""
    dims = [dim for dim in range(4) if bias.shape[dim] == 1 and grad.shape[dim] != 1]
    grad = grad.sum(dims, keepdim=True) if dims else grad
    return grad.to(bias.dtype).contiguous()


def why_not(*inputs: object) -> None:
    """Serves everything."""


register("attention_forward", "reference", forward, why_not)
register("attention_backward", "reference", backward, why_not)
