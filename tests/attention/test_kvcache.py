"""Is decoding against a cache, contiguous or paged, what a look at every valid key gives?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends

HKV, D, DV = 2, 8, 6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def row_by_row(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse in float64 from each sequence's own keys and values (L, Hkv, ..)."""
    batch, seqlen_q, heads, dim = q.shape
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(batch, seqlen_q, heads, values[0].shape[2], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        length = len(keys[b])
        for i in range(seqlen_q):
            position = length - seqlen_q + i
            first = 0 if window_size[0] < 0 else max(position - window_size[0], 0)
            last = length if window_size[1] < 0 else min(position + window_size[1] + 1, length)
            if causal:
                last = min(last, position + 1)
            if first >= last:
                continue
            for h in range(heads):
                group = h // (heads // keys[b].shape[1])
                scores = keys[b][first:last, group].double() @ q[b, i, h].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slope = float(alibi_slopes.expand(batch, heads)[b, h])
                    distance = (position - torch.arange(first, last)).abs().double()
                    scores = scores - slope * distance
                logits = scores
                if sinks is not None:
                    logits = torch.cat((scores, sinks[h].double()[None]))
                lse[b, h, i] = logits.logsumexp(0)
                weights = torch.exp(scores - lse[b, h, i])
                out[b, i, h] = weights @ values[b][first:last, group].double()
    return out, lse


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object, backend: str = "auto", **options
) -> object:
    """A call where the backend runs; what it writes is then in the caches here."""
    device = testing.device_for(backend)
    there = backends.moved((k_cache, v_cache), device)
    got = backends.call(mm.attention_with_kvcache, q, *there, *rest, backend=backend, **options)
    if device != "cpu":
        k_cache.copy_(there[0]), v_cache.copy_(there[1])
    return got


