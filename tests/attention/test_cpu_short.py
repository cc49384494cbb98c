"""Short batch elements with bounds of their own, which share a call on the cpu backend."""

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels.attention import cpu_flash, plan
from mmkernels.attention.cpu_work import Work
from mmkernels.attention.interval import IntervalMask
from tests.attention import passes

# batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, value_dim
SIZES = {
    "grouped heads": (7, 48, 48, 6, 2, 16, 16),
    "two tiles of rows": (5, 90, 90, 2, 2, 16, 16),
    "one element": (1, 48, 48, 4, 2, 16, 16),
    "one row": (6, 1, 50, 4, 2, 16, 16),
    "more keys, wide values": (5, 33, 70, 2, 1, 16, 24),
}
MASKS = ("padding", "left padding, causal", "image spans", "prefix-LM", "ragged")


@pytest.fixture(autouse=True)
def fresh_plans():
    plan._shared_plan.cache_clear()
    yield
    plan._shared_plan.cache_clear()


@pytest.fixture
def small_masks(monkeypatch):
    """Few batch elements fit into a mask."""
    monkeypatch.setattr(plan, "TILE_KEYS", 128)


def ragged(batch: int, rows: int, keys: int, seed: int = 0) -> IntervalMask:
    """Bounds at random, where about every fourth row sees no key; one element sees none at all."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, keys, (batch, rows), generator=generator)
    end = start + torch.randint(-keys // 3, keys, (batch, rows), generator=generator)
    end[batch // 2] = 0
    shown = end.clamp(max=keys) > start
    return IntervalMask(
        start.where(shown, 0).int(), end.clamp(max=keys).where(shown, 0).int(), keys
    )


def leaves(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, rows, keys, heads, kv_heads, dim, value_dim = sizes
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim))
    return [torch.randn(batch, *x, generator=generator, dtype=dtype) for x in shapes]


def attended(inputs: list[Tensor], mask: IntervalMask, backend: str, dout: Tensor, dlse: Tensor):
    """out, lse and the gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = mm.attention(*inputs, mask=mask, return_lse=True, backend=backend)
    return [x.detach() for x in results] + list(torch.autograd.grad(results, inputs, (dout, dlse)))


def cotangents(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    batch, rows, _, heads, _, _, value_dim = sizes
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(batch, rows, heads, value_dim, generator=generator, dtype=dtype),
        torch.randn(batch, heads, rows, generator=generator, dtype=dtype),
    )


def work(sizes: tuple[int, ...], mask: IntervalMask) -> Work:
    return Work(*leaves(sizes), mask.start, mask.end, None, None, 1.0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_rule(dtype, sizes, name):
    if name == "ragged" and sizes[1] == 1:
        pytest.skip("ragged masks have more rows")
    passes.check(sizes, name, dtype, "cpu", "cpu")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_bounds_and_rows_without_a_key(small_masks, sizes, seed):
    mask = ragged(*sizes[:3], seed)
    got, wanted = (
        attended(leaves(sizes), mask, backend, *cotangents(sizes))
        for backend in ("cpu", "reference")
    )
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(
            x, y, atol=1e-11, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("batch", [2, 3, 4, 6, 7, 8])
def test_calls_hold_as_many_elements_as_a_mask_may(monkeypatch, batch):
    monkeypatch.setattr(plan, "TILE_KEYS", 3 * 32 * 40 // plan.TILE_ROWS + 1)  # three elements
    sizes = (batch, 32, 40, 2, 2, 8, 8)
    start = torch.zeros(batch, 32, dtype=torch.int32)
    mask = IntervalMask(start, start + 40 - torch.arange(batch)[:, None].int(), 40)
    blocks = work(sizes, mask).blocks
    assert [b.stop - b.start for b, _ in blocks] == [3] * (batch // 3) + [batch % 3] * (
        batch % 3 > 0
    )
    for _, block in blocks:
        (piece,) = block.pieces
        assert piece.hidden().numel() <= plan.TILE_ROWS * plan.TILE_KEYS


def test_one_call_serves_a_batch_of_short_sequences(monkeypatch):
    calls = []
    forward, backward = cpu_flash._forward, cpu_flash._backward
    monkeypatch.setattr(cpu_flash, "_forward", lambda *a, **o: calls.append(0) or forward(*a, **o))
    monkeypatch.setattr(
        cpu_flash, "_backward", lambda *a, **o: calls.append(1) or backward(*a, **o)
    )
    sizes = (16, 48, 48, 6, 2, 32, 32)
    attended(leaves(sizes), ragged(*sizes[:3]), "cpu", *cotangents(sizes))
    assert calls == [0, 1]


def test_one_long_row_among_short_ones_is_not_shared():
    """The others would each pay for its keys."""
    start = torch.zeros(30, 8, dtype=torch.int32)
    end = torch.full_like(start, 4)
    end[3] = 4000
    blocks = work((30, 8, 4000, 2, 2, 8, 8), IntervalMask(start, end, 4000)).blocks
    assert [b.stop - b.start for b, _ in blocks] == [1] * 30


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_hidden_reaches_nobody(dtype, where, value):
    sizes = (6, 20, 20, 4, 2, 16, 16)
    start = torch.zeros(6, 20, dtype=torch.int32)
    end = (torch.arange(20)[None] - torch.arange(6)[:, None] + 8).clamp(3, 19).int()
    start[2, 5:9], end[2, 5:9] = 0, 0
    mask = IntervalMask(start, end, 20)  # nobody sees the last key
    inputs, grads = leaves(sizes, dtype), cotangents(sizes, dtype)
    grads = (grads[0], grads[1].float())
    wanted = attended(inputs, mask, "cpu", *grads)
    inputs = [x.clone() for x in inputs]
    for x in inputs[1:] if where == "both" else [inputs[1 if where == "key" else 2]]:
        x[3, -1] = value
    got = attended(inputs, mask, "cpu", *grads)
    tolerance = (
        {"atol": 3e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.04, "rtol": 0.02}
    )
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda t, name=name: f"{name}: {t}")


def test_nan_that_is_seen_is_seen():
    sizes = (3, 4, 4, 1, 1, 8, 8)
    start = torch.zeros(3, 4, dtype=torch.int32)
    end = torch.tensor([[1, 1, 2, 4], [2, 2, 3, 3], [4, 4, 4, 4]], dtype=torch.int32)
    q, k, v = leaves(sizes)
    k[0, 0] = float("nan")
    mask = IntervalMask(start, end, 4)
    out, lse = mm.attention(q, k, v, mask=mask, return_lse=True, backend="cpu")
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1:].isfinite().all() and lse[1:].isfinite().all()


def test_a_row_without_a_key_gives_nothing_to_gradients():
    sizes = (4, 12, 12, 2, 1, 8, 8)
    mask = ragged(*sizes[:3])
    empty = mask.end <= mask.start
    assert empty.any() and not empty.all()
    (q, k, v), (dout, dlse) = leaves(sizes), cotangents(sizes)
    dlse = dlse.masked_fill(empty[:, None], 0.0)
    wanted = attended([q, k, v], mask, "cpu", dout, dlse)
    q, dout = (x.masked_fill(empty[..., None, None], float("nan")) for x in (q, dout))
    got = attended([q, k, v], mask, "cpu", dout, dlse)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert torch.equal(x, y), name
    assert not got[0][empty].any() and not got[2][empty].any()


def test_the_same_bits_every_time():
    sizes = (9, 40, 40, 4, 2, 16, 16)
    runs = [
        attended(leaves(sizes), ragged(*sizes[:3]), "cpu", *cotangents(sizes)) for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
