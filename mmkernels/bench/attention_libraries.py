"""Attention of other libraries, where they are installed, and torch's own for packed sequences.

Each is given the mask as it knows it: a causal flag, a window, lengths. A batch with padding goes
in without it, packed; gathering the real tokens and putting them back is timed, for a model that
keeps its padding pays for that in every layer.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from mmkernels.bench.attention_masks import starts
from mmkernels.bench.attention_problem import Attention, AttentionProblem, Prepare
from mmkernels.bench.calls import imported
from mmkernels.bench.case import Unavailable

# Packed (total, H, D) q, k, v -> out.
PackedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Packing(NamedTuple):
    """The sequences of a problem without padding.

    Attributes:
        cu_seqlens: (N + 1,) int32 on the problem's device.
        longest: of the sequences.
        gather: (B, S, H, D) -> (total, H, D).
        scatter: the way back, with 0 at padding.
    """

    cu_seqlens: Tensor
    longest: int
    gather: Callable[[Tensor], Tensor]
    scatter: Callable[[Tensor], Tensor]


def packing(problem: AttentionProblem) -> Packing:
    """Of a problem whose mask has lengths."""
    lengths = problem.mask.lengths
    assert lengths is not None
    cu_seqlens = starts(lengths).to(problem.device)
    if problem.real is None:
        return Packing(cu_seqlens, max(lengths), lambda x: x[0], lambda x: x[None])
    index = problem.real.flatten().nonzero()[:, 0]
    batch, seqlen = problem.size[:2]

    def scatter(x: Tensor) -> Tensor:
        padded = x.new_zeros((batch * seqlen, *x.shape[1:]))
        return padded.index_copy(0, index, x).unflatten(0, (batch, seqlen))

    return Packing(cu_seqlens, max(lengths), lambda x: x.flatten(0, 1)[index], scatter)


def _packed(packs: Packing, attention: PackedAttention) -> Attention:
    return lambda q, k, v: packs.scatter(attention(*(packs.gather(x) for x in (q, k, v))))


def _taking(name: str, problem: AttentionProblem) -> ModuleType:
    """The module of that name.

    Raises:
        Unavailable: it is not installed, or knows no such mask.
    """
    if not problem.mask.plain:
        raise Unavailable(f"has no such mask: {problem.mask.name}")
    try:
        return imported(name)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error


def flash_attn(problem: AttentionProblem) -> Attention:
    """FlashAttention-2; its causal mask and window are aligned as ours."""
    module = _taking("flash_attn", problem)
    mask = problem.mask
    window = (-1, -1) if mask.window is None else (mask.window, 0)
    if not mask.lengths:
        function = module.flash_attn_func
        return lambda q, k, v: function(q, k, v, causal=mask.causal, window_size=window)
    packs = packing(problem)
    lengths = (packs.cu_seqlens, packs.cu_seqlens, packs.longest, packs.longest)
    function = module.flash_attn_varlen_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, *lengths, causal=mask.causal, window_size=window)

    return _packed(packs, attention)


def varlen_attn(problem: AttentionProblem) -> Attention:
    """torch's function for packed sequences, FlashAttention inside."""
    mask = problem.mask
    if not mask.lengths:
        raise Unavailable("for packed sequences; this case has none")
    module = _taking("torch.nn.attention.varlen", problem)
    packs = packing(problem)
    lengths = (packs.cu_seqlens, packs.cu_seqlens, packs.longest, packs.longest)
    window = (-1, 0) if mask.causal else (-1, -1)
    grouped = problem.size.heads != problem.size.kv_heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module.varlen_attn(q, k, v, *lengths, window_size=window, enable_gqa=grouped)

    return _packed(packs, attention)


def fmha(name: str) -> Prepare:
    """memory_efficient_attention of xformers or of MSLK, where it went on: one interface.

    Grouped heads have five dimensions there, with keys that are expanded; for a backward pass, in
    which it has no grouped heads, they are repeated.
    """

    def prepare(problem: AttentionProblem) -> Attention:
        module = _taking(name, problem)
        mask, size, biases = problem.mask, problem.size, module.attn_bias
        group = size.heads // size.kv_heads
        bias = None
        if mask.lengths:
            bias = biases.BlockDiagonalMask.from_seqlens(list(mask.lengths), device=problem.device)
            bias = bias.make_causal() if mask.causal else bias
        elif mask.window is not None:
            bias = biases.LocalAttentionFromBottomRightMask(mask.window, 0)
        elif mask.causal:
            bias = biases.LowerTriangularMask()

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if group > 1 and problem.backward:
                k, v = (x.repeat_interleave(group, 2) for x in (k, v))
            elif group > 1:
                q = q.unflatten(2, (size.kv_heads, group))
                k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
            out = module.memory_efficient_attention(q, k, v, attn_bias=bias)
            return out.flatten(2, 3) if out.ndim == 5 else out

        if not mask.lengths:
            return attention
        return _packed(packing(problem), lambda *qkv: attention(*(x[None] for x in qkv))[0])

    return prepare


LIBRARIES: dict[str, Prepare] = {
    "varlen_attn": varlen_attn,
    "flash-attn": flash_attn,
    "xformers": fmha("xformers.ops.fmha"),
    "MSLK": fmha("mslk.attention.fmha"),
}
