"""Does NaN or Inf in a key or value reach the rows that see it, and no other?

And is a row that sees no key 0, with lse -inf and gradients 0?
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops
from mmkernels.attention.interval import IntervalMask
from tests.attention import backends

masks = mm.masks
B, S, HQ, HKV, D = 2, 150, 4, 2, 8  # S above the 128 rows of a tile
NAMES = ("reference", "cpu", "triton")
BACKENDS = backends.each(*NAMES)
# Name -> what is put, and whether into all of a vector or one element of it.
BAD = {
    "nan": (math.nan, True),
    "inf_element": (math.inf, False),
    "minus_inf": (-math.inf, True),
}


@pytest.fixture(autouse=True)
def two_tiles_of_a_kind():
    """128 rows also make a tile of the Triton kernels."""
    with backends.wide_tiles(128):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def some_cells() -> Tensor:
    """A bool mask that is no interval, with rows that see nothing."""
    shown = normal(S, S, seed=5) > 0.8
    shown[[0, 77, S - 1]] = False
    return shown


def spans() -> Tensor:
    ids = torch.full((S,), -1)
    ids[10:60], ids[100:140] = 0, 1
    return ids


DOCUMENTS = torch.tensor([0, 1, 40, 40, 145])

# Name -> the options that make the mask, and the dense mask (1 or B, 1 or HQ, S, S).
KINDS = {
    "full": lambda: ({}, torch.ones(1, S, S).bool()),
    "causal": lambda: ({"causal": True}, masks.causal(S).to_dense()),
    "window": lambda: (
        {"window_size": (20, 3)}, masks.window(S, window_size=(20, 3)).to_dense()
    ),
    "causal_window": lambda: (
        {"window_size": (70, -1), "causal": True}, masks.window(S, window_size=(70, 0)).to_dense()
    ),
    "padding": lambda: of_mask(masks.padding(torch.tensor([30, 145]), S)),
    "left_padding": lambda: of_mask(masks.padding(torch.tensor([140, 0]), S, side="left")),
    "left_padding_causal": lambda: of_mask(
        masks.padding(torch.tensor([140, 20]), S, side="left") & masks.causal(S)
    ),
    "packed": lambda: of_mask(masks.packed(DOCUMENTS, total_q=S, total_k=S)),
    "packed_causal": lambda: of_mask(masks.packed(DOCUMENTS, causal=True, total_q=S, total_k=S)),
    "prefix_lm": lambda: of_mask(masks.prefix_lm(torch.tensor([20, 90]), S)),
    "spans": lambda: of_mask(masks.spans(spans())),
    "causal_or_spans": lambda: of_mask(masks.causal(S) | masks.spans(spans())),
    "steep": lambda: of_mask(
        IntervalMask(torch.arange(S) // 2, torch.arange(S) // 2 + torch.arange(S) % 7, S)
    ),
    "dense": lambda: ({"mask": some_cells()}, some_cells()[None]),
    "dense_heads": lambda: (
        {"mask": some_cells().view(1, S, S) & (normal(HQ, S, S, seed=6) > 0)},
        (some_cells().view(1, S, S) & (normal(HQ, S, S, seed=6) > 0))[None],
    ),
    "bias": lambda: (
        {"bias": normal(S, S, seed=7).masked_fill(~some_cells(), -torch.inf)}, some_cells()[None]
    ),
    "bias_causal": lambda: (
        {"bias": normal(HQ, S, S, seed=7), "causal": True}, masks.causal(S).to_dense()
    ),
    "alibi_causal": lambda: (
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 1.0]), "causal": True},
        masks.causal(S).to_dense(),
    ),
    "sinks_window": lambda: (
        {"sinks": torch.tensor([0.5, 0.1, -3.0, 1.0]), "window_size": (9, 0)},
        masks.window(S, window_size=(9, 0)).to_dense(),
    ),
}  # fmt: skip
KIND = pytest.mark.parametrize("kind", KINDS)


def of_mask(mask: IntervalMask) -> tuple[dict, Tensor]:
    return {"mask": mask}, mask.to_dense()


def mask_of(kind: str) -> tuple[dict, Tensor]:
    """The options, and what every row of every head sees: (B, HQ, S, S)."""
    options, shown = KINDS[kind]()
    shown = shown[:, None] if shown.ndim == 3 else shown
    return options, shown.expand(B, HQ, S, S)


# (batch, key, key head): in both tiles, in the documents and spans, at the edges.
POISONED = [(0, 12, 0), (0, 12, 1), (0, 141, 1), (1, 39, 0), (1, 149, 1)]


def poisoned(x: Tensor, bad: float, whole: bool) -> tuple[Tensor, Tensor]:
    """x with `bad` at POISONED, in all of a vector or in one element, and x with 0 there."""
    dirty, clean = x.clone(), x.clone()
    for b, j, h in POISONED:
        place = (b, j, h) if whole else (b, j, h, 3)
        dirty[place], clean[place] = bad, 0.0
    return dirty, clean


class Part(NamedTuple):
    """What a backend computes of the problem; the reference computes all of it."""

    batch: slice = slice(None)
    heads: slice = slice(None)
    kv_heads: slice = slice(None)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kv = k[self.batch, :, self.kv_heads], v[self.batch, :, self.kv_heads]
        return q[self.batch, :, self.heads], *kv

    def rows(self, x: Tensor) -> Tensor:
        """Of (B, HQ, ..)."""
        return x[self.batch, self.heads]

    def results(self, out: Tensor, lse: Tensor, dq: Tensor, *dkv: Tensor) -> tuple[Tensor, ...]:
        return (*map(self.rows, (out, lse, dq)), *(x[self.batch, self.kv_heads] for x in dkv))

    def options(self, options: dict) -> dict:
        return {name: self._option(x) for name, x in options.items()}

    def _option(self, x: object) -> object:
        if isinstance(x, IntervalMask) and x.shape[0] == B:
            return IntervalMask(x.start[self.batch], x.end[self.batch], S)
        if isinstance(x, Tensor) and x.ndim != 2:  # (HQ,), (HQ, S, S) or (1, HQ, S, S)
            return x[..., self.heads, :, :] if x.ndim > 2 else x[self.heads]
        return x


def part_of(backend: str) -> Part:
    """In Triton's interpreter the batch element and heads that have a NaN in both tiles."""
    if backends.interpreted(backend):
        return Part(slice(0, 1), slice(2, 4), slice(1, 2))
    return Part()


