"""torch's CPU flash attention kernel in this package's layout, called only where it is right.

`aten::_scaled_dot_product_flash_attention_for_cpu` dies on empty inputs and returns garbage for a
last stride other than 1, for a row that sees no key, and if causal for a scale below 0. It needs
D = Dv, multiplies NaN in a hidden value by 0, and loses NaN in a key if that is the only one.
Callers give it non-empty inputs of one head dim (`widened`) and rows that see a key.

Grouped heads cost no copy: a batch element's (Hkv, Hq / Hkv) are the batch and the heads of a call,
and the keys are expanded with stride 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The Python binding: 2 µs quicker a call than the same op in torch.ops.aten.
_forward = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Can `forward` and `backward` take these as they are?"""
    return (
        q.shape[3] == v.shape[3]
        and (q.shape[2] == k.shape[2] or q.shape[0] == 1)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and q.numel() > 0
        and v.numel() > 0
    )


def widened(x: Tensor, width: int) -> Tensor:
    """x (.., D) with zero columns up to `width`, and a last stride of 1."""
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))  # keeps the order of strides
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, n, Hq, D) and lse (B, Hq, n) of q (B, n, Hq, D) over k, v (B, m, Hkv, D).

    Args:
        q: B must be 1 where Hq != Hkv.
        k: keys.
        v: values.
        causal: row i sees the keys j <= i (top-left).
        mask: (1 or B, 1 or Hq, n, m), added to the scores; q's dtype or float32.
        softmax_scale: factor on q k^T.
    """
    groups = q.shape[2] // k.shape[2]
    if groups == 1:
        out, lse = _forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            0.0, causal, attn_mask=mask, scale=softmax_scale,
        )  # fmt: skip
        return out.transpose(1, 2), lse
    out, lse = _forward(
        _split_heads(q, groups), _shared_heads(k, groups), _shared_heads(v, groups),
        0.0, causal, attn_mask=_split_mask(mask, groups), scale=softmax_scale,
    )  # fmt: skip
    return _joined_heads(out), lse.flatten(0, 1)[None]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the layouts of q, k, v; lse (B, Hq, n) may be that of more keys than these."""
    groups = q.shape[2] // k.shape[2]
    if groups == 1:
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = _backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=softmax_scale)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv
    dq, dk, dv = _backward(
        _split_heads(dout, groups), _split_heads(q, groups), _shared_heads(k, groups),
        _shared_heads(v, groups), _split_heads(out, groups), lse[0].unflatten(0, (-1, groups)),
        0.0, causal, attn_mask=_split_mask(mask, groups), scale=softmax_scale,
    )  # fmt: skip
    dk, dv = (grad.sum(1).transpose(0, 1)[None] for grad in (dk, dv))
    return _joined_heads(dq), dk, dv


def _split_heads(x: Tensor, groups: int) -> Tensor:
    """(1, n, Hq, D) -> (Hkv, groups, n, D)."""
    return x[0].unflatten(1, (-1, groups)).permute(1, 2, 0, 3)


def _joined_heads(x: Tensor) -> Tensor:
    """(Hkv, groups, n, D) -> (1, n, Hq, D)."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)[None]


def _shared_heads(x: Tensor, groups: int) -> Tensor:
    """(1, m, Hkv, D) -> (Hkv, groups, m, D), every group reading the same memory."""
    return x[0].transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)


def _split_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """(1, 1 or Hq, n, m) -> (1 or Hkv, 1 or groups, n, m)."""
    return mask if mask is None or mask.shape[1] == 1 else mask[0].unflatten(0, (-1, groups))
