"""Is the Triton decode kernel right for every cache, however its keys are split?"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels._core import ops, tuning
from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate
from mmkernels._core.tuning import Config
from mmkernels.attention import decode, triton_decode
from mmkernels.attention.interval import IntervalMask
from mmkernels.testing import assert_accurate, attention_rounding, eager_attention

# The interpreter's numpy warns of Inf - Inf, and of a maximum of nothing but NaN.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning"
)
HKV = 2
# The same tests in Triton's interpreter and on a GPU.
DEVICE = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16 keys, so that short caches take several of them."""
    with tuning.override("decode", Config(16, 16, 4, 2)):
        yield


@pytest.fixture
def split(monkeypatch):
    """split(n) makes every later call split its keys into n shares."""
    return lambda n: monkeypatch.setattr(triton_decode, "split_count", lambda *shapes: n)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Cache:
    """A call on a cache, contiguous or paged, whose unused cells hold `unused`.

    The pages of a sequence lie anywhere; entries of block_table beyond its end are garbage.
    """

    def __init__(
        self,
        lengths: list[int],
        seqlen_q: int = 1,
        groups: int = 2,
        head_dim: int = 16,
        value_dim: int | None = None,
        page_size: int | None = None,
        capacity: int = 50,
        kv_heads: int = HKV,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        unused: float = math.nan,
    ) -> None:
        batch, dims = len(lengths), (head_dim, value_dim or head_dim)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.q = normal(batch, seqlen_q, kv_heads * groups, head_dim).to(device, dtype)
        size = page_size or capacity
        blocks = 1 if page_size is None else -(-capacity // page_size)
        self.table, cells = None, torch.arange(batch)[:, None]
        if page_size is not None:
            order = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(1))
            cells = order[: batch * blocks].view(batch, blocks)
            self.table = cells.to(torch.int32)
            for b, length in enumerate(lengths):
                for entry in range(-(-length // page_size), blocks):
                    self.table[b, entry] = (-1, 2**31 - 1, -(2**31), 10**6)[entry % 4]
            self.table = self.table.to(device)
        self.caches = []
        for seed, dim in enumerate(dims):
            held = normal(batch, blocks * size, kv_heads, dim, seed=seed + 2)
            for b, length in enumerate(lengths):
                held[b, length:] = unused
            cache = torch.full((int(cells.max()) + 1, size, kv_heads, dim), unused)
            cache[cells.flatten()] = held.view(-1, size, kv_heads, dim)
            self.caches.append(cache.to(device, dtype))

    def held(self) -> list[Tensor]:
        """k and v (B, S, Hkv, ..), contiguous, 0 in cells that are not used."""
        entries = 0 if self.table is None else self.table.shape[1]
        flat = [decode.gathered(cache, self.table, entries) for cache in self.caches]
        used = torch.arange(flat[0].shape[1], device=self.lengths.device) < self.lengths[:, None]
        return [torch.where(used[..., None, None], x, 0.0) for x in flat]

    def attend(self, **options: Any) -> tuple[Tensor, Tensor]:
        """out and lse of the kernel."""
        return mm.attention_with_kvcache(
            self.q, *self.caches, cache_seqlens=self.lengths, block_table=self.table,
            return_lse=True, backend="triton", **options,
        )  # fmt: skip

    def exact(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The same from the reference in float64."""
        q, *caches = (x.double() for x in (self.q, *self.caches))
        return mm.attention_with_kvcache(
            q, *caches, cache_seqlens=self.lengths, block_table=self.table, return_lse=True,
            backend="reference", **options,
        )  # fmt: skip

    def eager(
        self, causal: bool = True, window_size=(-1, -1), alibi_slopes=None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The same from eager PyTorch in the cache's dtype."""
        k, v = self.held()
        left, right = window_size[0], 0 if causal else window_size[1]
        bounds = decode.bounds(self.lengths, self.q.shape[1], left, right)
        mask = IntervalMask(*bounds, k.shape[1]).to_dense(k.shape[1])[:, None]
        bias = None
        if alibi_slopes is not None:
            row = torch.arange(self.q.shape[1], device=k.device) - self.q.shape[1]
            position = row + self.lengths[:, None]
            distance = (position[..., None] - torch.arange(k.shape[1], device=k.device)).abs()
            bias = -torch.atleast_2d(alibi_slopes)[..., None, None] * distance[:, None]
        return eager_attention(self.q, k, v, mask=mask, bias=bias, **options)

    def check(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Raises unless the kernel obeys the error rule; returns its results."""
        got, exact, eager = self.attend(**options), self.exact(**options), self.eager(**options)
        rounding = attention_rounding(self.q.dtype, exact[1])
        assert got[0].dtype == self.q.dtype and got[1].dtype == torch.float32
        assert got[0].is_contiguous()
        for name, *values in zip(("out", "lse"), got, exact, eager, strict=True):
            assert_accurate(name, *values, rounding=rounding)
        return got


@DEVICE
@pytest.mark.parametrize(
    ("seqlen_q", "groups", "splits"),
    [
        (1, 1, 1), (1, 4, 3), (1, 7, 2), (2, 8, 2), (5, 2, 1), (5, 7, 2), (16, 1, 2), (16, 4, 1),
        (33, 1, 2),
    ],
)  # fmt: skip
def test_rows_of_a_group_share_tiles(seqlen_q, groups, splits, device, small_tiles, split):
    split(splits)
    kv_heads = HKV if seqlen_q * groups < 16 else 1
    Cache([37, 3], seqlen_q, groups, kv_heads=kv_heads, device=device).check()


@DEVICE
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "page_size"),
    [
        (8, 8, None), (64, 64, 16), (72, 72, None), (80, 80, 17), (128, 128, None), (40, 128, None),
        (128, 80, 16),
    ],
)  # fmt: skip
def test_head_dims(head_dim, value_dim, page_size, device, split):
    split(2)
    Cache([70], 2, 2, head_dim, value_dim, page_size, 80, device=device).check()


@DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("page_size", [None, 1, 16, 17, 32])
def test_pages_and_dtypes(page_size, dtype, device, small_tiles, split):
    split(2)
    Cache([0, 49, 18], 3, page_size=page_size, dtype=dtype, kv_heads=1, device=device).check()


@DEVICE
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("lengths", [[0, 1, 50], [2, 3], [0], [0, 0]], ids=str)
def test_ragged_lengths_down_to_less_than_the_rows(lengths, splits, device, small_tiles, split):
    split(splits)
    Cache(lengths, 4, kv_heads=1, device=device).check()


SLOPES = torch.tensor([[0.5, 0.0, 0.2, 1.0], [0.1, 2.0, 0.3, 0.0]])
SINKS = torch.tensor([0.3, -2.0, 4.0, 30.0])
OPTIONS = {
    "not_causal": {"causal": False},
    "window": {"window_size": (4, 0)},
    "only_itself": {"window_size": (0, 0)},
    "both_sides": {"causal": False, "window_size": (9, 1)},
    "right_only": {"causal": False, "window_size": (-1, 2)},
    "left_only": {"causal": False, "window_size": (3, -1)},
    "huge_window": {"causal": False, "window_size": (2**31 - 1, 2**31 - 1)},
    "alibi": {"alibi_slopes": SLOPES[0]},
    "alibi_not_causal": {"alibi_slopes": SLOPES, "causal": False},
    "sinks": {"sinks": SINKS},
    "no_sink": {"sinks": torch.full((4,), -math.inf)},
    "softcap": {"softcap": 1.5},
    "scale_0": {"softmax_scale": 0.0},
    "scale_below_0": {"softmax_scale": -0.4},
    "everything": {
        "window_size": (20, 0),
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "softcap": 2.0,
        "softmax_scale": 0.7,
    },
}


@DEVICE
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, splits, device, small_tiles, split):
    split(splits)
    options = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in OPTIONS[name].items()
    }
    page_size = 16 if splits == 3 else None
    Cache([41, 2], 3, 4, page_size=page_size, kv_heads=1, device=device).check(**options)


@DEVICE
@pytest.mark.parametrize("splits", range(1, 9))
def test_any_number_of_splits(splits, device, small_tiles, split):
    """Rows at 40 to 44 of windows of 10: most shares of two tiles hold no key of some row."""
    split(splits)
    sinks = torch.tensor([0.5, -1.0], device=device)
    Cache([45, 50], 5, kv_heads=1, device=device).check(window_size=(9, 0), sinks=sinks)
    split(splits)
    Cache([45, 5], kv_heads=1, device=device).check(sinks=sinks)


@DEVICE
def test_more_splits_than_the_merge_adds_at_once(device, small_tiles, split):
    splits = triton_decode.CHUNK + 3
    split(splits)
    Cache([16 * splits], kv_heads=1, capacity=16 * splits, device=device).check()


def strided(x: Tensor, how: str) -> Tensor:
    """x as a view with other strides, its neighbours NaN."""
    batch, seqlen, heads, dim = x.shape
    if how == "layers":  # (S, layer, B, H, D)
        whole = x.new_full((seqlen, 3, batch, heads, dim), math.nan)
        view = whole[:, 1].transpose(0, 1)
    elif how == "heads_first":
        view = x.new_full((batch, heads, seqlen, dim), math.nan).transpose(1, 2)
    elif how == "last":
        view = x.new_full((batch, dim, seqlen, heads, 2), math.nan)[..., 1].permute(0, 2, 3, 1)
    else:  # misaligned, or only from its second row on
        first = 3 if how == "misaligned" else 0
        view = x.new_full((batch, seqlen, heads, dim + 5), math.nan)[..., first : dim + first]
    view.copy_(x)
    return view


@DEVICE
@pytest.mark.parametrize("page_size", [None, 17])
@pytest.mark.parametrize("how", ["layers", "heads_first", "last", "misaligned"])
def test_views(how, page_size, device, small_tiles, split):
    split(2)
    cache = Cache([40, 13], 2, 2, page_size=page_size, device=device)
    cache.q = strided(cache.q, how)
    cache.caches = [strided(cache.caches[0], how), strided(cache.caches[1], "layers")]
    if cache.table is not None:
        cache.table = torch.stack((cache.table, cache.table + 1), -1).long()[..., 0]
    cache.lengths = torch.stack((cache.lengths, cache.lengths * 0 + 1), -1)[:, 0]
    cache.check()


@DEVICE
def test_keys_and_lengths_that_a_batch_shares(device, small_tiles, split):
    split(2)
    cache = Cache([33], kv_heads=1, device=device)
    cache.q = normal(3, 2, 2, 16).to(device)
    cache.caches = [x.expand(3, -1, -1, -1) for x in cache.caches]
    cache.lengths = cache.lengths.expand(3)
    cache.check()


@DEVICE
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_behind_the_end_or_before_the_window_is_seen(bad, seqlen_q, device, small_tiles, split):  # fmt: skip # noqa: E501
    split(2)
    cache = Cache([40, 0, 17], seqlen_q, kv_heads=1, device=device, unused=bad)
    got = cache.check(window_size=(9, 0))
    for stored in cache.caches:
        for b, length in enumerate([40, 0, 17]):
            stored[b, : max(length - seqlen_q - 9, 0)] = bad
    for x, y in zip(cache.attend(window_size=(9, 0)), got, strict=True):
        assert torch.equal(x, y)


@DEVICE
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("splits", "dtype"), [(1, torch.float32), (2, torch.float16)])
def test_a_bad_newest_key_reaches_the_rows_that_see_it(splits, bad, where, dtype, device, small_tiles, split):  # fmt: skip # noqa: E501
    split(splits)
    cache = Cache([33, 12], 3, kv_heads=1, dtype=dtype, device=device)
    good = cache.attend()
    cache.caches[where == "value"][0, 31, :, 3] = bad  # of rows 1 and 2 of sequence 0
    out, lse = cache.attend()
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, 1:, :, slice(None) if where == "key" else 3] = True
    assert not out[hit].isfinite().any()
    assert torch.equal(out[~hit], good[0][~hit])
    if where == "value":
        assert torch.equal(lse, good[1])
    else:
        assert not lse[0, :, 1:].isfinite().any()
        assert torch.equal(lse[0, :, 0], good[1][0, :, 0]) and torch.equal(lse[1], good[1][1])


@DEVICE
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_that_sees_only_nan_is_nan(splits, device, small_tiles, split):
    split(splits)
    cache = Cache([1, 33], device=device)
    cache.caches[0][0, 0] = math.nan
    cache.caches[0][1, :33] = math.nan
    for x in cache.attend():
        assert x.isnan().all()


@DEVICE
def test_equal_calls_give_equal_bits(device, small_tiles, split):
    split(3)
    cache = Cache([47, 20], 2, device=device)
    for x, y in zip(cache.attend(), cache.attend(), strict=True):
        assert torch.equal(x, y)


@DEVICE
def test_lengths_and_pages_outside_of_the_cache_are_clamped(device, small_tiles):
    cache = Cache([50, 50], page_size=16, capacity=64, kv_heads=1, device=device, unused=0.0)
    pages = cache.caches[0].shape[0]
    table = torch.tensor([[1, -7, 3, 2], [0, 2**31 - 1, -(2**31), pages]], dtype=torch.int32)
    lengths = torch.tensor([10**6, -3], dtype=torch.int32)

    def run(lengths: Tensor, table: Tensor) -> Tensor:
        inputs = (lengths.to(device), table.to(device), None, None, 0.25, 0.0, -1, 0, "triton")
        return ops.attention_decode(cache.q, *cache.caches, *inputs)[0]

    wanted = run(lengths.clamp(0, 64), table.clamp(0, pages - 1))
    assert torch.equal(run(lengths, table), wanted) and not wanted[1].any()
    assert torch.equal(run(lengths.long(), table.long()), wanted)


@DEVICE
def test_empty_sizes(device):
    def served(cache: Cache) -> None:
        out, lse = cache.attend()
        assert out.shape == cache.q.shape and not out.any() and (lse == -torch.inf).all()

    for page_size in (None, 16):
        cache = Cache([0, 0], 3, page_size=page_size, device=device)
        served(cache)
        cache.q = cache.q[:, :0]
        served(cache)
    cache = Cache([0, 0], device=device)
    cache.caches = [x[:, :0] for x in cache.caches]
    served(cache)
    cache.q, cache.lengths, cache.caches = cache.q[:0], cache.lengths[:0], [x[:0] for x in cache.caches]  # fmt: skip # noqa: E501
    served(cache)
    cache = Cache([0, 0], page_size=16, device=device)
    cache.table = cache.table[:, :0]
    served(cache)
    cache = Cache([0, 0], page_size=16, device=device)
    cache.caches = [x[:0] for x in cache.caches]
    served(cache)


def test_number_of_splits_fills_the_gpu_and_no_more():
    count = triton_decode.split_count
    assert count(132, 1, 64) == 58  # 90 % of what is worth it
    assert count(132, 8, 1000) == 15  # 120 of 132 at once
    assert count(132, 100, 1000) == 5  # 500 of the 528 of four waves
    assert count(132, 1, 10**6) <= triton_decode.MAX_SPLITS
    for programs in (106, 132, 1000, 132 * 50 + 1):
        assert count(132, programs, 1000) == 1
    for programs in range(1, 400):
        assert 1 <= count(132, programs, 7) <= 7
        assert count(132, programs, 0) == 1


@pytest.fixture
def emulated() -> Iterator:
    """Sends launches to a launcher of the harness."""
    yield emulate
    emulate(None)


@pytest.mark.compiled
def test_lengths_do_not_change_the_launch(emulated):
    from tests.triton_harness import recording_launcher

    launcher = recording_launcher(KNOWN_GPUS["sm_90"])
    emulated(launcher)
    for length in (0, 1, 4095, 4096):
        cache = Cache([length], capacity=4096, dtype=torch.bfloat16, unused=0.0)
        cache.attend()
    grids = [launch.grid for launch in launcher.run.launches]
    assert grids == grids[:2] * 4 and len(set(grids)) == 2  # split and merge
    assert grids[0][0] > 2 * 16


@pytest.mark.compiled
def test_pages_are_prefetched_like_a_contiguous_cache(emulated):
    """Copies ahead show in the shared memory that they need."""
    from tests.triton_harness import recording_launcher, resources

    used = []
    for page_size in (None, 16, 128):
        launcher = recording_launcher(KNOWN_GPUS["sm_90"])
        emulated(launcher)
        Cache([256], 1, 4, 128, page_size=page_size, capacity=256, dtype=torch.bfloat16).attend()
        used.append(resources(launcher.run.launches[0].compile("sm_90")))
    assert all(found.stack == 0 for found in used)
    assert used[0].shared > 96 * 1024
    assert all(found.shared >= used[0].shared for found in used)


@pytest.mark.compiled
@pytest.mark.parametrize("head_dim", [40, 72])
def test_heads_of_any_multiple_of_eight_are_copied_ahead(head_dim, emulated):
    from tests.triton_harness import recording_launcher

    launcher = recording_launcher(KNOWN_GPUS["sm_80"])
    emulated(launcher)
    Cache([256], 1, 4, head_dim, capacity=256, dtype=torch.bfloat16).attend()
    assert "cp.async.cg.shared.global" in launcher.run.launches[0].compile("sm_80").asm["ptx"]


@pytest.mark.compiled
@pytest.mark.ptxsim
@pytest.mark.parametrize(
    ("arch", "dtype", "shape", "options"),
    [
        ("sm_90", torch.bfloat16, (1, 4, 128, 128, None), {}),
        ("sm_90", torch.bfloat16, (4, 8, 64, 64, 16), {"window_size": (70, 0)}),
        ("sm_80", torch.bfloat16, (3, 2, 80, 64, 17), {"softcap": 5.0}),
        ("sm_80", torch.float16, (1, 7, 72, 80, 128), {"sinks": torch.linspace(-1, 2, 7)}),
    ],
    ids=["plain", "pages_and_window", "pages_of_17", "large_pages_and_sinks"],
)
def test_compiled_code(arch, dtype, shape, options, emulated, split):
    from tests.triton_harness import ptxsim_launcher

    split(2)
    emulated(ptxsim_launcher(KNOWN_GPUS[arch]))
    *sizes, page_size = shape
    cache = Cache([300, 77], *sizes, page_size, capacity=384, kv_heads=1, dtype=dtype)
    cache.check(**options)


@pytest.mark.compiled
@pytest.mark.ptxsim
@pytest.mark.parametrize("how", ["misaligned", "odd_strides", "last"])
def test_compiled_code_of_views(how, emulated, split):
    from tests.triton_harness import ptxsim_launcher

    split(2)
    emulated(ptxsim_launcher(KNOWN_GPUS["sm_80"]))
    cache = Cache([150], head_dim=40, capacity=160, dtype=torch.float16)
    cache.q, *cache.caches = (strided(x, how) for x in (cache.q, *cache.caches))
    cache.check()


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_captured_graph_serves_other_lengths(page_size):
    cache = Cache(
        [2000, 1], 2, 4, 64, page_size=page_size, capacity=2048, device="cuda", unused=0.0
    )
    full = Cache([2048, 2048], 2, 4, 64, page_size=page_size, capacity=2048, device="cuda")
    cache.caches, cache.table = full.caches, full.table
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cache.attend()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = cache.attend()
    for lengths in ([2000, 1], [0, 2048], [5, 700]):
        cache.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        wanted = cache.attend()
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
        cache.check()
