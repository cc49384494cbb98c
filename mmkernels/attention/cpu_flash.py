"""torch's CPU flash attention kernel in this package's layout, called only where it is right.

`aten::_scaled_dot_product_flash_attention_for_cpu` dies on empty inputs and returns garbage for a
last stride other than 1, for a row that sees no key, and if causal for a scale below 0. It needs
D = Dv, multiplies NaN in a hidden value by 0, and loses NaN in a key if that is the only one.
Callers give it non-empty inputs of one head dim (`widened`) and rows that see a key.

Grouped heads cost no copy: the kernel packs a key head once for all query heads that read it. But
it adds up their dk and dv in the dtype of k, so `backward` takes another way in 16 bit: a batch
element's (Hkv, Hq / Hkv) are the batch and the heads of a call, keys expanded with stride 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The Python binding: 2 µs quicker a call than the same op in torch.ops.aten.
_forward = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Up to so many keys x D², `_backward` is quicker in float32, casts included. Measured with AMX,
# which speeds up products in 16 bit, but not the conversions between them.
SLOW_IN_16_BIT = 2**20


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Can `forward` and `backward` take these as they are?"""
    return (
        q.shape[3] == v.shape[3]
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
        q: queries; Hq is a multiple of Hkv.
        k: keys.
        v: values.
        causal: row i sees the keys j <= i (top-left).
        mask: (1 or B, 1 or Hq, n, m), added to the scores; q's dtype or float32.
        softmax_scale: factor on q k^T.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2), lse


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
    """dq, dk, dv in the layouts of q, k, v; lse (B, Hq, n) may be that of more keys than these.

    Over few keys, 16-bit gradients come in float32.
    """
    if q.dtype.itemsize == 2 and k.shape[1] * k.shape[3] ** 2 <= SLOW_IN_16_BIT:
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    if q.shape[2] != k.shape[2] and q.dtype.itemsize == 2:
        masks = [None if mask is None else mask[b % len(mask)] for b in range(len(q))]
        apart = [
            _backward_by_head(
                dout[b], q[b], k[b], v[b], out[b], lse[b], causal, masks[b], softmax_scale
            )
            for b in range(len(q))
        ]
        dq, dk, dv = (torch.stack(grads) for grads in zip(*apart, strict=True))
        return dq, dk, dv
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    grads = _backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=softmax_scale)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv


def _backward_by_head(
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
    """`backward` of one batch element, all without their B; a group's dk, dv add up in float32."""
    groups = q.shape[1] // k.shape[1]
    dout, q, out = (x.unflatten(1, (-1, groups)).permute(1, 2, 0, 3) for x in (dout, q, out))
    k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
    lse = lse.unflatten(0, (-1, groups))
    if mask is not None:
        mask = mask[None] if mask.shape[0] == 1 else mask.unflatten(0, (-1, groups))
    dq, dk, dv = _backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=softmax_scale
    )
    return (
        dq.permute(2, 0, 1, 3).flatten(1, 2),
        dk.sum(1).transpose(0, 1),
        dv.sum(1).transpose(0, 1),
    )
