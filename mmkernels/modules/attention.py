"""`torch.nn.MultiheadAttention` on the fused kernels.

Only `forward` is new. Parameters, initialisation, state_dict and pickling are inherited, so the
module loads torch's checkpoints, and torch's transformer layers hold it as they hold their own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels._core import spread
from mmkernels._core.values import readable
from mmkernels.attention.api import attention
from mmkernels.attention.masks import top_left


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with the parameters and results of `torch.nn.MultiheadAttention`.

    need_weights=False runs `mmkernels.attention` on views of the projections. need_weights=True,
    torch's default, has to write the probabilities to memory and runs plain torch operations.

    Two results differ from torch's: a query without a single key attends to nothing (attention
    output, weights and gradients are 0, there NaN), and dropout draws other random numbers. As in
    torch, NaN in a hidden key or value reaches the output with need_weights=True; here only then.

    Args:
        embed_dim: width E of queries and outputs, a multiple of num_heads.
        num_heads: number of heads H.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have a bias.
        add_bias_kv: whether to append a learned key and value to every sequence.
        add_zero_attn: whether to append a key and a value of zeros to every sequence.
        kdim: width of keys; None: embed_dim.
        vdim: width of values; None: embed_dim.
        batch_first: whether batched tensors are (N, L, E) rather than (L, N, E).
        device: where the parameters lie.
        dtype: dtype of the parameters.
        backend: backend of `mmkernels.attention`; need_weights=True uses none.

    Raises:
        ValueError: embed_dim is not a positive multiple of num_heads.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}; "
                "embed_dim must be a positive multiple of num_heads"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.backend = backend

    def extra_repr(self) -> str:
        """Sizes and settings, as the constructor takes them."""
        return (
            f"{self.embed_dim}, {self.num_heads}, kdim={self.kdim}, vdim={self.vdim}, "
            f"dropout={self.dropout}, bias={self.in_proj_bias is not None}, "
            f"add_bias_kv={self.bias_k is not None}, add_zero_attn={self.add_zero_attn}, "
            f"batch_first={self.batch_first}, backend={self.backend!r}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: (N, L, E) with batch_first, else (L, N, E); unbatched (L, E).
            key: (N, S, kdim) or (S, N, kdim); unbatched (S, kdim).
            value: (N, S, vdim) or (S, N, vdim); unbatched (S, vdim).
            key_padding_mask: (N, S); unbatched (S,). Bool, True hides the key from every query, or
                float, added to the scores, in the dtype of query or float32. Differentiable.
            need_weights: whether to return the attention weights.
            attn_mask: (L, S) or (N * H, L, S), the same for pairs of query and key.
            average_attn_weights: whether to average the returned weights over the heads.
            is_causal: the promise that attn_mask lets query i see exactly the keys 0 to i. As in
                torch, need_weights=False without key_padding_mask then attends so and does not read
                attn_mask; appended keys are hidden from query i like any other key after i.

        Returns:
            The output, shaped like query, and the weights: (N, L, S), or (N, H, L, S) if not
            averaged, unbatched without N, with a column for each appended key; None if not needed.

        Raises:
            TypeError: an argument is no tensor or has the wrong dtype.
            ValueError: a wrong shape or device; is_causal without attn_mask; nested tensors, except
                in the inference of self-attention, which torch then runs.
        """
        # Of a module of torch, whose forward `mm.replace` makes this one, there may be no more than
        # torch's own attributes: hence functions, not methods, too.
        backend = getattr(self, "backend", "auto")
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True promises that attn_mask is causal, but attn_mask is None; pass the "
                "mask too, for example nn.Transformer.generate_square_subsequent_mask(L)"
            )
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        if any(getattr(x, "is_nested", False) for x in (query, key, value)):
            try:
                return nn.MultiheadAttention.forward(
                    self, query, key, value, need_weights=need_weights,
                    average_attn_weights=average_attn_weights, **masks,
                )  # fmt: skip
            except AssertionError as error:
                raise ValueError(
                    f"query, key or value is a nested tensor, which only torch can serve: {error}. "
                    "Pad it with to_padded_tensor(0.0) and pass key_padding_mask"
                ) from error
        _check_arguments(self, query=query, key=key, value=value, **masks)
        q, k, v = _project(self, query, key, value)
        k, v = _append_keys(self, k, v)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            spread.refuse("MultiheadAttention", "ask for no weights: need_weights=False")
            shown, bias = _merge_masks(self, **masks)
            out, weights = _attend_with_weights(q, k, v, shown, bias, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        elif is_causal and key_padding_mask is None:
            mask = top_left(q.shape[1], k.shape[1], device=q.device)
            out = attention(q, k, v, mask=mask, dropout_p=dropout_p, backend=backend)
        else:
            shown, bias = _merge_masks(self, **masks)
            out = attention(q, k, v, mask=shown, bias=bias, dropout_p=dropout_p, backend=backend)
        out = out.flatten(2)
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1).contiguous()  # as torch returns it, for callers that view()
        return self.out_proj(out), weights


