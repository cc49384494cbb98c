"""torch's scaled_dot_product_attention as a peer, in the form that does least for a case.

No mask, `is_causal`, or an additive mask in q's dtype that is made before the clock starts. It gets
transposed views of (B, S, H, D), which cost nothing.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.bench.attention_problem import Attention, AttentionProblem, Prepare
from mmkernels.bench.case import Unavailable


def sdpa(backend: SDPBackend | None = None, repeated: bool = False) -> Prepare:
    """torch's SDPA on one of its backends, or on its own choice.

    `repeated` gives every query head a key head of its own first, as models do whose mask is dense.
    """

    def prepare(problem: AttentionProblem) -> Attention:
        size, mask = problem.size, additive(problem) if problem.mask.dense else None
        is_causal = problem.mask.causal and mask is None
        group = size.heads // size.kv_heads

        def own_choice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeated and group > 1:
                k, v = (x.repeat_interleave(group, 2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
            )
            return out.transpose(1, 2)

        if backend is None:
            return own_choice

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return own_choice(q, k, v)

        _unless_declined(attention, problem)
        return attention

    return prepare


def _unless_declined(attention: Attention, problem: AttentionProblem) -> None:
    """Raises `Unavailable` with torch's reason, which it gives as warnings beside a bare error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            attention(*problem.qkv)
        except RuntimeError as error:
            said = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
            # It goes through all of its kernels, and says of the others that they are switched off.
            reasons = [x for x in said if "not used because" not in x and "disabled" not in x]
            raise Unavailable("; ".join(reasons) or str(error).partition("\n")[0]) from error


def sdpa_by_image(problem: AttentionProblem) -> Attention:
    """torch's SDPA on one image after another, as the Qwen-VL models of transformers call it."""
    lengths = problem.mask.lengths
    assert lengths is not None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(1, 2).split(lengths, 2) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*part) for part in parts]
        return torch.cat(outs, 2).transpose(1, 2)

    return attention


def additive(problem: AttentionProblem) -> Tensor | None:
    """The mask as SDPA and eager code add it to the scores: (1 or B, 1, S, S) in q's dtype.

    Of four dimensions, since with three SDPA on a CPU leaves its flash kernel.
    """
    dense = problem.dense()
    if dense is None:
        return None
    return torch.zeros((), dtype=problem.dtype, device=dense.device).where(dense, -torch.inf)
