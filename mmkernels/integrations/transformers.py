"""Attention of transformers models. Importing this module registers the name "mmkernels".

    import mmkernels.integrations.transformers
    model.set_attn_implementation("mmkernels")

or `from_pretrained(..., attn_implementation="mmkernels")`. A model calls `attention_forward` once
per layer, with the mask that the mask function registered under the same name has built. Both must
be registered: for a name without a mask function transformers builds no mask at all, and padding is
silently attended.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import mmkernels as mm
from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask

NAME = "mmkernels"

# What models pass to every attention function and this one may ignore. Anything else that is set
# raises: some models say only here that their attention is sparse, or has sinks made from the data.
HARMLESS = frozenset({
    "sliding_window",  # the mask holds the window
    "position_ids",  # rotary embedding is applied, and the mask separates packed sequences
    "max_length_q", "max_length_k",  # follow from cu_seq_lens_q and cu_seq_lens_k
    "seq_idx",  # for state-space layers
    "deterministic",  # the backward is deterministic anyway
    "cache_position", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
    "num_items_in_batch",
})  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind `attn_implementation="mmkernels"`.

    Args:
        module: the calling layer. Its `training` gates dropout.
        query: (B or 1, Hq, Sq, D), any strides.
        key: (B, Hkv, Sk, D), heads not repeated.
        value: (B, Hkv, Sk, Dv).
        attention_mask: bool (True = attend) or additive float, broadcasts to (B, Hq, Sq, Sk).
        scaling: factor of the scores; None: D**-0.5.
        dropout: probability, applied in training only.
        is_causal: None: the module's own, else True. Counts only without a mask and for Sq > 1, and
            aligns the first query with the first key: the rest of a static cache is still empty.
        softcap: scores become softcap * tanh(scores / softcap) before masking.
        s_aux: (Hq,). Attention sinks.
        position_bias: broadcasts to (B, Hq, Sq, Sk), added to the scaled scores.
        cu_seq_lens_q: (N + 1,) int32. Bounds of the sequences packed into a batch of one.
        cu_seq_lens_k: the same for the keys.
        output_attentions: must not be set; the weights are never formed.
        **kwargs: anything in `HARMLESS`.

    Returns:
        out (B, Sq, Hq, Dv) contiguous, and None for the weights.

    Raises:
        ValueError: the weights were asked for, or an argument outside `HARMLESS` is set.
    """
    _check_served(module, output_attentions, kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)

    if attention_mask is not None and attention_mask.shape[-1] > seqlen_k:
        attention_mask = attention_mask[..., :seqlen_k]  # made for a longer cache
    mask: IntervalMask | Tensor | None = None
    bias = position_bias
    if attention_mask is None:
        if seqlen_q > 1 and is_causal:
            mask = masks.top_left(seqlen_q, seqlen_k, device=query.device)
    elif attention_mask.is_floating_point():
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        mask = _as_interval(attention_mask)
    if cu_seq_lens_q is not None:
        mask = _separate(mask, cu_seq_lens_q, cu_seq_lens_k, query, key)

    out = mm.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask=mask,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        bias=bias,
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
    )
    return out.contiguous(), None


def _check_served(
    module: nn.Module, output_attentions: bool | None, kwargs: dict[str, Any]
) -> None:
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    if output_attentions:
        raise ValueError(
            f"output_attentions=True: {NAME} never forms the attention weights; "
            'call model.set_attn_implementation("eager") to have them'
        )
    unknown = [
        name
        for name, value in kwargs.items()
        if value is not None and value is not False and name not in HARMLESS
    ]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which "
            f'{NAME} does not serve; call model.set_attn_implementation("eager") for this model'
        )


def _as_interval(mask: Tensor) -> IntervalMask | Tensor:
    """The bool `mask`, in interval form where it has one.

    Every layer gets the same tensor, so the answer is kept, with the version of the contents
    (inference tensors have none). A graph, compiled or captured, must not depend on the contents.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or torch.compiler.is_compiling():
        return mask
    version = None if mask.is_inference() else mask._version
    known = _known_intervals.get(mask)
    if known is None or known[0] != version:
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return mask
        try:
            interval = IntervalMask.from_dense(mask)
        except ValueError:  # not an interval
            interval = None
        known = _known_intervals[mask] = version, interval
    return mask if known[1] is None else known[1]


# Mask tensor -> its version and its interval form; forgotten with the tensor.
_known_intervals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _separate(
    mask: IntervalMask | Tensor | None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None,
    query: Tensor,
    key: Tensor,
) -> IntervalMask | Tensor:
    """`mask`, within each of the packed sequences only."""
    if query.shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q describes sequences packed into a batch of one; "
            f"the batch is {query.shape[0]}"
        )
    packed = masks.packed(
        cu_seq_lens_q, cu_seq_lens_k, total_q=query.shape[2], total_k=key.shape[2]
    )
    if mask is None:
        return packed
    if isinstance(mask, IntervalMask):
        return packed & mask
    return packed.to_dense()[:, None] & mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
