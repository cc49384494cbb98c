"""Does `mm.scaled_dot_product_attention` do what torch's function of that name does?"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mm

B, H, D, DV = 2, 4, 8, 6
LENGTHS = pytest.mark.parametrize("lengths", [(5, 7), (6, 6), (7, 4), (1, 5)], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(
    seqlen_q: int, seqlen_k: int, leading: tuple[int, ...] = (B, H), kv_heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    shared = leading if kv_heads is None else (*leading[:-1], kv_heads)
    return (
        normal(*leading, seqlen_q, D),
        normal(*shared, seqlen_k, D, seed=1),
        normal(*shared, seqlen_k, DV, seed=2),
    )


def results(
    function, inputs: tuple[Tensor, ...], attn_mask: Tensor | None, options: dict
) -> list[Tensor]:
    """out and the gradients of q, k, v and of a floating-point attn_mask."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.detach().clone().requires_grad_()
        leaves.append(attn_mask)
    out = function(*leaves[:3], attn_mask=attn_mask, **options)
    return [out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), leaves)]


def assert_like_torch(
    inputs: tuple[Tensor, ...],
    attn_mask: Tensor | None = None,
    backend: str = "auto",
    **options: object,
) -> None:
    wanted = results(F.scaled_dot_product_attention, inputs, attn_mask, options)
    with mm.use_backend(backend):
        got = results(mm.scaled_dot_product_attention, inputs, attn_mask, options)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dmask"), got, wanted, strict=False):
        assert x.shape == y.shape, name
        torch.testing.assert_close(
            x, y, atol=1e-11, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(got) == len(wanted)


def some_keys(*shape: int) -> Tensor:
    """A random bool mask in which every row sees the first key, and some rows no contiguous run."""
    shown = normal(*shape, seed=5) > 0
    shown[..., 0] = True
    return shown


@BACKENDS
@LENGTHS
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "is_causal"])
def test_without_a_mask(is_causal, lengths, backend):
    assert_like_torch(qkv(*lengths), is_causal=is_causal, backend=backend)


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3)], ids=str)
def test_is_causal_aligns_the_first_row_with_the_first_key(lengths):
    q, k, v = qkv(*lengths)
    out = mm.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


MASKS = {
    "rows_keys": lambda n, m: (n, m),
    "keys": lambda n, m: (m,),
    "one_row": lambda n, m: (1, m),
    "one_key": lambda n, m: (n, 1),
    "heads": lambda n, m: (H, n, m),
    "one_head": lambda n, m: (B, 1, n, m),
    "one_batch": lambda n, m: (1, H, n, m),
    "key_padding": lambda n, m: (B, 1, 1, m),
    "whole": lambda n, m: (B, H, n, m),
    "scalar": lambda n, m: (1, 1, 1, 1),
}


@BACKENDS
@LENGTHS
@pytest.mark.parametrize("kind", ["bool", "float", "float_with_infinities"])
@pytest.mark.parametrize("shape", MASKS)
def test_attn_mask_broadcasts(shape, kind, lengths, backend):
    mask = some_keys(*MASKS[shape](*lengths))
    if shape == "keys" and kind == "bool":
        mask = mask[None]  # torch itself cannot take it without
    if kind == "float":
        mask = normal(*mask.shape, seed=6)
    elif kind == "float_with_infinities":
        mask = normal(*mask.shape, seed=6).masked_fill(~mask, -torch.inf)
    assert_like_torch(qkv(*lengths), mask, backend)


@BACKENDS
def test_a_bool_mask_of_intervals(backend):
    mask = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    assert_like_torch(qkv(6, 6), mask, backend)


@BACKENDS
@pytest.mark.parametrize("scale", [None, 0.1, 2.0, -0.5])
def test_scale(scale, backend):
    assert_like_torch(qkv(5, 7), scale=scale, is_causal=True, backend=backend)


@BACKENDS
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "is_causal"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_enable_gqa(kv_heads, is_causal, backend):
    inputs = qkv(5, 7, kv_heads=kv_heads)
    assert_like_torch(inputs, enable_gqa=True, is_causal=is_causal, backend=backend)
    assert_like_torch(inputs, some_keys(H, 5, 7), enable_gqa=True, backend=backend)


