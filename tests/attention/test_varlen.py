"""Is packed attention what attention over each sequence by itself gives, forward and backward?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mm
from tests.attention import backends

BACKENDS = backends.each("reference", "cpu", "auto", "triton")
LENGTHS = {
    "equal": ([3, 1, 6], [3, 1, 6]),
    "more_keys": ([2, 1, 4], [5, 9, 4]),
    "more_rows": ([5, 7, 4], [2, 7, 1]),
    "empty_sequences": ([0, 4, 0, 3, 0], [2, 0, 0, 5, 0]),
    "long": ([70, 1, 130], [90, 200, 130]),
    "no_sequence": ([], []),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal_window": {"causal": True, "window_size": (3, 3)},
    "scale": {"softmax_scale": 0.3},
}


@pytest.fixture(autouse=True)
def two_tiles_of_the_long_sequences():
    """128 rows also make a tile of the Triton kernels."""
    with backends.wide_tiles(128):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(lengths: list[int], heads: int, dim: int, unused: int = 0, seed: int = 0) -> Tensor:
    return normal(sum(lengths) + unused, heads, dim, seed=seed)


def inputs_of(name: str, heads: tuple[int, int] = (4, 4), value_dim: int = 8) -> list[Tensor]:
    len_q, len_k = LENGTHS[name]
    sizes = ((len_q, heads[0], 8), (len_k, heads[1], 8), (len_k, heads[1], value_dim))
    return [packed(*size, seed=seed) for seed, size in enumerate(sizes)]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, len_q: list[int], len_k: list[int], **options: object
) -> tuple[Tensor, Tensor]:
    """out and lse of a loop over the sequences on the reference; rows in none stay empty."""
    used = 0.0 * (q.sum() + k.sum() + v.sum())  # a gradient even where there is no sequence
    out = q.new_zeros(*q.shape[:2], v.shape[2]) + used
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    q0 = k0 = 0
    for nq, nk in zip(len_q, len_k, strict=True):
        rows, keys = slice(q0, q0 + nq), slice(k0, k0 + nk)
        part, part_lse = mm.attention(
            q[None, rows], k[None, keys], v[None, keys], return_lse=True, backend="reference",
            **options,
        )  # fmt: skip
        out[rows], lse[:, rows] = part[0], part_lse[0]
        q0, k0 = q0 + nq, k0 + nk
    return out, lse


def together(
    q: Tensor, k: Tensor, v: Tensor, len_q: list[int], len_k: list[int], **options: object
) -> tuple[Tensor, Tensor]:
    cu_seqlens_q, cu_seqlens_k = cumulative(len_q), cumulative(len_k)
    return backends.call(
        mm.attention_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, max([0, *len_q]),
        max([0, *len_k]), return_lse=True, **options,
    )  # fmt: skip


def assert_same(
    inputs: list[Tensor], len_q: list[int], len_k: list[int], backend: str, **options: object
) -> None:
    """out, lse and the gradients of all inputs, in float32 and if it may float64, as the loop's."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = results(one_by_one(*leaves, len_q, len_k, **options), leaves)
    for dtype in {backends.widest(backend), torch.float32}:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        got = results(together(*leaves, len_q, len_k, backend=backend, **options), leaves)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            assert x.shape == y.shape and x.dtype == dtype
            torch.testing.assert_close(
                x.double(),
                y,
                **backends.tolerance(dtype),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def as_it_computes(backend: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest dtype that the backend serves."""
    return [x.to(backends.widest(backend)) for x in tensors]


def assert_equal(backend: str, *pairs: tuple[Tensor, Tensor]) -> None:
    """Results, and what the reference made of the same numbers in float64."""
    for got, wanted in pairs:
        torch.testing.assert_close(
            got.double(), wanted, **backends.tolerance(backends.widest(backend))
        )


def results(output: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out, lse = output
    finite = lse.where(lse > -torch.inf, 0.0)
    loss = (out * normal(*out.shape, seed=7).to(out.dtype)).sum() + finite.sin().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@BACKENDS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_does_each_sequence_attend_only_itself(lengths, options, backend):
    assert_same(inputs_of(lengths), *LENGTHS[lengths], backend, **options)


@BACKENDS
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("lengths", ["more_keys", "empty_sequences", "long"])
def test_are_heads_shared_in_groups(lengths, heads, backend):
    assert_same(inputs_of(lengths, heads), *LENGTHS[lengths], backend, causal=True)


@BACKENDS
@pytest.mark.parametrize("value_dim", [3, 16])
def test_may_values_have_another_width(value_dim, backend):
    assert_same(inputs_of("more_rows", (4, 2), value_dim), *LENGTHS["more_rows"], backend)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_are_alibi_distances_within_each_sequence(lengths, causal, backend):
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    options = {"alibi_slopes": slopes, "causal": causal}
    assert_same(inputs_of(lengths), *LENGTHS[lengths], backend, **options)


@BACKENDS
@pytest.mark.parametrize("total_q, total_k", [(6, 6), (9, 6), (6, 9), (8, 11)])
def test_do_alibi_distances_ignore_rows_and_keys_beyond_the_last_sequence(
    total_q, total_k, backend
):
    cu_seqlens = cumulative([2, 4])  # one tensor for queries and keys
    q, k, v = normal(total_q, 4, 8), normal(total_k, 4, 8, seed=1), normal(total_k, 4, 8, seed=2)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    wanted, _ = one_by_one(q, k, v, [2, 4], [2, 4], alibi_slopes=slopes)
    q, k, v = as_it_computes(backend, q, k, v)
    arguments = (mm.attention_varlen, q, k, v, cu_seqlens, cu_seqlens, 4, 4)
    out = backends.call(*arguments, alibi_slopes=slopes, backend=backend)
    assert_equal(backend, (out, wanted))


@BACKENDS
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (4, 4)], ids=str)
def test_is_one_sequence_plain_attention_even_with_alibi(lengths, backend):
    q, k, v = normal(lengths[0], 4, 8), *(normal(lengths[1], 2, 8, seed=n) for n in (1, 2))
    options = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "window_size": (6, 3)}
    out, _ = together(q, k, v, [lengths[0]], [lengths[1]], backend="reference", **options)
    plain = (x[None] for x in as_it_computes(backend, q, k, v))
    wanted = backends.call(mm.attention, *plain, backend=backend, **options)
    assert_equal(backend, (wanted[0], out))


@BACKENDS
def test_are_alibi_and_bias_both_added(backend):
    q, k, v = inputs_of("more_keys")
    len_q, len_k = LENGTHS["more_keys"]
    slopes, bias = torch.tensor([0.5, 0.25, 0.1, 0.0]), normal(4, sum(len_q), sum(len_k), seed=3)
    narrow = as_it_computes(backend, q, k, v)
    out, _ = together(*narrow, len_q, len_k, alibi_slopes=slopes, bias=bias, backend=backend)
    q0 = k0 = 0
    for nq, nk in zip(len_q, len_k, strict=True):
        rows, keys = slice(q0, q0 + nq), slice(k0, k0 + nk)
        wanted = mm.attention(
            q[None, rows], k[None, keys], v[None, keys], alibi_slopes=slopes,
            bias=bias[:, rows, keys], backend="reference",
        )  # fmt: skip
        assert_equal(backend, (out[rows], wanted[0]))
        q0, k0 = q0 + nq, k0 + nk


@BACKENDS
@pytest.mark.parametrize("lengths", ["equal", "empty_sequences", "long"])
def test_do_sinks_take_part_in_every_sequence(lengths, backend):
    sinks = torch.tensor([0.3, -2.0, 4.0, 0.0])
    options = {"sinks": sinks, "causal": True}
    assert_same(inputs_of(lengths), *LENGTHS[lengths], backend, **options)


@backends.each("reference", "auto", "triton")
def test_is_softcap_applied(backend):
    assert_same(inputs_of("more_keys"), *LENGTHS["more_keys"], backend, softcap=0.7)


@BACKENDS
def test_is_an_extra_mask_intersected_with_the_packing(backend):
    len_q, len_k = LENGTHS["more_keys"]
    q, k, v = inputs_of("more_keys")
    shown = normal(sum(len_q), sum(len_k), seed=5) > -0.3  # no interval
    near = mm.masks.window(sum(len_q), sum(len_k), window_size=(6, 2))
    for mask, visible in ((shown, shown), (near, near.to_dense()[0])):
        narrow = as_it_computes(backend, q, k, v)
        out, lse = together(*narrow, len_q, len_k, mask=mask, backend=backend)
        q0 = k0 = 0
        for nq, nk in zip(len_q, len_k, strict=True):
            rows, keys = slice(q0, q0 + nq), slice(k0, k0 + nk)
            wanted, wanted_lse = mm.attention(
                q[None, rows], k[None, keys], v[None, keys], backend="reference", return_lse=True,
                bias=torch.zeros(nq, nk).masked_fill(~visible[rows, keys], -torch.inf),
            )  # fmt: skip
            assert_equal(backend, (out[rows], wanted[0]), (lse[:, rows], wanted_lse[0]))
            q0, k0 = q0 + nq, k0 + nk


@BACKENDS
def test_do_rows_beyond_the_last_sequence_stay_empty(backend):
    q, k, v = normal(8, 4, 8), normal(9, 4, 8, seed=1), normal(9, 4, 8, seed=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wanted = results(one_by_one(*leaves, [2, 3], [4, 1]), leaves)
    leaves = [x.detach().requires_grad_() for x in as_it_computes(backend, q, k, v)]
    got = results(together(*leaves, [2, 3], [4, 1], backend=backend), leaves)
    assert_equal(backend, *zip(got, wanted, strict=True))
    assert not got[0][5:].any() and (got[1][:, 5:] == -torch.inf).all()
    assert not got[2][5:].any() and not got[3][5:].any() and not got[4][5:].any()


@BACKENDS
@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    st.booleans(),
    st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    st.sampled_from([(2, 2), (4, 2), (2, 1)]),
    st.integers(0, 1000),
)
def test_any_lengths_and_windows(backend, lengths, causal, window_size, heads, seed):
    len_q, len_k = [n for n, _ in lengths], [n for _, n in lengths]
    sizes = ((len_q, heads[0]), (len_k, heads[1]), (len_k, heads[1]))
    inputs = [packed(n, h, 4, seed=seed + place) for place, (n, h) in enumerate(sizes)]
    assert_same(inputs, len_q, len_k, backend, causal=causal, window_size=window_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seqlens_of_either_width(dtype):
    q, k, v = inputs_of("more_keys")
    len_q, len_k = LENGTHS["more_keys"]
    wanted, _ = one_by_one(q, k, v, len_q, len_k)
    out = mm.attention_varlen(
        q, k, v, cumulative(len_q).to(dtype), cumulative(len_k).to(dtype), max(len_q), max(len_k)
    )
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)


def test_lse_comes_only_when_asked_for_and_heads_first():
    q, k, v = inputs_of("more_keys", (4, 2))
    arguments = (q, k, v, *map(cumulative, LENGTHS["more_keys"]), 4, 9)
    out = mm.attention_varlen(*arguments)
    both = mm.attention_varlen(*arguments, return_lse=True)
    assert isinstance(out, Tensor) and isinstance(both, tuple)
    assert torch.equal(out, both[0])
    assert both[1].shape == (4, sum(LENGTHS["more_keys"][0]))


@BACKENDS
def test_packed_masks_serve_attention_as_well(backend):
    q, k, v = inputs_of("more_keys", (4, 2))
    len_q, len_k = LENGTHS["more_keys"]
    wanted, _ = one_by_one(q, k, v, len_q, len_k, causal=True)
    mask = mm.masks.packed(cumulative(len_q), cumulative(len_k), causal=True)
    plain = (x[None] for x in as_it_computes(backend, q, k, v))
    out = backends.call(mm.attention, *plain, mask=mask, backend=backend)
    assert_equal(backend, (out[0], wanted))
