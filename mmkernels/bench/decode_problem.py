"""One step of decoding: a new token of every sequence of a batch attends to its KV cache.

A call writes the token's key and value into the cache and attends, as a layer does. The lengths
stay, so that every call does the same.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench.attention_problem import Size
from mmkernels.bench.case import SEED, Call, Results

# What FlashAttention-2 needs pages to be a multiple of; any size does for us.
PAGE_SIZE = 256


class CacheSize(Size):
    """Of a batch and its caches: the longest sequence has `seqlen` keys, the new one included.

    The others have from a quarter of that on.
    """

    def __str__(self) -> str:
        least = f"{self.seqlen // 4}–" if self.batch > 1 else ""
        heads = f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch} {heads} S{least}{self.seqlen} D{self.head_dim}"


class DecodeProblem:
    """One decoding step over ragged lengths.

    Args:
        size: of the batch and the caches.
        dtype: of all tensors.
        device: of all tensors.
        paged: the caches lie in pages that are scattered over a pool.
        peers: name -> a function of this problem that prepares a call returning (out,), or raises
            `Unavailable`.

    Attributes:
        q: (B, 1, Hq, D).
        k: (B, 1, Hkv, D), the new key.
        v: likewise.
        k_cache: (B, Smax, Hkv, D), or pages (num_blocks, page_size, Hkv, D).
        v_cache: likewise.
        lengths: (B,) int32, keys in the cache before the new one.
        block_table: (B, max_blocks) int32; None: not paged.
        flops: 4 D for each query head and key that is seen.
        bytes: those keys and values, q and out once, and the new key and value written.
        implementations: as in `Problem`.
    """

    flops: float | None
    bytes: float | None

    def __init__(
        self,
        size: CacheSize,
        dtype: torch.dtype,
        device: torch.device,
        paged: bool,
        peers: Mapping[str, Callable[["DecodeProblem"], Call]],
    ) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        batch, seqlen, heads, kv_heads, head_dim = size
        self.q = normal(batch, 1, heads, head_dim)
        self.k, self.v = (normal(batch, 1, kv_heads, head_dim) for _ in range(2))
        self.k_cache, self.v_cache = (normal(batch, seqlen, kv_heads, head_dim) for _ in range(2))
        # The last one is the longest: what a batch of one gets.
        ragged = torch.linspace(seqlen / 4, seqlen, batch + 1)[1:]
        self.host_lengths = ragged.int() - 1
        self.lengths = self.host_lengths.to(device)
        self.block_table: Tensor | None = None
        if paged:
            pages = -(-seqlen // PAGE_SIZE)
            order = torch.randperm(batch * pages, generator=generator)
            self.block_table = order.view(batch, pages).to(device, torch.int32)
            self.k_cache, self.v_cache = (
                _scattered(x, order.to(device), pages) for x in (self.k_cache, self.v_cache)
            )
        self._filled = [x.clone() for x in (self.k_cache, self.v_cache)]
        for cache, new in zip(self._filled, (self.k, self.v), strict=True):
            cache[self.new_index] = new[:, 0]
        seen = int(self.host_lengths.sum()) + batch
        self.flops = 4 * seen * heads * head_dim
        moved = 2 * (seen + batch) * kv_heads + 2 * batch * heads
        self.bytes = moved * head_dim * self.q.element_size()
        self.implementations: Mapping[str, Callable[[], Call]] = {
            name: functools.partial(self._prepared, prepare) for name, prepare in peers.items()
        }

    @functools.cached_property
    def new_index(self) -> tuple[Tensor, Tensor]:
        """Where the new key of each sequence goes: row or page, and position in it."""
        row, length = torch.arange(self.size.batch, device=self.device), self.lengths.long()
        if self.block_table is None:
            return row, length
        return self.block_table[row, length // PAGE_SIZE].long(), length % PAGE_SIZE

    def _prepared(self, prepare: Callable[["DecodeProblem"], Call]) -> Call:
        for cache in (self.k_cache, self.v_cache):  # whoever does not write is found out
            cache[self.new_index] = 0
        return prepare(self)

    def check(self, results: Results) -> float:
        """The largest error of out; raises AssertionError if it or a cache is wrong."""
        caches = zip(
            ("k_cache", "v_cache"), (self.k_cache, self.v_cache), self._filled, strict=True
        )
        for name, cache, filled in caches:
            assert torch.equal(cache, filled), f"{name}: not what it is with the new token written"
        (out,) = results
        exact, eager, rounding = self._expected
        testing.assert_accurate("out", out, exact, eager, rounding=rounding)
        return float((out.double() - exact).abs().max())

    @functools.cached_property
    def _expected(self) -> tuple[Tensor, Tensor, float]:
        """Exact and eager out with the rounding, one sequence after another to save memory."""
        exact, eager, rounding = [], [], 0.0
        for row, length in enumerate(self.host_lengths.tolist()):
            q, (k, v) = (
                self.q[row : row + 1],
                (self._sequence(x, row)[None, : length + 1] for x in self._filled),
            )
            inputs = [x.double() for x in (q, k, v)]
            out, lse = mm.attention(*inputs, return_lse=True, backend="reference")
            exact.append(out)
            eager.append(testing.eager_attention(q, k, v)[0])
            rounding = max(rounding, testing.attention_rounding(self.dtype, lse))
        return torch.cat(exact), torch.cat(eager), rounding

    def _sequence(self, cache: Tensor, row: int) -> Tensor:
        """(S, Hkv, D): one sequence's part of a cache."""
        return (
            cache[row] if self.block_table is None else cache[self.block_table[row]].flatten(0, 1)
        )


def _scattered(cache: Tensor, order: Tensor, pages: int) -> Tensor:
    """A contiguous cache as pages, the n-th page of all at order[n]."""
    padding = pages * PAGE_SIZE - cache.shape[1]
    padded = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, padding))
    pool = torch.empty_like(padded).view(-1, PAGE_SIZE, *cache.shape[2:])
    pool[order] = padded.view_as(pool)
    return pool