LEADING = {"2d": (), "3d": (H,), "4d": (B, H), "5d": (3, B, H), "6d": (2, 1, B, H)}


@BACKENDS
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize(
    "mask", ["none", "is_causal", "rows_keys", "heads", "whole", "whole_float"]
)
def test_any_number_of_dimensions(mask, leading, backend):
    inputs = qkv(5, 7, leading)
    if mask in ("none", "is_causal"):
        assert_like_torch(inputs, is_causal=mask == "is_causal", backend=backend)
        return
    shape = {"rows_keys": (), "heads": leading[-1:]}.get(mask, leading)
    attn_mask = some_keys(*shape, 5, 7)
    if mask == "whole_float":
        attn_mask = normal(*attn_mask.shape, seed=6)
    assert_like_torch(inputs, attn_mask, backend)


@BACKENDS
def test_masks_broadcast_in_any_leading_dimension(backend):
    inputs = qkv(5, 7, (3, B, H))
    for shape in ((3, 1, 1), (1, B, 1), (1, B, H), (3, 1, H), (B, 1)):
        assert_like_torch(inputs, some_keys(*shape, 5, 7), backend)
        assert_like_torch(inputs, normal(*shape, 5, 7), backend)


@BACKENDS
@pytest.mark.parametrize(
    "q_leading, kv_leading",
    [
        ((2, 4), (2, 1)),
        ((2, 1), (2, 4)),
        ((1, 4), (2, 4)),
        ((2, 4), (1, 4)),
        ((3, 1, 4), (1, 2, 4)),
    ],
    ids=str,
)
def test_batch_and_heads_of_one_broadcast(q_leading, kv_leading, backend):
    inputs = normal(*q_leading, 5, D), *(normal(*kv_leading, 7, n, seed=n) for n in (D, DV))
    assert_like_torch(inputs, backend=backend)
    assert_like_torch(inputs, some_keys(5, 7), backend=backend)


@BACKENDS
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_without_a_key_is_0_and_gets_no_gradient(kind, backend):
    q, k, v = (x.requires_grad_() for x in qkv(5, 7))
    mask = some_keys(5, 7)
    mask[2] = False
    if kind == "float":
        mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    with mm.use_backend(backend):
        out = mm.scaled_dot_product_attention(q, k, v, mask)
    grads = torch.autograd.grad(out.square().sum() + out.sum(), (q, k, v))
    assert not out[:, :, 2].any() and not grads[0][:, :, 2].any()
    assert out[:, :, [0, 1, 3, 4]].all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_rows_or_no_keys(lengths):
    q, k, v = (x.requires_grad_() for x in qkv(*lengths))
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.ones(lengths, dtype=torch.bool)}):
        out = mm.scaled_dot_product_attention(q, k, v, **options)
        assert out.shape == (B, H, lengths[0], DV) and not out.any()
        assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_drops_and_rescales():
    q, k = normal(1, 1, 40, D), normal(1, 1, 50, D, seed=1)
    v = torch.eye(50, dtype=torch.float64)[None, None]  # so that out is the softmax itself
    weights = mm.scaled_dot_product_attention(q, k, v)
    dropped = mm.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    kept = dropped != 0
    assert 0.7 < kept.double().mean() < 0.8
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert not mm.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    q, k, v = qkv(5, 7)
    out = mm.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True)
    assert out.dtype == dtype
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from(["none", "is_causal", "bool", "float"]),
    st.data(),
)
def test_any_shapes(lengths, leading, kind, data):
    inputs = qkv(*lengths, tuple(leading))
    mask = None
    if kind in ("bool", "float"):
        full = (*leading, *lengths)
        kept = full[data.draw(st.integers(0, len(leading))) :]
        shape = [data.draw(st.sampled_from([1, n])) for n in kept]
        mask = some_keys(*shape) if kind == "bool" else normal(*shape, seed=6)
    assert_like_torch(inputs, mask, is_causal=kind == "is_causal")