def touched_rows(shown: Tensor) -> Tensor:
    """(B, HQ, S): which rows see a poisoned key of their head."""
    touched = torch.zeros(B, HQ, S, dtype=torch.bool)
    for b, j, h in POISONED:
        heads = slice(h * HQ // HKV, (h + 1) * HQ // HKV)
        touched[b, heads] |= shown[b, heads, :, j]
    return touched


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, S, HQ, D), (B, S, HKV, D), (B, S, HKV, D)
    q, k, v = (normal(*shape, seed=seed).float() for seed, shape in enumerate(shapes))
    return q, k, v


def with_poison(which: str, bad: float, whole: bool) -> tuple[tuple, tuple]:
    """q, k, v with `bad` in k or v, and with 0 there."""
    q, k, v = inputs()
    if which == "k":
        dirty, clean = poisoned(k, bad, whole)
        return (q, dirty, v), (q, clean, v)
    dirty, clean = poisoned(v, bad, whole)
    return (q, k, dirty), (q, k, clean)


def results(
    q: Tensor, k: Tensor, v: Tensor, backend: str, options: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out and dq as (B, HQ, S, D), lse (B, HQ, S), dk and dv as (B, HKV, S, D)."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = backends.call(mm.attention, *leaves, backend=backend, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), leaves, cotangents(out, lse))
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return out.detach().transpose(1, 2), lse.detach(), dq, dk, dv


def cotangents(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of out (B, S, HQ, D) and lse (B, HQ, S), or the same numbers for a part of them."""
    part = part_of("triton") if out.shape[2] < HQ else Part()
    dout = part.rows(normal(B, HQ, S, D, seed=8)).transpose(1, 2)
    return dout.to(out), part.rows(normal(B, HQ, S, seed=9)).to(lse)


def assert_same(name: str, got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        got, wanted, atol=5e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}"
    )


def ruined_rows(q: Tensor, k: Tensor, shown: Tensor) -> Tensor:
    """(B, HQ, S): which rows have a score that is NaN or inf; one of -inf is a weight of 0."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
    return (shown & (scores.isnan() | scores.isposinf())).any(-1)


def check(
    got: tuple[Tensor, ...],
    wanted: tuple[Tensor, ...],
    shown: Tensor,
    touched: Tensor,
    q: Tensor,
    k: Tensor,
) -> None:
    """Untouched rows, and keys that no touched row sees, are as without what is not finite."""
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape
    for name, x, y in zip(("out", "lse", "dq"), got[:3], wanted[:3], strict=True):
        assert_same(name, x[~touched], y[~touched])
    assert wanted[0].isfinite().all()
    if k.isfinite().all():
        assert (~got[0][touched].isfinite()).any(-1).all()
        assert_same("lse", got[1], wanted[1])
    else:
        ruined = ruined_rows(q, k, shown)
        assert not got[0][ruined].isfinite().any()
        assert not got[1][ruined].isfinite().any()
    reached = (shown & touched[..., None]).any(2)  # (B, HQ, S keys)
    reached = reached.unflatten(1, (k.shape[2], -1)).any(2)
    for name, x, y in zip(("dk", "dv"), got[3:], wanted[3:], strict=True):
        assert_same(name, x[~reached], y[~reached])


def cases() -> list:
    """kind, bad, backend; in the interpreter only some kinds quickly with all that is bad."""
    slow = [pytest.mark.slow]
    return [
        backends.param(
            kind, bad, backend, on=backend, id=f"{kind}-{bad}-{backend}",
            marks=slow
            if backends.interpreted(backend) and bad != "nan" and kind != "causal"
            else [],
        )
        for kind, bad, backend in itertools.product(KINDS, BAD, NAMES)
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "bad", "backend"), cases())
@pytest.mark.parametrize("which", ["k", "v"])
def test_does_it_reach_only_the_rows_that_see_it(which, kind, bad, backend):
    options, shown = mask_of(kind)
    dirty, clean = with_poison(which, *BAD[bad])
    part = part_of(backend)
    inputs = part.inputs(*dirty)
    got = results(*inputs, backend, part.options(options))
    wanted = part.results(*results(*clean, "reference", options))
    check(got, wanted, part.rows(shown), part.rows(touched_rows(shown)), *inputs[:2])


@BACKENDS
@pytest.mark.parametrize("which", ["k", "v"])
def test_is_a_key_that_no_row_sees_as_if_it_were_not_there(which, backend):
    mask = masks.padding(torch.tensor([140, 100]), S)
    part = part_of(backend)
    tensors = dict(zip("qkv", inputs(), strict=True))
    wanted = part.results(*results(*tensors.values(), "reference", {"mask": mask}))
    for bad in (math.nan, math.inf, -math.inf):
        dirty = tensors[which].clone()
        dirty[0, 140:], dirty[1, 100:] = bad, bad
        inputs_now = part.inputs(*(tensors | {which: dirty}).values())
        got = results(*inputs_now, backend, part.options({"mask": mask}))
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            assert_same(name, x, y)
        for grad in got[3:]:
            assert not grad[0, :, 140:].any() and not grad[1:, :, 100:].any()


def lengths() -> list:
    """backend, dtype, seqlen."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    return [
        backends.param(backend, dtype, n, on=backend, id=f"{backend}-{backends.short(dtype)}-{n}")
        for backend, dtype in itertools.product(NAMES, dtypes)
        if backends.serves(backend, dtype)
        for n in ((70,) if backends.interpreted(backend) else (5, 16, 64, 150, 530))
    ]


@pytest.mark.parametrize(("backend", "dtype", "seqlen"), lengths())
def test_in_every_dtype_and_length(backend, dtype, seqlen):
    q, k, v = (normal(1, seqlen, 2, 16, seed=seed).to(dtype) for seed in range(3))
    place = seqlen // 2
    hidden = torch.zeros(seqlen, seqlen).bool()
    hidden[::2, place] = True  # every other row
    clean = k.clone(), v.clone()
    for x in clean:
        x[:, place] = 0.0
    wanted, wanted_lse = mm.attention(
        *(x.double() for x in (q, *clean)), mask=~hidden, backend="reference", return_lse=True
    )
    eps = torch.finfo(dtype).eps
    for bad in (math.nan, math.inf, -math.inf):
        for which in ("k", "v"):
            for element in (slice(None), 3):
                dirty = {"k": k.clone(), "v": v.clone()}
                dirty[which][0, place, 0, element] = bad
                leaves = [x.requires_grad_() for x in (q.clone(), *dirty.values())]
                out, lse = backends.call(
                    mm.attention, *leaves, mask=~hidden, backend=backend, return_lse=True
                )
                torch.testing.assert_close(
                    out[:, ::2].double(), wanted[:, ::2], atol=8 * eps, rtol=8 * eps
                )
                torch.testing.assert_close(
                    lse[..., ::2].double(), wanted_lse[..., ::2], atol=1e-5, rtol=1e-5
                )
                if math.isnan(bad):
                    assert out[:, 1::2, 0].isnan().any(-1).all()
                assert out[:, :, 1].isfinite().all(), "another head"
                dq, _, _ = torch.autograd.grad(out.float().sum(), leaves)
                assert dq[:, ::2].isfinite().all() and dq[:, :, 1].isfinite().all()


@backends.each("reference", "triton")  # torch's CPU kernel loses it
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_does_nan_in_the_only_key_reach_its_rows(seqlen_q, backend):
    dtype = backends.widest(backend)
    q, k, v = (normal(1, n, 1, D, seed=n).to(dtype) for n in (seqlen_q, 1, 1))
    k[0, 0, 0, 3] = math.nan
    out, lse = backends.call(mm.attention, q, k, v, backend=backend, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


PAIRS = [("cpu", "reference"), ("reference", "cpu")]
PAIRS += [("triton", "reference"), ("reference", "triton")]


@pytest.mark.parametrize("pair", [backends.param(x, on=x, id="-".join(x)) for x in PAIRS])
@pytest.mark.parametrize("kind", ["causal", "packed_causal", "causal_or_spans", "padding"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_does_any_backward_serve_any_forward(which, kind, pair):
    options, shown = mask_of(kind)
    part = part_of("triton" if "triton" in pair else "cpu")
    mask = masks.causal(S) if kind == "causal" else options["mask"]
    mask = part.options({"mask": mask})["mask"]
    device = "cuda" if "cuda" in map(testing.device_for, pair) else "cpu"

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v, start, end = backends.moved((q, k, v, mask.start, mask.end), device)
        rest = (None, None, None, None, D**-0.5, 0.0, 0.0)
        out, lse = ops.attention_forward(q, k, v, start, end, *rest, pair[0])
        dq, dk, dv, _, _ = ops.attention_backward(
            *cotangents(out, lse), q, k, v, out, lse, start, end, None, None, *rest,
            False, True, pair[1],
        )  # fmt: skip
        out, dq, dk, dv = (x.transpose(1, 2) for x in (out, dq, dk, dv))
        return backends.moved((out, lse, dq, dk, dv), "cpu")

    dirty, clean = with_poison(which, math.nan, True)
    dirty, clean = part.inputs(*dirty), part.inputs(*clean)
    check(run(*dirty), run(*clean), part.rows(shown), part.rows(touched_rows(shown)), *dirty[:2])


@BACKENDS
def test_does_nan_in_a_query_stay_in_its_row(backend):
    q, k, v = inputs()
    dirty, clean = q.clone(), q.clone()
    dirty[0, 20, 1], clean[0, 20, 1] = math.nan, 0.0
    got = results(dirty, k, v, backend, {"causal": True})
    wanted = results(clean, k, v, "reference", {"causal": True})
    others = torch.ones(B, HQ, S, dtype=torch.bool)
    others[0, 1, 20] = False
    for name, x, y in zip(("out", "lse", "dq"), got[:3], wanted[:3], strict=True):
        assert_same(name, x[others], y[others])
        assert x[~others].isnan().all()
    for name, x, y in zip(("dk", "dv"), got[3:], wanted[3:], strict=True):
        assert_same(name, x[1], y[1])  # other batch elements
        assert_same(name, x[0, 1], y[0, 1])  # other heads


# Rows without a key


EMPTY = {
    "more_rows_than_keys": lambda: {"causal": True},
    "padding": lambda: {"mask": masks.padding(torch.tensor([0, 0]), 9, 6)},
    "padding_of_one": lambda: {"mask": masks.padding(torch.tensor([0, 6]), 9, 6)},
    "scattered": lambda: {
        "mask": IntervalMask(torch.tensor([0, 2, 0, 5, 5, 0, 1, 1, 0]),
                             torch.tensor([0, 4, 0, 6, 5, 0, 3, 6, 0]), 6)
    },
    "dense": lambda: {"mask": torch.eye(9, 6).bool() | torch.eye(9, 6).bool().roll(2, 1)},
    "dense_nothing": lambda: {"mask": torch.zeros(B, HQ, 9, 6).bool()},
    "bias": lambda: {"bias": torch.zeros(9, 6).index_fill(0, torch.tensor([0, 8]), -torch.inf)},
    "bias_of_a_head": lambda: {
        "bias": torch.zeros(HQ, 9, 6).index_fill(0, torch.tensor([2]), -torch.inf)
    },
    "window_behind": lambda: {"window_size": (2, 0)},
}  # fmt: skip
SINKS = {
    "no_sinks": None,
    "sinks": torch.tensor([0.3, -2.0, 4.0, 0.0]),
    "infinite_sinks": torch.tensor([-torch.inf, -2.0, -torch.inf, 0.0]),
}


@backends.each_in([torch.float32, torch.float64], *NAMES)
@pytest.mark.parametrize("sinks", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("kind", EMPTY)
def test_is_a_row_without_a_key_empty(kind, sinks, backend, dtype):
    options = EMPTY[kind]()
    shape = B, HQ, 9, 6
    shown = torch.ones(shape, dtype=torch.bool)
    if options.get("causal"):
        shown &= masks.causal(9, 6).to_dense()[:, None]
    if "window_size" in options:
        shown &= masks.window(9, 6, window_size=options["window_size"]).to_dense()[:, None]
    if isinstance(options.get("mask"), IntervalMask):
        shown &= options["mask"].to_dense()[:, None]
    elif "mask" in options:
        shown &= options["mask"]
    if "bias" in options:
        shown &= options["bias"] > -torch.inf
    empty = ~shown.any(-1)
    assert empty.any()

    q = normal(B, 9, HQ, D).to(dtype).requires_grad_()
    k, v = (normal(B, 6, HKV, D, seed=n).to(dtype).requires_grad_() for n in (1, 2))
    leaves = [q, k, v]
    if sinks is not None:
        sinks = sinks.to(dtype).requires_grad_()
        leaves.append(sinks)
    options |= {"sinks": sinks, "return_lse": True, "backend": backend}
    out, lse = backends.call(mm.attention, q, k, v, **options)
    assert not out.transpose(1, 2)[empty].any()
    assert (lse[empty] == -torch.inf).all()
    assert out.isfinite().all() and lse[~empty].isfinite().all()

    # Whatever gradient arrives at an empty row goes no further.
    cotangents = normal(*out.shape, seed=8).to(dtype), normal(*lse.shape, seed=9).to(dtype)
    grads = torch.autograd.grad((out, lse), leaves, cotangents)
    assert not grads[0].transpose(1, 2)[empty].any()
    silent = [cotangents[0].transpose(1, 2), cotangents[1]]
    silent = [x.masked_fill(empty.view(*empty.shape, *[1] * (x.ndim - 3)), 0.0) for x in silent]
    out, lse = backends.call(mm.attention, q, k, v, **options)
    wanted = torch.autograd.grad((out, lse), leaves, (silent[0].transpose(1, 2), silent[1]))
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, want)


@BACKENDS
def test_is_a_bias_that_hides_a_whole_row_given_gradient_0(backend):
    if backend == "cpu":
        backend = "auto"  # the cpu backend gives bias no gradient
    dtype = backends.widest(backend)
    bias = torch.zeros(9, 6, dtype=dtype)
    bias[3], bias[5, :5] = -torch.inf, -torch.inf
    bias.requires_grad_()
    q, k, v = (normal(B, n, h, D).to(dtype) for n, h in ((9, HQ), (6, HKV), (6, HKV)))
    out = backends.call(mm.attention, q, k, v, bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert grad.isfinite().all() and (grad[[0, 1, 2, 4, 6, 7, 8]].abs() > 1e-6).any(-1).all()
    assert not grad[3].any() and not grad[5, :5].any()


@BACKENDS
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
def test_do_huge_scores_stay_finite(magnitude, backend):
    q, k, v = inputs()
    options = {"causal": True, "softmax_scale": 1.0, "return_lse": True, "backend": backend}
    out, lse = backends.call(mm.attention, q * magnitude, k, v, **options)
    assert out.isfinite().all() and lse.isfinite().all()
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    best = scores.masked_fill(~masks.causal(S).to_dense()[:, None], -torch.inf).argmax(-1)
    wanted = (
        v.repeat_interleave(2, 2).transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, D))
    )
    sharp = scores.masked_fill(~masks.causal(S).to_dense()[:, None], -torch.inf).topk(2).values
    clear = (sharp[..., 0] - sharp[..., 1]) * magnitude > 30
    torch.testing.assert_close(out.transpose(1, 2)[clear], wanted[clear], atol=1e-5, rtol=1e-5)
