"""From the public functions' arguments to the forward op's inputs, and from there to a result."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._core import dtensors, ops, registry, spread
from mmkernels._core.registry import Explanation
from mmkernels._core.values import readable
from mmkernels.attention import checks, masks, reference
from mmkernels.attention.autograd import attend
from mmkernels.attention.dropout import draw_seed
from mmkernels.attention.interval import IntervalMask


class Call(NamedTuple):
    """A checked call.

    Attributes:
        inputs: the forward op's inputs less `backend`.
        mask: the interval mask that start and end came from, if any.
        deterministic: for the backward pass.
        backend: the one asked for, or "auto".
    """

    inputs: tuple
    mask: IntervalMask | None
    deterministic: bool
    backend: str


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    deterministic: bool = True,
    backend: str = "auto",
    where: str = "attention",
) -> Call:
    """Checks the arguments of `mmkernels.attention`; `where` is the name in error messages."""
    backend = registry.requested(backend)
    checks.check_types(where, causal, generator)
    q, k, v, bias = checks.autocast(q, k, v, bias)
    checks.check_qkv(where, q, k, v)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    interval = shown = seed = None
    if mask is not None or causal or window_size != (-1, -1):
        interval, shown = checks.merged_mask(where, mask, causal, window_size, shape, q.device)
    if bias is not None:
        bias = checks.check_bias(where, bias, shape, q.device)
    if shown is not None:
        bias = (
            shown if bias is None else bias.masked_fill(~dtensors.beside(shown, bias), -torch.inf)
        )
    if alibi_slopes is not None:
        alibi_slopes = checks.check_alibi(where, alibi_slopes, q)
    if sinks is not None:
        sinks = checks.check_per_head(where, "sinks", sinks, q, batched=False)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    numbers = checks.check_numbers(where, softmax_scale, softcap, dropout_p)
    if numbers[2] > 0.0:
        seed = draw_seed(q.device, generator)
    start, end = (None, None) if interval is None else (interval.start, interval.end)
    inputs = (q, k, v, start, end, bias, alibi_slopes, sinks, seed, *numbers)
    return Call(inputs, interval, deterministic, backend)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: IntervalMask | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> Call:
    """Checks the arguments of `mmkernels.attention_varlen`: one batch element, packed."""
    where = "attention_varlen"
    checks.check_packed(where, q, k, v)
    packing = masks.checked_packed(
        where, cu_seqlens_q, cu_seqlens_k, causal, window_size, q.shape[0], k.shape[0]
    )
    checks.check_max_seqlen(where, "max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    checks.check_max_seqlen(where, "max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if packing.device != q.device:
        raise ValueError(
            f"{where}: cu_seqlens_q is on {packing.device} and q on {q.device}; move it there"
        )
    shape = (1, q.shape[1], q.shape[0], k.shape[0])
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = checks.broadcastable(where, "mask", dtensors.gathered(mask), shape, q.device)
        mask = mask & packing.to_dense()
    elif isinstance(mask, IntervalMask):
        checks.check_interval(where, mask, 1, q.shape[0], k.shape[0], q.device)
        mask = mask & packing
    elif mask is None:
        mask = packing
    alike = cu_seqlens_q is cu_seqlens_k or (
        readable(cu_seqlens_q, cu_seqlens_k) and torch.equal(cu_seqlens_q, cu_seqlens_k)
    )
    one_diagonal = alike and q.shape[0] == k.shape[0]
    if alibi_slopes is not None and not one_diagonal:
        # The kernels count distances from one diagonal; sequences of unlike lengths have several.
        slopes = checks.check_alibi(where, alibi_slopes, q[None])
        position, _, _ = masks.packed_rows(cu_seqlens_q, cu_seqlens_k, q.shape[0])
        keys = torch.arange(k.shape[0], device=q.device)
        if bias is not None:
            bias = checks.check_bias(where, bias, shape, q.device)
        alibi = torch.atleast_2d(slopes)[..., None, None] * -(position[:, None] - keys).abs()
        if bias is not None:
            alibi = bias + dtensors.beside(alibi, bias)
        bias, alibi_slopes = alibi, None
    return dense(
        q[None], k[None], v[None], mask, False, (-1, -1), softmax_scale, softcap, bias,
        alibi_slopes, sinks, dropout_p, generator, deterministic, backend, where,
    )  # fmt: skip


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """Checks the arguments of `mmkernels.scaled_dot_product_attention`."""
    where = "scaled_dot_product_attention"
    query, key, value, attn_mask = checks.autocast(query, key, value, attn_mask)
    query, key, value, attn_mask = checks.check_sdpa(
        where, query, key, value, attn_mask, is_causal, enable_gqa
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask: IntervalMask | Tensor | None = None
    bias = None
    if attn_mask is not None:
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    elif is_causal:
        mask = masks.top_left(q.shape[1], k.shape[1], device=q.device)
    return dense(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        softmax_scale=scale,
        where=where,
    )


def spread_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`mmkernels.scaled_dot_product_attention` of a sequence that is spread over processes.

    Its mask is over the whole sequence, and so is no check of the local shapes.
    """
    where = "scaled_dot_product_attention"
    assert spread.active is not None
    if query.ndim != 4:
        raise ValueError(
            f"{where}: query has shape {tuple(query.shape)}; within context_parallel it must be "
            "(B, H, S, D)"
        )
    query, key, value, _ = checks.check_sdpa(where, query, key, value, None, is_causal, enable_gqa)
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = spread.active.attention(
        q, k, v, mask=attn_mask if boolean else None, bias=None if boolean else attn_mask,
        causal=is_causal, softmax_scale=scale, alibi_slopes=None, dropout_p=dropout_p,
        generator=None,
    )  # fmt: skip
    return out.transpose(1, 2)


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse, with gradients where they are wanted."""
    if dtensors.is_dtensor(call.inputs[0]):
        from mmkernels.distributed import sharding

        return sharding.run_attention(call)
    if not _needs_grad(call):
        return ops.call("attention_forward", *call.inputs, call.backend)
    q, k, v, start, end, bias, alibi_slopes, sinks, seed, *numbers = call.inputs
    if call.backend == "reference" and not torch.compiler.is_compiling():
        return reference.differentiable(*call.inputs)
    # Better now than in the middle of the backward pass; a tracer has no use for the choice.
    if call.backend != "auto" and not torch.compiler.is_compiling():
        registry.select("attention_backward", call.backend, _backward_inputs(call))
    row_start = row_end = None
    # The backends for CPU tensors go by rows alone.
    if call.mask is not None and (q.device.type != "cpu" or call.backend == "triton"):
        row_start, row_end = call.mask.key_rows(k.shape[1])
    return attend(
        q, k, v, start, end, row_start, row_end, bias, alibi_slopes, sinks, seed,
        *numbers, call.deterministic, call.backend,
    )  # fmt: skip


def explain(call: Call) -> Explanation:
    """Which backends would run a call, forward and, where gradients are wanted, backward."""
    backward = None
    if _needs_grad(call):
        backward = registry.explain_op("attention_backward", call.backend, _backward_inputs(call))
    return registry.explain_op("attention_forward", call.backend, call.inputs, backward)


def _needs_grad(call: Call) -> bool:
    if not torch.is_grad_enabled():
        return False
    q, k, v, _, _, bias, _, sinks = call.inputs[:8]
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def _backward_inputs(call: Call) -> tuple:
    """What a backend's why_not reads before there is a result: dout, dlse, out, lse are None."""
    q, k, v, start, end, bias, *rest = call.inputs
    bias_grad = bias is not None and bias.requires_grad
    return (
        None, None, q, k, v, None, None, start, end, None, None, bias, *rest,
        bias_grad, call.deterministic,
    )  # fmt: skip


def sdpa_layout(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """out (B, Sq, Hq, Dv) as (..., Hq, Sq, Dv)."""
    out = out.transpose(1, 2)
    if query.ndim == 4:
        return out
    if query.ndim < 4:
        return out[(0,) * (4 - query.ndim)]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    return out.unflatten(0, batch)


def explain_dense(*args: Any, return_lse: bool = False, **kwargs: Any) -> Explanation:
    """`explain` for `mmkernels.attention`."""
    return explain(dense(*args, **kwargs))


def explain_varlen(*args: Any, return_lse: bool = False, **kwargs: Any) -> Explanation:
    """`explain` for `mmkernels.attention_varlen`."""
    return explain(varlen(*args, **kwargs))


def explain_sdpa(*args: Any, **kwargs: Any) -> Explanation:
    """`explain` for `mmkernels.scaled_dot_product_attention`."""
    return explain(sdpa(*args, **kwargs))