class Cache:
    """A cache, contiguous (page_size None) or paged, whose unused cells hold NaN.

    The pages of a sequence lie anywhere; entries of block_table beyond its end are garbage.
    """

    def __init__(
        self,
        lengths: list[int],
        capacity: int,
        page_size: int | None = None,
        new: int = 0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        self.lengths, self.page_size, self.new = lengths, page_size, new
        batch = len(lengths)
        self.block_table = None
        if page_size is None:
            shape = (batch, capacity)
        else:
            blocks = -(-capacity // page_size)
            shape = (batch * blocks + 3, page_size)
            order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
            table = order[: batch * blocks].view(batch, blocks).to(torch.int32)
            for b, length in enumerate(lengths):
                for entry in range(-(-(length + new) // page_size), blocks):
                    table[b, entry] = (-1, 2**31 - 1, -(2**31), shape[0])[entry % 4]
            self.block_table = table
        self.k = torch.full((*shape, HKV, D), torch.nan, dtype=dtype)
        self.v = torch.full((*shape, HKV, DV), torch.nan, dtype=dtype)
        for b, length in enumerate(lengths):
            for j in range(length):
                self.k[self.cell(b, j)] = normal(HKV, D, seed=seed + 1000 * b + j, dtype=dtype)
                self.v[self.cell(b, j)] = normal(
                    HKV, DV, seed=seed + 1000 * b + j + 500, dtype=dtype
                )

    def cell(self, b: int, j: int) -> tuple[int, int]:
        """Where key j of sequence b lies."""
        if self.block_table is None:
            return b, j
        return int(self.block_table[b, j // self.page_size]), j % self.page_size

    def held(self, cache: Tensor, added: Tensor | None = None) -> list[Tensor]:
        """Each sequence's (L, Hkv, ..) in the cache, followed by what is added."""
        sequences = []
        for b, length in enumerate(self.lengths):
            rows = [cache[self.cell(b, j)] for j in range(length)]
            rows += [] if added is None else list(added[b])
            sequences.append(torch.stack(rows) if rows else cache[:0, 0])
        return sequences

    def attend(self, q: Tensor, *new: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return decode(
            q, self.k, self.v, *(new or (None, None)), lengths, self.block_table, return_lse=True,
            **options,
        )  # fmt: skip


PAGES = pytest.mark.parametrize("page_size", [None, 1, 16, 17], ids="page_size={}".format)
BACKEND = backends.each("reference", "cpu", "auto", "triton")


def assert_close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    tolerance = backends.tolerance(got[0].dtype)
    for name, x, y in zip(("out", "lse"), got, wanted, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(
            x.double(), y, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def check(cache: Cache, q: Tensor, backend: str, **options: object) -> None:
    wanted = row_by_row(q, cache.held(cache.k), cache.held(cache.v), **options)
    before = cache.k.clone(), cache.v.clone()
    assert_close(cache.attend(q, backend=backend, **options), wanted)
    for now, then in zip((cache.k, cache.v), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


OPTIONS = {
    "plain": {},
    "not_causal": {"causal": False},
    "window": {"window_size": (4, 0)},
    "window_ahead": {"causal": False, "window_size": (3, 1)},
    "window_behind_causal": {"window_size": (2, 5)},
    "scale": {"softmax_scale": 0.21},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "alibi_of_a_batch": {
        "alibi_slopes": torch.tensor(
            [[0.5, 0.2, 0.1, 0.0], [1.0, 0.1, 0.0, 2.0], [0.0, 0.3, 0.7, 0.1]]
        )
    },
    "sinks": {"sinks": torch.tensor([0.3, -2.0, 4.0, 0.0])},
    "all_at_once": {
        "window_size": (9, 0),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
        "sinks": torch.tensor([0.3, -2.0, 4.0, 0.0]),
        "softmax_scale": 0.4,
    },
}


@BACKEND
@PAGES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_lengths(options, page_size, backend):
    if "softcap" in options and backend == "cpu":
        backend = "auto"  # the cpu backend declines softcap
    dtype = backends.widest(backend)
    cache = Cache([0, 20, 33], 40, page_size, dtype=dtype)
    check(cache, normal(3, 3, 4, D, seed=9, dtype=dtype), backend, **options)


@BACKEND
@PAGES
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 4, 5])
def test_any_number_of_rows_even_above_the_keys(seqlen_q, page_size, backend):
    dtype = backends.widest(backend)
    cache = Cache([3, 18, 1], 18, page_size, dtype=dtype)
    check(cache, normal(3, seqlen_q, 4, D, seed=9, dtype=dtype), backend)


@BACKEND
@PAGES
@pytest.mark.parametrize("lengths", [[0, 5], [5, 0], [0, 0], [0]], ids=str)
def test_sequences_without_a_key(lengths, page_size, backend):
    dtype = backends.widest(backend)
    q = normal(len(lengths), 1, 4, D, seed=9, dtype=dtype)
    check(Cache(lengths, 18, page_size, dtype=dtype), q, backend)


@BACKEND
@pytest.mark.parametrize("heads", [2, 4, 6, 14])
def test_heads_shared_in_groups(heads, backend):
    dtype = backends.widest(backend)
    q = normal(2, 2, heads, D, seed=9, dtype=dtype)
    check(Cache([5, 9], 12, 4, dtype=dtype), q, backend)


@backends.each_in(
    [torch.float32, torch.bfloat16, torch.float16], "reference", "cpu", "auto", "triton"
)
def test_dtypes(backend, dtype):
    cache = Cache([7, 2], 9, 4, dtype=dtype)
    q = normal(2, 2, 4, D, seed=9, dtype=dtype)
    out, lse = cache.attend(q, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wanted_out, wanted_lse = row_by_row(q, cache.held(cache.k), cache.held(cache.v))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted_out, atol=4 * eps, rtol=4 * eps)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


@BACKEND
@PAGES
@pytest.mark.parametrize("new", [1, 3, 17])
@pytest.mark.parametrize("lengths", [[0, 5, 16], [15, 0, 3]], ids=str)
def test_new_keys_are_written_where_they_belong_and_nowhere_else(lengths, new, page_size, backend):
    dtype = backends.widest(backend)
    cache = Cache(lengths, 40, page_size, new=new, dtype=dtype)
    k, v = (normal(3, new, HKV, n, seed=77 + n, dtype=dtype) for n in (D, DV))
    q = normal(3, min(new, 4), 4, D, seed=79, dtype=dtype)
    wanted = row_by_row(q, cache.held(cache.k, k), cache.held(cache.v, v))
    after = cache.k.clone(), cache.v.clone()
    for expected, added in zip(after, (k, v), strict=True):
        for b, length in enumerate(lengths):
            for j in range(new):
                expected[cache.cell(b, length + j)] = added[b, j]
    assert_close(cache.attend(q, k, v, backend=backend), wanted)
    for stored, expected in zip((cache.k, cache.v), after, strict=True):
        torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)


@BACKEND
def test_decoding_step_by_step_is_attention_at_once(backend):
    dtype = backends.widest(backend)
    shapes = (2, 12, 4, D), (2, 12, HKV, D), (2, 12, HKV, DV)
    q, k, v = (normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    wanted = mm.attention(q, k, v, causal=True, backend="reference")
    k_cache, v_cache = (torch.full((2, 15, *x.shape[2:]), torch.nan, dtype=x.dtype) for x in (k, v))
    first = 0
    for rows in (5, 1, 1, 3, 2):
        step = slice(first, first + rows)
        inputs = (q[:, step], k_cache, v_cache, k[:, step], v[:, step], first)
        out = decode(*inputs, backend=backend)
        torch.testing.assert_close(out, wanted[:, step], **backends.tolerance(dtype))
        first += rows
    assert torch.equal(k_cache[:, :12], k) and torch.equal(v_cache[:, :12], v)
    assert k_cache[:, 12:].isnan().all() and v_cache[:, 12:].isnan().all()


@BACKEND
def test_a_cache_that_is_a_view_is_written_through(backend):
    dtype = backends.widest(backend)
    whole = torch.full((9, 2, 2, HKV, D), torch.nan, dtype=dtype)  # (S, layer, B, Hkv, D)
    k_cache, v_cache = whole[:, 0].transpose(0, 1), whole[:, 1].transpose(0, 1)
    q, k, v = (normal(2, 2, n, D, seed=n, dtype=dtype) for n in (4, HKV, HKV))
    out = decode(q, k_cache, v_cache, k, v, 0, backend=backend)
    wanted = mm.attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(out, wanted, **backends.tolerance(dtype))
    assert torch.equal(whole[:2, 0].transpose(0, 1), k)
    assert torch.equal(whole[:2, 1].transpose(0, 1), v)
    assert whole[2:].isnan().all()


@BACKEND
def test_pages_may_be_shared(backend):
    dtype = backends.widest(backend)
    k_pages, v_pages = (normal(5, 4, HKV, n, seed=n, dtype=dtype) for n in (D, DV))
    table = torch.tensor([[3, 1], [3, 4]], dtype=torch.int32)  # a prompt in page 3, used twice
    q = normal(2, 1, 4, D, seed=2, dtype=dtype)
    lengths = torch.tensor([7, 6], dtype=torch.int32)
    keys, values = (
        [cache[table[b].long()].flatten(0, 1)[: lengths[b]] for b in range(2)]
        for cache in (k_pages, v_pages)
    )
    rest = (None, None, lengths, table)
    got = decode(q, k_pages, v_pages, *rest, return_lse=True, backend=backend)
    assert_close(got, row_by_row(q, keys, values))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_block_table_and_lengths_of_either_width(dtype):
    cache = Cache([5, 9], 12, 4, new=2)
    table = cache.block_table.clone().clamp(-1, 99).to(dtype)
    k, v, q = normal(2, 2, HKV, D), normal(2, 2, HKV, DV, seed=1), normal(2, 2, 4, D, seed=2)
    wanted = row_by_row(q, cache.held(cache.k, k), cache.held(cache.v, v))
    lengths = torch.tensor([5, 9], dtype=dtype)
    got = mm.attention_with_kvcache(q, cache.k, cache.v, k, v, lengths, table, return_lse=True)
    assert_close(got, wanted)
    assert lengths.tolist() == [5, 9]


@BACKEND
def test_cache_seqlens_as_an_int_or_missing(backend):
    dtype = backends.widest(backend)
    cache = Cache([6, 6], 6, dtype=dtype)
    q = normal(2, 2, 4, D, seed=9, dtype=dtype)
    wanted = row_by_row(q, cache.held(cache.k), cache.held(cache.v))
    for lengths in (6, None, torch.tensor([6, 6])):
        options = {"cache_seqlens": lengths, "return_lse": True, "backend": backend}
        got = decode(q, cache.k, cache.v, **options)
        assert_close(got, wanted)


@BACKEND
@PAGES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unused_cells_never_reach_the_output(bad, page_size, backend):
    dtype = backends.widest(backend)
    cache = Cache([0, 7, 16], 20, page_size, dtype=dtype)
    for stored in (cache.k, cache.v):
        stored[stored.isnan()] = bad
    check(cache, normal(3, 4, 4, D, seed=9, dtype=dtype), backend, window_size=(3, 0))


@BACKEND
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_outside_of_the_window_never_reach_the_output(bad, backend):
    dtype = backends.widest(backend)
    cache = Cache([9, 9], 12, dtype=dtype)
    clean = Cache([9, 9], 12, dtype=dtype)
    cache.k[0, 2], cache.v[0, 3], cache.k[1, 8], cache.v[1, 8] = bad, bad, bad, bad
    q = normal(2, 2, 4, D, seed=9, dtype=dtype)  # rows at keys 7 and 8
    got = cache.attend(q, window_size=(3, 0), backend=backend)
    wanted = row_by_row(q, clean.held(clean.k), clean.held(clean.v), window_size=(3, 0))
    assert_close((got[0][0], got[1][0]), (wanted[0][0], wanted[1][0]))
    assert_close((got[0][1, :1], got[1][1, :, :1]), (wanted[0][1, :1], wanted[1][1, :, :1]))
    assert not got[0][1, 1].isfinite().any()


REFUSED = {
    "no_room": {"cache_seqlens": torch.tensor([2, 11], dtype=torch.int32)},
    "window": {"window_size": (-7, 0)},
    "softcap": {"softcap": -1.0},
    "scale": {"softmax_scale": math.nan},
    "alibi": {"alibi_slopes": torch.ones(3)},
    "sinks": {"sinks": torch.ones(1)},
    "backend": {"backend": "nonsense"},
    "backend_for_gpus": {"backend": "cuda"},
    "backend_declines": {"backend": "cpu", "softcap": 1.0},
    "page": {"block_table": torch.tensor([[0, 1, 2], [3, 4, 99]], dtype=torch.int32)},
}


@pytest.mark.parametrize("wrong", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_writes_nothing(wrong):
    k_cache, v_cache = normal(6, 4, HKV, D), normal(6, 4, HKV, DV)
    arguments = {
        "q": normal(2, 1, 4, D), "k_cache": k_cache, "v_cache": v_cache,
        "k": normal(2, 2, HKV, D), "v": normal(2, 2, HKV, DV),
        "cache_seqlens": torch.tensor([2, 7], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32),
    }  # fmt: skip
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises((ValueError, TypeError, mm.BackendUnavailable)):
        mm.attention_with_kvcache(**arguments | wrong)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])
    mm.attention_with_kvcache(**arguments)
    assert not torch.equal(k_cache, before[0])


def test_explain_writes_nothing():
    k_cache, v_cache = normal(2, 4, HKV, D), normal(2, 4, HKV, DV)
    before = k_cache.clone(), v_cache.clone()
    k, v = normal(2, 1, HKV, D, seed=1), normal(2, 1, HKV, DV, seed=1)
    q = normal(2, 1, 4, D)
    explanation = mm.explain(mm.attention_with_kvcache, q, k_cache, v_cache, k, v, 2)
    assert explanation.backend in explanation.reasons
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


def test_tensors_that_require_a_gradient_are_served_without_one():
    q = normal(1, 1, 4, D).requires_grad_()
    k_cache, v_cache = normal(1, 4, HKV, D), normal(1, 4, HKV, DV)
    with torch.no_grad():
        out = mm.attention_with_kvcache(q, k_cache, v_cache)
    assert not out.requires_grad
    assert_close(
        mm.attention_with_kvcache(q.detach(), k_cache, v_cache, return_lse=True),
        row_by_row(q.detach(), list(k_cache), list(v_cache)),
    )


def test_inference_mode():
    with torch.inference_mode():
        cache = Cache([3, 5], 9, 4, new=1)
        k, v, q = normal(2, 1, HKV, D), normal(2, 1, HKV, DV, seed=1), normal(2, 1, 4, D, seed=2)
        wanted = row_by_row(q, cache.held(cache.k, k), cache.held(cache.v, v))
        assert_close(cache.attend(q, k, v), wanted)


@BACKEND
@settings(max_examples=15)
@given(st.data())
def test_any_cache(backend, data):
    dtype = backends.widest(backend)
    page_size = data.draw(st.sampled_from([None, 1, 2, 3, 5]))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    new, seqlen_q = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 99))
    cache = Cache(lengths, 12, page_size, new=new, seed=seed, dtype=dtype)
    heads = HKV * data.draw(st.integers(1, 3))
    options = {
        "causal": data.draw(st.booleans()),
        "window_size": data.draw(st.tuples(st.integers(-1, 6), st.integers(-1, 6))),
    }
    if data.draw(st.booleans()):
        options["sinks"] = torch.linspace(-1, 2, heads)
    if data.draw(st.booleans()):
        options["alibi_slopes"] = torch.linspace(0, 1, heads)
    q = normal(len(lengths), seqlen_q, heads, D, seed=9, dtype=dtype)
    added = ()
    if new:
        shape = (len(lengths), new, HKV)
        added = tuple(normal(*shape, n, seed=n, dtype=dtype) for n in (D, DV))
    k, v = added or (None, None)
    wanted = row_by_row(q, cache.held(cache.k, k), cache.held(cache.v, v), **options)
    assert_close(cache.attend(q, *added, backend=backend, **options), wanted)
