"""Who decodes from a KV cache beside mmkernels.

Where a function only attends, the new token is written by indexing first, and the call is timed
with it. Where one knows no pages, they are gathered first, as a model would have to; where one
knows no lengths, it gets the caches up to the longest sequence and a mask that is made before the
clock starts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmkernels as mm
from mmkernels.bench.attention_peers import eager_form
from mmkernels.bench.calls import imported
from mmkernels.bench.case import OURS, Call, Results, Unavailable
from mmkernels.bench.compiling import compiled
from mmkernels.bench.decode_problem import PAGE_SIZE, DecodeProblem

Prepare = Callable[[DecodeProblem], Call]
# (q, k, v, additive mask), the tensors transposed to (B, H, S, D) -> out in that layout.
Masked = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def peers(batch: int, paged: bool, device: torch.device, telling: bool) -> dict[str, Prepare]:
    """Name -> implementation, `OURS` first.

    Args:
        batch: how many sequences; a single one needs no mask.
        paged: the cache is.
        device: of the case.
        telling: also those that compile.
    """
    gpu = device.type == "cuda"
    given = ", ".join((["pages gathered"] if paged else []) + (["dense mask"] if batch > 1 else []))
    found: dict[str, Prepare] = {OURS: ours()}
    if gpu:
        found |= {f"{OURS} triton": ours("triton")}
    given = f" ({given})" if given else ""
    found[f"SDPA{given}"] = masked(sdpa())
    if gpu:  # grouped heads with a mask are for none of its kernels but the one that materialises
        found |= {
            f"SDPA efficient{given}": masked(sdpa(SDPBackend.EFFICIENT_ATTENTION)),
            f"SDPA cudnn{given}": masked(sdpa(SDPBackend.CUDNN_ATTENTION)),
        }
    found[f"eager{given}"] = masked(eager_form)
    if telling or gpu:
        found["FlexAttention (pages gathered)" if paged else "FlexAttention"] = flex
    if gpu:
        found["flash-attn"] = flash_attn
        if paged:
            found["FlashInfer"] = flashinfer
    return found


def ours(backend: str = "auto") -> Prepare:
    """`mmkernels.attention_with_kvcache`."""

    def prepare(problem: DecodeProblem) -> Call:
        p = problem
        arguments = (p.q, p.k_cache, p.v_cache, p.k, p.v, p.lengths, p.block_table)
        if backend != "auto":
            plan = mm.explain(mm.attention_with_kvcache, *arguments, backend=backend)
            if plan.backend is None:
                raise Unavailable(plan.reasons[backend])
        return lambda: (mm.attention_with_kvcache(*arguments, backend=backend),)

    return prepare


def masked(attention: Masked) -> Prepare:
    """Attention that knows neither lengths nor pages."""

    def prepare(problem: DecodeProblem) -> Call:
        longest = int(problem.host_lengths.max()) + 1
        mask = None
        if problem.size.batch > 1:
            key = torch.arange(longest, device=problem.device)
            seen = (key <= problem.lengths[:, None])[:, None, None]
            mask = torch.zeros((), dtype=problem.dtype, device=problem.device).where(
                seen, -torch.inf
            )

        def call() -> Results:
            k, v = written(problem, longest)
            out = attention(problem.q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
            return (out.transpose(1, 2),)

        return call

    return prepare


def written(problem: DecodeProblem, longest: int) -> tuple[Tensor, Tensor]:
    """The caches (B, longest, Hkv, D), after the new token was written."""
    problem.k_cache[problem.new_index] = problem.k[:, 0]
    problem.v_cache[problem.new_index] = problem.v[:, 0]
    k, v = problem.k_cache, problem.v_cache
    if problem.block_table is not None:
        table = problem.block_table[:, : -(-longest // PAGE_SIZE)]
        k, v = (x[table].flatten(1, 2) for x in (k, v))
    return k[:, :longest], v[:, :longest]


def sdpa(backend: SDPBackend | None = None) -> Masked:
    """torch's SDPA as it chooses, or one of its kernels by name, which gets its keys repeated."""

    def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def forced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        assert backend is not None
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return chosen if backend is None else forced


def flex(problem: DecodeProblem) -> Call:
    """torch's FlexAttention, compiled, its block mask built."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, longest = problem.lengths, int(problem.host_lengths.max()) + 1
    batch = problem.size.batch
    block_mask = create_block_mask(
        lambda b, h, i, j: j <= lengths[b], batch, None, 1, longest, problem.device
    )
    attend = compiled(flex_attention, problem.device)
    q = problem.q.transpose(1, 2)

    def call() -> Results:
        k, v = (x.transpose(1, 2) for x in written(problem, longest))
        return (attend(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2),)

    return call


def flash_attn(problem: DecodeProblem) -> Call:
    """FlashAttention-2, which writes the new token itself."""
    function, p = imported("flash_attn").flash_attn_with_kvcache, problem

    def call() -> Results:
        out = function(
            p.q,
            p.k_cache,
            p.v_cache,
            k=p.k,
            v=p.v,
            cache_seqlens=p.lengths,
            block_table=p.block_table,
            causal=True,
        )
        return (out,)

    return call


def flashinfer(problem: DecodeProblem) -> Call:
    """FlashInfer over pages, planned before the clock starts, as one plan serves all layers."""
    library = imported("flashinfer")
    assert problem.block_table is not None
    size, device = problem.size, problem.device
    keys = problem.host_lengths + 1
    pages = (keys + PAGE_SIZE - 1) // PAGE_SIZE
    indptr = F.pad(pages.cumsum(0), (1, 0)).int()
    used = torch.arange(problem.block_table.shape[1]) < pages[:, None]
    workspace = torch.zeros(2**27, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr.to(device),
        problem.block_table[used.to(device)],
        ((keys - 1) % PAGE_SIZE + 1).to(device),
        size.heads,
        size.kv_heads,
        size.head_dim,
        PAGE_SIZE,
        q_data_type=problem.dtype,
        kv_data_type=problem.dtype,
    )

    def call() -> Results:
        problem.k_cache[problem.new_index] = problem.k[:, 0]
        problem.v_cache[problem.new_index] = problem.v[:, 0]
        out = wrapper.run(problem.q[:, 0], (problem.k_cache, problem.v_cache))
        return (out[:, None],)

    return call
