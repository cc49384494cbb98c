"""Is dropout the published generator's, the same everywhere, and the same in both passes?"""

import math

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops
from mmkernels.attention.dropout import draw_seed, keep_mask, philox
from tests.attention import backends

# Known answers of the generator's authors: counter, key, result; 32-bit words, lowest first.
KNOWN_ANSWERS = {
    "zeros": (
        [0, 0, 0, 0],
        [0, 0],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    "ones": (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def signed(low: int, high: int) -> int:
    """Two 32-bit words as one int64."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


def one_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            right >> 32 ^ b ^ k0, right & 0xFFFFFFFF, left >> 32 ^ d ^ k1, left & 0xFFFFFFFF
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(seqlen_q: int = 6, seqlen_k: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(2, seqlen_q, 4, 8),
        normal(2, seqlen_k, 2, 8, seed=1),
        normal(2, seqlen_k, 2, 5, seed=2),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dropped_weights(dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    """The softmax (B, H, Sq, Sk) with dropout and without, seen through an identity as v."""
    q, k = normal(2, 30, 3, 8), normal(2, 50, 3, 8, seed=1)
    v = torch.eye(50, dtype=torch.float64)[None, :, None].expand(2, -1, 3, -1)
    weights = mm.attention(q, k, v)
    dropped = mm.attention(q, k, v, dropout_p=dropout_p, generator=generator(seed))
    return dropped.transpose(1, 2), weights.transpose(1, 2)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(name):
    counter, key, answer = KNOWN_ANSWERS[name]
    words = philox(torch.tensor([signed(*key)]), tuple(torch.tensor([word]) for word in counter))
    assert [int(word) for word in words] == answer
    assert one_philox(counter, key) == answer


@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -1])
def test_the_keep_bit_is_a_word_of_philox_at_its_place(seed):
    shape, dropout_p = (2, 3, 4, 7), 0.4
    keep = keep_mask(torch.tensor([seed]), dropout_p, *shape)
    assert keep.shape == shape and keep.dtype == torch.bool
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        word = one_philox([j // 4, i, h, b], key)[j % 4]
        assert bool(keep[b, h, i, j]) == (word >= 0.4 * 2**32)


def test_the_keep_bit_does_not_depend_on_how_many_keys_or_rows_there_are():
    seed = torch.tensor([77])
    whole = keep_mask(seed, 0.5, 2, 3, 9, 13)
    assert torch.equal(keep_mask(seed, 0.5, 1, 2, 5, 6), whole[:1, :2, :5, :6])


@pytest.mark.parametrize("dropout_p", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_rate_is_the_one_asked_for(dropout_p):
    keep = keep_mask(torch.tensor([5]), dropout_p, 4, 8, 64, 128).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / keep.numel())
    assert abs(float(keep.mean()) - (1 - dropout_p)) <= 5 * deviation
    for dim in range(4):  # nowhere is it uneven
        others = [d for d in range(4) if d != dim]
        spread = 6 * deviation * math.sqrt(keep.shape[dim])
        assert (keep.mean(others) - (1 - dropout_p)).abs().max() <= spread


@pytest.mark.parametrize("dropout_p", [0.2, 0.7])
def test_what_is_kept_is_rescaled(dropout_p):
    dropped, weights = dropped_weights(dropout_p, 3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - dropout_p))
    assert abs(float(kept.double().mean()) - (1 - dropout_p)) < 0.02


def test_attention_drops_by_the_keep_bit_of_the_seed_it_draws():
    dropped, weights = dropped_weights(0.3, 3)
    seed = draw_seed(torch.device("cpu"), generator(3))
    assert seed.shape == (1,) and seed.dtype == torch.int64
    keep = keep_mask(seed, 0.3, *weights.shape)
    torch.testing.assert_close(dropped, weights * keep / 0.7)


def test_lse_knows_nothing_of_dropout():
    q, k, v = qkv()
    _, wanted = mm.attention(q, k, v, return_lse=True, causal=True)
    _, lse = mm.attention(q, k, v, return_lse=True, causal=True, dropout_p=0.6)
    torch.testing.assert_close(lse, wanted)


def test_a_generator_governs_it():
    q, k, v = qkv()

    def run(seed: int) -> Tensor:
        return mm.attention(q, k, v, dropout_p=0.5, generator=generator(seed))

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state), "the default generator was touched"
    source = generator(1)
    first = mm.attention(q, k, v, dropout_p=0.5, generator=source)
    assert not torch.equal(mm.attention(q, k, v, dropout_p=0.5, generator=source), first)


def test_manual_seed_governs_it():
    q, k, v = qkv()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return mm.attention(q, k, v, dropout_p=0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(mm.attention(q, k, v, dropout_p=0.5), run(1))


def test_without_dropout_no_number_is_drawn():
    q, k, v = qkv()
    state = torch.get_rng_state()
    mm.attention(q, k, v)
    mm.attention(q, k, v, dropout_p=0.0, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_entry_point_draws_the_same():
    q, k, v = (x[:1, :, :2] for x in qkv(6, 6))
    wanted = mm.attention(q, k, v, dropout_p=0.5, generator=generator())
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    packed = mm.attention_varlen(
        q[0], k[0], v[0], cu_seqlens, cu_seqlens, 6, 6, dropout_p=0.5, generator=generator()
    )
    torch.testing.assert_close(packed, wanted[0])
    torch.manual_seed(0)
    like_torch = mm.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5
    )
    torch.testing.assert_close(like_torch.transpose(1, 2), wanted)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "bias": {"bias": normal(2, 3, 3, seed=5)},
    "sinks": {"sinks": torch.tensor([0.3, -1.0])},
    "softcap": {"softcap": 1.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(backend, options):
    q, k, v = (x[:1, :3, :2, :3] for x in qkv())
    inputs = [x.clone().requires_grad_() for x in (q, k[:, :, :1], v[:, :, :1])]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return mm.attention(
            *leaves,
            dropout_p=0.4,
            generator=generator(8),
            return_lse=True,
            backend=backend,
            **options,
        )

    torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_bias_has_its_gradient_under_dropout(backend):
    q, k, v = (x[:1, :4] for x in qkv())
    bias = normal(4, 1, 4, seed=5).requires_grad_()

    def run(bias: Tensor) -> Tensor:
        source = generator(8)
        return mm.attention(q, k, v, bias=bias, dropout_p=0.4, generator=source, backend=backend)

    torch.autograd.gradcheck(run, (bias,))


@backends.each("reference", "triton")
@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.6, 1 - 2**-20])
def test_every_backend_drops_the_same(dropout_p, seed, backend):
    q, k, _ = testing.make_qkv(2, 37, 70, 3, 1, 8)
    v = torch.eye(70)[None, :, None].expand(2, -1, -1, -1)  # out is the softmax
    keep = keep_mask(torch.tensor([seed]), dropout_p, 2, 3, 37, 70)
    rest = (None, None, None, None, None, torch.tensor([seed]), 0.3, 0.0, dropout_p)
    inputs = backends.moved((q, k, v, *rest), testing.device_for(backend))
    out, _ = backends.moved(ops.attention_forward(*inputs, backend), "cpu")
    assert torch.equal(out.transpose(1, 2) != 0.0, keep)


def given_seed(backend: str, dtype: torch.dtype, options: dict) -> list[Tensor]:
    """out, lse and the gradients of q, k, v, bias and sinks under a dropout of 0.4."""
    q, k, v = testing.make_qkv(2, 37, 70, 2, 1, 16, 24, dtype=dtype)
    bias, sinks = (options.get(name) for name in ("bias", "sinks"))
    mask = mm.masks.causal(37, 70) if options.get("causal") else None
    bounds = (None, None) if mask is None else (mask.start, mask.end)
    rows = (None, None) if mask is None else mask.key_rows(70)
    bias = None if bias is None else bias.to(dtype)
    scores = (bias, None, sinks, torch.tensor([2**62 + 12345]))
    numbers = (0.3, options.get("softcap", 0.0), 0.4)
    device = testing.device_for(backend)
    q, k, v, bounds, rows, scores = backends.moved((q, k, v, bounds, rows, scores), device)
    out, lse = ops.attention_forward(q, k, v, *bounds, *scores, *numbers, backend)
    dout, dlse = normal(*out.shape, seed=8).to(out), normal(*lse.shape, seed=9).to(lse)
    grads = ops.attention_backward(
        dout, dlse, q, k, v, out, lse, *bounds, *rows, *scores, *numbers,
        bias is not None, True, backend,
    )  # fmt: skip
    return [x.cpu() for x in (out, lse, *grads)]


KINDS = {
    "plain": {},
    "causal": {"causal": True},
    "bias": {"bias": normal(2, 1, 1, 70, seed=5)},
    "sinks": {"sinks": torch.tensor([0.3, -1.0])},
    "softcap": {"softcap": 1.5, "causal": True},
}


@backends.each("triton")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_passes_give_what_the_reference_gives_for_a_seed(options, backend):
    got = given_seed(backend, torch.float32, options)
    wanted = given_seed("reference", torch.float32, options)
    exact = given_seed("reference", torch.float64, options)
    for name, *values in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"), got, exact, wanted, strict=True
    ):
        testing.assert_accurate(name, *values)


@backends.each("reference", "auto", "triton")
def test_dropping_everything_gives_zeros(backend):
    leaves = [x.to(backends.widest(backend)).requires_grad_() for x in qkv()]
    options = {"dropout_p": 1.0, "return_lse": True, "backend": backend}
    out, lse = backends.call(mm.attention, *leaves, **options)
    assert not out.any() and lse.isfinite().all()
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


def test_rows_without_a_key_stay_empty_under_dropout():
    leaves = [x.requires_grad_() for x in qkv(9, 6)]  # causal: the first three rows see nothing
    out, lse = mm.attention(*leaves, causal=True, dropout_p=0.5, return_lse=True)
    assert not out[:, :3].any() and (lse[..., :3] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert not grads[0][:, :3].any() and all(grad.isfinite().all() for grad in grads)
