"""Attention of transformers models. Importing this module registers the name "mmkernels".

    import mmkernels.integrations.transformers
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=4))
    model.set_attn_implementation("mmkernels")

or `from_pretrained(..., attn_implementation="mmkernels")`. A model calls `attention_forward` once
per layer, with the mask that the mask function registered under the same name has built. Both must
be registered: for a name without a mask function transformers builds no mask at all, and padding is
silently attended.
"""

import threading
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import generic

import mmkernels as mm
from mmkernels._core import spread
from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask
from mmkernels.integrations.mask_reading import mask_over_keys, separated
from mmkernels.integrations.transformers_masks import interval_mask

__all__ = ["HARMLESS", "attention_forward", "varlen_implementation"]

NAME = "mmkernels"
# Towers that pack images or sounds of mixed size say where each begins only to implementations
# whose name contains "flash", and call any other once for each image.
VARLEN_NAME = "mmkernels_flash"

HARMLESS = frozenset({
    "sliding_window",  # the mask holds the window
    "position_ids",  # rotary embedding is applied, and the mask separates packed sequences
    "max_length_q", "max_length_k",  # follow from cu_seq_lens_q and cu_seq_lens_k
    "seq_idx",  # for state-space layers
    "deterministic",  # the backward is deterministic anyway
    "cache_position", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
    "num_items_in_batch", "logits_to_keep",
})  # fmt: skip
"""What models pass to every attention function and this one may ignore. Anything else that is set
raises: some models say only here that their attention is sparse, or has sinks made from the data.
"""


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
        attention_mask: 4-dimensional and broadcasts to (B, Hq, Sq, Sk or more): bool (True =
            attend; an `IntervalTensor` costs nothing to read), or float, added to the scores. One
            that holds only 0 and at most half of its dtype's minimum is taken as bool. A row
            without a key gives 0. Read once a forward, not by every layer.
        scaling: factor of the scores; None: D**-0.5.
        dropout: probability, applied in training only.
        is_causal: counts only without a mask and for Sq > 1, and aligns the first query with the
            first key: the rest of a static cache is still empty. None: the module's own, else
            False: a model that builds no mask hides nothing in its eager attention, either.
        softcap: scores become softcap * tanh(scores / softcap) before masking.
        s_aux: (Hq,). Attention sinks.
        position_bias: broadcasts to (B, Hq, Sq, Sk), added to the scaled scores.
        cu_seq_lens_q: (N + 1,) int32. Bounds of the sequences packed into a batch of one.
        cu_seq_lens_k: the same for the keys.
        output_attentions: must not be set; the weights are never formed.
        **kwargs: those in `HARMLESS` are ignored, any other must be None or False.

    Returns:
        out (B, Sq, Hq, Dv) contiguous, and None for the weights.

    Raises:
        ValueError: the weights were asked for, an argument outside `HARMLESS` is set, or the mask
            is not 4-dimensional.
    """
    _check_served(module, output_attentions, kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if spread.active is not None:  # masks are over the whole sequence then
        seqlen_q = seqlen_k = spread.active.seqlen
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    mask: IntervalMask | Tensor | None = None
    bias = position_bias
    if attention_mask is not None:
        mask = mask_over_keys(attention_mask, module, seqlen_q, seqlen_k)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            bias, mask = (mask if bias is None else bias + mask), None
    elif seqlen_q > 1 and is_causal:
        mask = masks.top_left(seqlen_q, seqlen_k, device=query.device)
    if cu_seq_lens_q is not None:
        mask = separated(mask, module, cu_seq_lens_q, cu_seq_lens_k, query, key)

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


def varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention_forward` under `VARLEN_NAME`; arguments as there.

    Raises:
        ValueError: as there; position ids came, and neither bounds nor a mask: some models leave it
            to flash attention to tell packed images apart by them.
    """
    if cu_seq_lens_q is None and attention_mask is None and position_ids is not None:
        raise ValueError(
            f"{type(module).__name__} passes position_ids and neither cu_seq_lens_q nor a mask to "
            f'its attention; set config._attn_implementation = "{NAME}" for this model'
        )
    return attention_forward(
        module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, **kwargs
    )


def varlen_implementation() -> str:
    """The name for the `config._attn_implementation` of a tower that packs images or sounds.

    Such a tower then hands over all of them at once, with `cu_seq_lens_q`. To be set on the tower's
    own config: the names that pass the checks of `set_attn_implementation` do not have this effect.

    transformers 4 knows one such name only, "flash_attention_2". The first call registers a
    function there that serves the modules with an attribute `_mmkernels_previous` and hands any
    other to what was registered before.

    Returns:
        "mmkernels_flash", or in transformers 4 "flash_attention_2".
    """
    if hasattr(generic, "is_flash_attention_requested"):
        return VARLEN_NAME
    with _lock:
        before = AttentionInterface._global_mapping["flash_attention_2"]
        if getattr(before, "serves_marked_modules", False):
            return "flash_attention_2"

        def marked_or_before(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            marked = module.__dict__.get("_mmkernels_previous") is not None
            return (varlen_forward if marked else before)(module, *args, **kwargs)

        marked_or_before.serves_marked_modules = True  # type: ignore[attr-defined]
        AttentionInterface.register("flash_attention_2", marked_or_before)
    return "flash_attention_2"


_lock = threading.Lock()

for name, forward in ((NAME, attention_forward), (VARLEN_NAME, varlen_forward)):
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, interval_mask)
