"""Do the decoding benchmarks check what they time, and call other libraries as they are meant?"""

import importlib.machinery
import importlib.util
import itertools
import shutil
import sys
from types import ModuleType

import pytest
import torch

import mmkernels as mm
from mmkernels.bench import decode_peers, decode_problem
from mmkernels.bench.case import OURS, Unavailable
from mmkernels.bench.decode_problem import CacheSize, DecodeProblem

CPU = torch.device("cpu")
PAGE_SIZE = decode_problem.PAGE_SIZE  # before a fixture makes it smaller
SIZE = CacheSize(3, 40, 6, 2, 16)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Sequences of several pages, one of which ends where its new token begins another."""
    for module in (decode_problem, decode_peers):
        monkeypatch.setattr(module, "PAGE_SIZE", 8)


def problem(paged: bool = False, peers=None, size: CacheSize = SIZE) -> DecodeProblem:
    return DecodeProblem(size, torch.float32, CPU, paged, peers or {OURS: decode_peers.ours()})


def results(this: DecodeProblem, name: str = OURS) -> list:
    return list(this.implementations[name]()())


def test_lengths_are_ragged_and_the_last_is_the_longest():
    assert problem().lengths.tolist() == [19, 29, 39]
    assert problem(size=SIZE._replace(batch=1)).lengths.tolist() == [39]
    assert str(SIZE) == "B3 H6/2 S10–40 D16" and str(SIZE._replace(batch=1)) == "B1 H6/2 S40 D16"


def test_pages_hold_the_same_cache():
    contiguous, paged = problem(), problem(paged=True)
    assert not torch.equal(paged.block_table.flatten(), torch.arange(15)), "in order"
    for row in range(3):
        whole = paged.k_cache[paged.block_table[row].long()].flatten(0, 1)
        assert torch.equal(whole, contiguous.k_cache[row])
    torch.testing.assert_close(results(paged), results(contiguous))


def test_flops_and_bytes():
    this = problem()
    seen, row = 20 + 30 + 40, 4 * 16
    assert this.flops == 4 * seen * 6 * 16
    assert this.bytes == row * (2 * seen * 2 + 2 * 3 * 2 + 2 * 3 * 6)


@pytest.mark.parametrize("paged", [False, True])
def test_a_wrong_result_is_seen(paged):
    this = problem(paged)
    (out,) = results(this)
    assert this.check((out,)) < 1e-5
    for wrong in (out * 1.001, out.roll(1, 0), out.roll(1, 2)):
        with pytest.raises(AssertionError, match=r"^out: "):
            this.check((wrong,))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_wrong_cache_is_seen(name):
    this = problem()
    out = results(this)
    cache = getattr(this, name)
    cache[1, 29, 0, 0] += 0.01
    with pytest.raises(AssertionError, match=f"^{name}: "):
        this.check(out)
    out = results(this)
    cache[2, 3, 0, 0] += 0.01  # an old key
    with pytest.raises(AssertionError, match=f"^{name}: "):
        this.check(out)


def test_whoever_does_not_write_is_found_out():
    """Though the one before it has left the new token in the cache."""

    def reads_only(this: DecodeProblem):
        lengths = this.lengths + 1
        return lambda: (
            mm.attention_with_kvcache(this.q, this.k_cache, this.v_cache, None, None, lengths),
        )

    this = problem(peers={OURS: decode_peers.ours(), "reads only": reads_only})
    this.check(results(this))
    with pytest.raises(AssertionError, match="k_cache"):
        this.check(results(this, "reads only"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("paged", [False, True])
def test_peers_solve_the_problem(paged, batch):
    found = decode_peers.peers(batch, paged, CPU, telling=False)
    given = ["pages gathered"] * paged + ["dense mask"] * (batch > 1)
    bracket = f" ({', '.join(given)})" if given else ""
    assert list(found) == [OURS, f"SDPA{bracket}", f"eager{bracket}"]
    this = problem(paged, found, SIZE._replace(batch=batch))
    for name in found:
        call = this.implementations[name]()
        call()  # the second call does what the first did
        assert this.check(call()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::torch")  # the compiler's own affair
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_flex_attention_solves_the_problem():
    this = problem(peers={"FlexAttention": decode_peers.flex})
    assert this.check(results(this, "FlexAttention")) < 1e-5


def test_a_backend_of_ours_that_declines_says_why():
    this = problem(peers={f"{OURS} cuda": decode_peers.ours("cuda")})
    with pytest.raises(Unavailable, match="no cuda backend for attention_decode"):
        this.implementations[f"{OURS} cuda"]()


def install(monkeypatch, name: str, **members) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


# flash_attn 2.8: flash_attn_interface.py.


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    assert cache_seqlens.dtype == torch.int32
    assert block_table is None or block_table.dtype == torch.int32
    return mm.attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, causal=causal,
        softmax_scale=softmax_scale, backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("paged", [False, True])
def test_flash_attn(paged, monkeypatch):
    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    this = problem(paged, {"flash-attn": decode_peers.flash_attn})
    assert this.check(results(this, "flash-attn")) < 1e-5


class BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's, as its documentation has it."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
        kv_data_type=None, data_type=None, sm_scale=None,
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert (num_qo_heads, num_kv_heads, head_dim) == SIZE[2:]
        assert q_data_type == kv_data_type == torch.float32
        assert indptr[-1] == len(indices)
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        self.indices = [indices[a:b] for a, b in itertools.pairwise(indptr)]
        self.lengths = (indptr.diff() - 1) * page_size + last_page_len

    def run(self, q, paged_kv_cache):
        assert q.ndim == 3
        outs = []
        for row, (pages, length) in enumerate(zip(self.indices, self.lengths, strict=True)):
            k, v = (x[pages.long()].flatten(0, 1)[None, :length] for x in paged_kv_cache)
            outs.append(mm.attention(q[row][None, None], k, v, backend="reference")[0])
        return torch.cat(outs)


def test_flashinfer(monkeypatch):
    wrapper = BatchDecodeWithPagedKVCacheWrapper
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=wrapper)
    this = problem(True, {"FlashInfer": decode_peers.flashinfer})
    assert this.check(results(this, "FlashInfer")) < 1e-5


@pytest.mark.parametrize("peer", [decode_peers.flash_attn, decode_peers.flashinfer])
def test_a_library_that_is_absent(peer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    this = problem(True, {"it": peer})
    with pytest.raises(Unavailable, match=r"^\w+ is not installed$"):
        this.implementations["it"]()


def test_who_is_asked_on_a_gpu():
    cuda = torch.device("cuda")
    gpu = set(decode_peers.peers(2, True, cuda, True))
    assert {f"{OURS} triton", "flash-attn", "FlashInfer", "FlexAttention (pages gathered)"} <= gpu
    assert "FlashInfer" not in decode_peers.peers(2, False, cuda, True)


def test_pages_suit_flash_attn():
    assert PAGE_SIZE % 256 == 0
