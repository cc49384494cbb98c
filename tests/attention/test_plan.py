"""Do the cpu backend's pieces show each row its keys, each once, with masks of bounded size?"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mm
from mmkernels.attention import masks, plan
from mmkernels.attention.interval import IntervalMask


def shown_by(piece: plan.Piece, block: plan.Block) -> np.ndarray:
    """(rows, keys) bool, True where the kernel lets a row see a key."""
    rows, keys = block.r1 - block.r0, piece.k1 - piece.k0
    assert piece.shape(block) == (rows, keys)
    assert not (piece.causal and piece.bounds is not None)
    if piece.causal:
        return np.tril(np.ones((rows, keys), dtype=bool))
    if piece.bounds is not None:
        assert rows <= plan.TILE_ROWS and keys <= plan.TILE_KEYS
        hidden = piece.hidden().numpy()
        assert hidden.shape == (1, rows, keys)
        return ~hidden[0]
    return np.ones((rows, keys), dtype=bool)


def assert_covers(blocks: tuple[plan.Block, ...], shown: Tensor, tiled: bool) -> None:
    """Every visible (row, key) is in one piece, no hidden one in any, and no row in vain."""
    count = np.zeros(shown.shape, dtype=np.int8)
    for block in blocks:
        assert 0 <= block.r0 < block.r1 <= shown.shape[0]
        assert block.pieces
        if tiled:
            assert block.r1 - block.r0 <= plan.TILE_ROWS
        for piece in block.pieces:
            assert 0 <= piece.k0 < piece.k1 <= shown.shape[1]
            assert not (tiled and piece.causal)
            seen = shown_by(piece, block)
            assert seen.any(1).all(), "a row of a piece sees none of its keys"
            count[block.rows, piece.keys] += seen
    assert np.array_equal(count, shown.numpy().astype(np.int8))


def check(start: Tensor, end: Tensor, seqlen_k: int) -> None:
    shown = IntervalMask(start, end, seqlen_k).to_dense()[0]
    for tiled in (False, True):
        assert_covers(plan.plan(start, end, tiled), shown, tiled)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 4 x 12 and runs of 3, so that small masks reach every branch."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("TILE_ROWS", 4), ("TILE_KEYS", 12), ("LONG_RUN", 3)):
            patch.setattr(plan, name, size)
        for cached in (plan._plan, plan.full_plan):
            cached.cache_clear()
        yield
    for cached in (plan._plan, plan.full_plan):
        cached.cache_clear()


def bounds(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """start, end (Sq,) int32 in normal form."""
    pairs = [(a, b) if a < b else (0, 0) for a, b in pairs]
    start, end = torch.tensor(pairs, dtype=torch.int32).view(-1, 2).unbind(1)
    return start.contiguous(), end.contiguous()


@given(st.integers(0, 40), st.data())
def test_random_intervals(seqlen_k, data):
    bound = st.integers(0, seqlen_k)
    pairs = data.draw(st.lists(st.tuples(bound, bound), max_size=12))
    with small_tiles():
        check(*bounds([tuple(sorted(pair)) for pair in pairs]), seqlen_k)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(28, 48)), min_size=1, max_size=9))
def test_rows_that_share_some_keys(pairs):
    with small_tiles():
        check(*bounds(pairs), 48)


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Runs of rows whose start and end each stay, grow or shrink by one a row."""
    pairs: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        start, end = draw(st.integers(0, 30)), draw(st.integers(0, 30))
        start_step, end_step = (
            draw(st.sampled_from([0, 0, 1, -1])),
            draw(st.sampled_from([0, 1, 1, -1])),
        )
        for row in range(draw(st.integers(1, 9))):
            pairs.append((start + start_step * row, end + end_step * row))
    return [(min(max(a, 0), 40), min(max(b, 0), 40)) for a, b in pairs]


@given(stretches())
def test_stretches_of_regular_rows(pairs):
    with small_tiles():
        check(*bounds(pairs), 40)


@st.composite
def structured(draw: st.DrawFn) -> IntervalMask:
    """Masks as the builders make them."""
    seqlen_q, seqlen_k = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["window", "prefix_lm", "documents", "spans", "top_left"]))
    if kind == "window":
        size = draw(st.tuples(st.integers(-1, 20), st.integers(-1, 20)))
        return masks.window(seqlen_q, seqlen_k, window_size=size)
    if kind == "prefix_lm":
        return masks.prefix_lm(draw(st.integers(0, seqlen_k)), seqlen_q, seqlen_k)
    if kind == "top_left":
        return masks.top_left(seqlen_q, seqlen_k)
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    edges = torch.tensor([0, *np.cumsum(lengths).tolist()])
    if kind == "documents":
        others = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
        other_edges = torch.tensor([0, *np.cumsum(others).tolist()])
        return masks.packed(edges, other_edges, causal=draw(st.booleans()), total_q=seqlen_q + 45)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    left = draw(st.integers(-1, 9))
    local = masks.causal(len(ids)) & masks.window(len(ids), window_size=(left, -1))
    return local | masks.spans(ids)