def _check_arguments(mha: nn.MultiheadAttention, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor) and (x is not None or "mask" not in name):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    query, key = arguments["query"], arguments["key"]
    if query.dim() not in (2, 3) or key.dim() != query.dim():
        raise ValueError(
            f"query and key have shapes {tuple(query.shape)} and {tuple(key.shape)}; "
            "both must be 3-D (batched) or both 2-D (unbatched)"
        )
    seq = 1 if query.dim() == 3 and mha.batch_first else 0
    batch = (query.shape[1 - seq],) if query.dim() == 3 else ()
    len_q, len_k = query.shape[seq], key.shape[seq]

    def sequence(length: int, width: int) -> tuple[int, ...]:
        return (*batch, length, width) if seq else (length, *batch, width)

    shapes = {
        "query": [sequence(len_q, mha.embed_dim)],
        "key": [sequence(len_k, mha.kdim)],
        "value": [sequence(len_k, mha.vdim)],
        "key_padding_mask": [(*batch, len_k)],
        "attn_mask": [(len_q, len_k), (math.prod(batch) * mha.num_heads, len_q, len_k)],
    }
    weight = mha.q_proj_weight if mha.in_proj_weight is None else mha.in_proj_weight
    dtype, device = weight.dtype, weight.device
    autocast = torch.amp.is_autocast_available(device.type)
    autocast = autocast and torch.is_autocast_enabled(device.type)
    for name, x in arguments.items():
        if x is None:
            continue
        if tuple(x.shape) not in shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with this query, this key and this module "
                f"it must have {' or '.join(map(str, shapes[name]))}"
            )
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; move it to {device}")
        allowed = (torch.bool, dtype, torch.float32) if "mask" in name else (dtype,)
        if x.dtype not in allowed and not (autocast and x.is_floating_point()):
            raise TypeError(f"{name} is {x.dtype}; convert it to {allowed[0]}")


def _project(mha: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Views (N, L, H, D), (N, S, H, D) twice, of as few products as the inputs allow."""
    weight, bias, width = mha.in_proj_weight, mha.in_proj_bias, mha.embed_dim

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None, count: int = 1) -> list[Tensor]:
        x = F.linear(x, weight, bias)
        parts = x.view(*x.shape[:-1], count, mha.num_heads, mha.head_dim).unbind(-3)
        if query.dim() == 2:
            return [part.unsqueeze(0) for part in parts]
        return list(parts) if mha.batch_first else [part.transpose(0, 1) for part in parts]

    if weight is not None and query is key and key is value:
        return heads(query, weight, bias, count=3)
    if weight is not None and key is value:
        w_q, w_kv = weight.split((width, 2 * width))
        b_q, b_kv = (None, None) if bias is None else bias.split((width, 2 * width))
        return heads(query, w_q, b_q) + heads(key, w_kv, b_kv, count=2)
    separate = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    weights = separate if weight is None else weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [q for (q,) in map(heads, (query, key, value), weights, biases)]


def _append_keys(mha: nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if mha.bias_k is not None and mha.bias_v is not None:
        k, v = (
            torch.cat((x, new.to(x).view(1, 1, *x.shape[2:]).expand(x.shape[0], -1, -1, -1)), 1)
            for x, new in ((k, mha.bias_k), (v, mha.bias_v))
        )
    if mha.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    return k, v


def _merge_masks(
    mha: nn.MultiheadAttention, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is bool, now True = attend, and what is float, each 4-D over (N, H, L, all keys)."""
    given = []
    if key_padding_mask is not None:
        given.append(torch.atleast_2d(key_padding_mask)[:, None, None])
    if attn_mask is not None:
        heads = mha.num_heads if attn_mask.dim() == 3 else 1
        attn_mask = attn_mask if attn_mask.dim() == 3 else attn_mask[None]
        given.append(attn_mask.unflatten(0, (attn_mask.shape[0] // heads, heads)))
    appended = (mha.bias_k is not None) + mha.add_zero_attn
    shown = bias = None
    for mask in map(_bool_if_possible, given):
        mask = F.pad(mask, (0, appended)) if appended else mask
        if mask.dtype == torch.bool:
            shown = ~mask if shown is None else shown & ~mask
        else:
            bias = mask if bias is None else bias + mask
    return shown, bias


def _bool_if_possible(mask: Tensor) -> Tensor:
    """The bool mask that a float mask of 0 and -inf stands for, where reading it costs little.

    A TransformerEncoderLayer makes every mask float; `attention` finds intervals in bool ones.
    """
    if mask.dtype == torch.bool or mask.requires_grad or not readable(mask):
        return mask
    hidden = mask == -torch.inf
    return hidden if bool((hidden | (mask == 0)).all()) else mask


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Output (N, L, H, D) and probabilities (N, H, L, S), both after dropout."""
    batch_heads = (q.shape[0], q.shape[2])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if shown is not None:
        bias = torch.where(shown, q.new_zeros(()) if bias is None else bias, -torch.inf)
    if bias is None:
        weights = torch.bmm(q, k.mT).softmax(-1).unflatten(0, batch_heads)
    else:
        bias = bias.to(q.dtype)
        # The softmax of a row of -inf is NaN, forward and backward.
        no_key = (bias == -torch.inf).all(-1, keepdim=True)
        bias = bias.masked_fill(no_key, 0.0).expand(*batch_heads, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(bias, q, k.mT).softmax(-1).unflatten(0, batch_heads)
        weights = weights.masked_fill(no_key, 0.0)
    weights = F.dropout(weights, dropout_p)
    out = torch.bmm(weights.flatten(0, 1), v).unflatten(0, batch_heads)
    return out.transpose(1, 2), weights
