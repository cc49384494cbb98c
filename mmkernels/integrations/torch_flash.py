"""mmkernels in the place of torch's own flash attention kernels, on a GPU, for a whole process.

    import torch
    import mmkernels.integrations.torch_flash

    torch.nn.attention.activate_flash_attention_impl("mmkernels")
    ...  # models run
    torch.nn.attention.restore_flash_attention_impl()

Importing this module registers the name with torch and activates nothing. While it is active,
`scaled_dot_product_attention` of CUDA tensors calls mmkernels where torch would choose its flash
kernel: float16 or bfloat16, no mask, and equal lengths if causal. `mmkernels.replace` and
`sdpa_override` serve every call, on any device, and one model at a time; prefer them.
"""

import torch
from torch import Tensor
from torch.library import Library
from torch.nn import attention as torch_attention

from mmkernels.attention import masks

__all__: list[str] = []  # importing the module is all

NAME = "mmkernels"


class Handle:
    """The kernels in torch's dispatcher, until `remove`."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self.library: Library | None = Library("aten", "IMPL", dispatch_key)
        for name, kernel in (("", flash_attention), ("_backward", flash_attention_backward)):
            self.library.impl(f"_scaled_dot_product_flash_attention{name}", kernel, dispatch_key)

    def remove(self) -> None:
        """Torch's own kernels run again."""
        if self.library is not None:
            self.library._destroy()
        self.library = None


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """`aten::_scaled_dot_product_flash_attention`.

    Args:
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Sk, D).
        value: (B, Hkv, Sk, D).
        dropout_p: must be 0.
        is_causal: row i sees the keys j <= i.
        return_debug_mask: must not be set; the probabilities are never formed.
        scale: factor on query key^T; None: 1 / sqrt(D).

    Returns:
        out (B, Hq, Sq, D), lse (B, Hq, Sq) float32, and what the backward op gets back: bounds of
        packed sequences (None), both lengths, the state of dropout and its mask (empty).

    Raises:
        ValueError: dropout or the debug mask is asked for.
    """
    if dropout_p > 0 or return_debug_mask:
        raise ValueError(
            f"dropout_p is {dropout_p} and return_debug_mask {return_debug_mask}; {NAME} serves "
            "torch's flash attention without either. Call restore_flash_attention_impl(), or "
            "mmkernels.scaled_dot_product_attention, which has dropout"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.ops.mmkernels.attention_forward(
        q, k, v, *_bounds(q, k, is_causal), None, None, None, None, scale, 0.0, 0.0, "auto"
    )
    state = query.new_empty(2, dtype=torch.uint64).zero_()
    nothing = query.new_empty(0)
    return (
        out.transpose(1, 2), lse, None, None, q.shape[1], k.shape[1], state,
        state.new_empty(0), nothing,
    )  # fmt: skip


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten::_scaled_dot_product_flash_attention_backward`: dq, dk, dv like their inputs."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = masks.top_left(q.shape[1], k.shape[1], device=q.device) if is_causal else None
    rows = (None, None) if mask is None else mask.key_rows(k.shape[1])
    gradients = torch.ops.mmkernels.attention_backward(
        dout, None, q, k, v, out, logsumexp, *_bounds(q, k, is_causal), *rows,
        None, None, None, None, scale, 0.0, 0.0, False, True, "auto",
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in gradients[:3])
    return dq, dk, dv


def _bounds(q: Tensor, k: Tensor, is_causal: bool) -> tuple[Tensor | None, Tensor | None]:
    if not is_causal:
        return None, None
    mask = masks.top_left(q.shape[1], k.shape[1], device=q.device)
    return mask.start, mask.end


torch_attention.register_flash_attention_impl(NAME, register_fn=Handle)