@given(structured())
def test_masks_of_the_builders(mask):
    with small_tiles():
        check(mask.start[0], mask.end[0], mask.seqlen_k)


def attended(mask: IntervalMask, backend: str, options: dict) -> list[Tensor]:
    """out, lse, dq, dk and dv for fixed random inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, keys = mask.shape[1], mask.seqlen_k
    leaves = [
        normal(1, n, heads, 4).requires_grad_() for n, heads in ((rows, 2), (keys, 1), (keys, 1))
    ]
    out, lse = mm.attention(*leaves, mask=mask, return_lse=True, backend=backend, **options)
    cotangents = normal(*out.shape), normal(*lse.shape)
    return [out, lse, *torch.autograd.grad((out, lse), leaves, cotangents)]


@settings(max_examples=60)
@given(
    st.one_of(
        structured(), stretches(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    )
)
@pytest.mark.parametrize(
    "options", [{}, {"alibi_slopes": torch.tensor([0.3, 0.1])}], ids=["plain", "alibi"]
)
def test_attention_over_any_pieces(options, mask):
    if not isinstance(mask, IntervalMask):
        mask = IntervalMask(*bounds(mask), 40)
    wanted = attended(mask, "reference", options)
    with small_tiles():
        got = attended(mask, "cpu", options)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(
            x, y, atol=1e-11, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


LONG = {
    "causal": lambda: masks.causal(400),
    "causal_more_keys": lambda: masks.causal(130, 2000),
    "causal_more_rows": lambda: masks.causal(400, 150),
    "window": lambda: masks.window(700, window_size=(100, 0)),
    "wide_window": lambda: masks.window(400, 3000, window_size=(1500, 1200)),
    "narrow_window": lambda: masks.window(300, window_size=(0, 0)),
    "prefix_lm": lambda: masks.prefix_lm(200, 500),
    "documents": lambda: masks.packed(torch.tensor([0, 3, 3, 200, 201, 500]), causal=True),
    "cross_documents": lambda: masks.packed(
        torch.tensor([0, 3, 200, 201, 300]), torch.tensor([0, 1500, 1500, 1501, 4000]), total_q=340
    ),
    "spans": lambda: masks.causal(500) | masks.spans((torch.arange(500) // 90) - 1),
    "local_spans": lambda: (
        masks.window(500, window_size=(64, 0)) | masks.spans(torch.arange(500) // 90)
    ),
    "far_left": lambda: IntervalMask(torch.arange(200) % 2 * 1500, torch.full((200,), 3000), 3000),
    "far_right": lambda: IntervalMask(
        torch.zeros(200).int(), 1500 + torch.arange(200) // 50 * 1200, 5100
    ),
    "nothing": lambda: IntervalMask(torch.zeros(300).int(), torch.zeros(300).int(), 10),
    "steep": lambda: IntervalMask(torch.arange(200) * 9, torch.arange(200) * 9 + 1300, 3200),
    "scattered": lambda: IntervalMask(
        torch.arange(150) * 37 % 2000,
        torch.arange(150) * 37 % 2000 + 1 + torch.arange(150) * 11,
        3700,
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_long_masks_at_the_real_tile_sizes(name):
    mask = LONG[name]()
    check(mask.start[0], mask.end[0], mask.seqlen_k)


@given(st.integers(0, 14), st.integers(1, 14), st.booleans())
def test_without_a_mask_every_row_sees_every_key(seqlen_q, seqlen_k, tiled):
    with small_tiles():
        blocks = plan.full_plan(seqlen_q, seqlen_k, tiled)
        assert_covers(blocks, torch.ones(seqlen_q, seqlen_k, dtype=torch.bool), tiled)


@pytest.mark.parametrize("name", ["causal", "prefix_lm", "causal_more_keys", "causal_more_rows"])
def test_regular_masks_need_no_mask_tensor(name):
    mask = LONG[name]()
    pieces = [piece for b in plan.plan(mask.start[0], mask.end[0], False) for piece in b.pieces]
    assert len(pieces) <= 3
    assert all(piece.bounds is None for piece in pieces)


def test_a_window_costs_what_its_keys_cost():
    mask = masks.window(4096, window_size=(127, 0))
    blocks = plan.plan(mask.start[0], mask.end[0], False)
    cells = sum(np.prod(piece.shape(block)) for block in blocks for piece in block.pieces)
    assert cells <= 3 * int(mask.to_dense().sum())


def test_tiles_end_where_short_documents_do():
    lengths = torch.tensor([48, 30, 61, 9, 50, 40] * 20)
    edges = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    mask = masks.packed(edges, causal=True)
    blocks = plan.plan(mask.start[0], mask.end[0], False)
    assert {block.r0 for block in blocks} <= set(edges.tolist())
    cells = sum(np.prod(piece.shape(block)) for block in blocks for piece in block.pieces)
    assert cells <= plan.TILE_ROWS * int(lengths.sum())


def test_bounds_that_are_not_contiguous():
    mask = masks.causal(200)
    strided = torch.stack((mask.start[0], mask.end[0]), 1)
    check(strided[:, 0], strided[:, 1], 200)
