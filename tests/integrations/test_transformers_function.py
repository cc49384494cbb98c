"""The attention function of transformers models, called as they call it."""

import pytest
import torch

pytest.importorskip("transformers", minversion="4.57")

from mmkernels.integrations.transformers import attention_forward


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(4, 9), (9, 4), (5, 5)])
def test_causal_without_a_mask_aligns_the_first_key(seqlen_q, seqlen_k):
    """As torch's is_causal does; the output is contiguous, heads last but one."""
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 4, seqlen_q, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, seqlen_k, 16, generator=generator)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out, weights = attention_forward(torch.nn.Module(), q, k, v, None, is_causal=True)
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def reference(q, k, v, mask=None, bias=0.0):
    """Softmax attention that gives 0 where a row has no key; heads last but one, as ours."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def drawn(seqlen_q=5, seqlen_k=5):
    generator = torch.Generator().manual_seed(10)
    q = torch.randn(2, 4, seqlen_q, 16, generator=generator)
    k = torch.randn(2, 2, seqlen_k, 16, generator=generator)
    return q, k, torch.randn(2, 2, seqlen_k, 24, generator=generator)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 5), (1, 1, 5, 5), (2, 1, 1, 5), (1, 1, 1, 5), (2, 4, 5, 5), (1, 4, 1, 5)]
)
@pytest.mark.parametrize("form", ["bool", "least", "infinite", "sum", "scaled", "half"])
def test_mask_forms(shape, holes, form):
    """Bool, and floats that say the same: models add masks to each other, and scale them."""
    from mmkernels.attention.interval import IntervalMask
    from mmkernels.integrations.mask_reading import mask_over_keys

    shown = torch.rand(shape, generator=torch.Generator().manual_seed(11)) < 0.6
    if not holes:  # each batch element and head sees another number of keys
        lengths = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1, 1) % 4 + 1
        shown = (torch.arange(5) < lengths).expand(shape).clone()
    shown[0, :, 0] = False  # no key at all: zeros
    added = torch.where(shown, 0.0, torch.finfo(torch.float32).min)
    mask = {
        "bool": shown,
        "least": added,
        "infinite": torch.where(shown, 0.0, -torch.inf),
        "sum": added + added,
        "scaled": added * 0.75,
        "half": torch.where(shown, 0.0, torch.finfo(torch.float16).min).half(),
    }[form]
    q, k, v = drawn()
    out, _ = attention_forward(torch.nn.Module(), q, k, v, mask)
    torch.testing.assert_close(out, reference(q, k, v, shown))
    assert (out[0, 0] == 0).all()
    taken = mask_over_keys(mask, torch.nn.Module(), 5, 5)
    begins = torch.nn.functional.pad(shown.int(), (1, 0)).diff(dim=-1) > 0
    if shape[1] == 1 and (begins.sum(-1) <= 1).all():
        assert isinstance(taken, IntervalMask)
    else:
        assert taken.dtype == torch.bool


def test_floats_that_are_no_mask_are_added():
    """A bias, a large one, and a learned one that happens to look like a mask."""
    q, k, v = drawn()
    bias = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(12))
    bias[..., 0] = -10000.0
    out, _ = attention_forward(torch.nn.Module(), q, k, v, bias)
    torch.testing.assert_close(out, reference(q, k, v, bias=bias))
    learned = torch.zeros(1, 4, 5, 5, requires_grad=True)
    attention_forward(torch.nn.Module(), q, k, v, learned)[0].square().sum().backward()
    assert learned.grad.abs().max() > 0
    large = torch.zeros(1, 1, 5, 5)
    large[:, :, 0] = -10000.0  # alike for all keys, so it changes nothing
    out, _ = attention_forward(torch.nn.Module(), q, k, v, large)
    torch.testing.assert_close(out, reference(q, k, v), rtol=1e-4, atol=1e-3)  # 10000 + s rounds s


def test_position_bias_joins_any_mask():
    """Without a mask the causal rule holds for it too."""
    q, k, v = drawn()
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(13))
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask, causal in (
        (None, True),
        (lower[None, None], False),
        (torch.where(lower, 0.0, -torch.inf)[None, None], False),
    ):
        out, _ = attention_forward(
            torch.nn.Module(), q, k, v, mask, is_causal=causal, position_bias=bias
        )
        torch.testing.assert_close(out, reference(q, k, v, lower, bias))
    added = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(14))
    out, _ = attention_forward(torch.nn.Module(), q, k, v, added, position_bias=bias)
    torch.testing.assert_close(out, reference(q, k, v, bias=bias + added))


@pytest.mark.parametrize("argument", [None, True, False])
@pytest.mark.parametrize("attribute", [None, True, False])
def test_causal_rule(argument, attribute):
    layer = torch.nn.Module()
    if attribute is not None:
        layer.is_causal = attribute
    q, k, v = drawn()
    causal = bool(attribute if argument is None else argument)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    out, _ = attention_forward(layer, q, k, v, None, is_causal=argument)
    torch.testing.assert_close(out, reference(q, k, v, lower if causal else None))
    out, _ = attention_forward(layer, q[:, :, :1], k, v, None, is_causal=argument)
    torch.testing.assert_close(out, reference(q[:, :, :1], k, v))  # the newest token sees all


def test_two_dimensional_mask_raises():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\).*4-dimensional"):
        attention_forward(torch.nn.Module(), *drawn(), torch.ones(2, 5, dtype=torch.bool))


def test_mask_of_too_few_keys_raises():
    with pytest.raises(ValueError, match="mask has shape"):
        attention_forward(torch.nn.Module(), *drawn(), torch.ones(2, 1, 5, 3, dtype=torch.bool))


def test_query_shared_by_the_batch():
    q = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(7))
    k, v = torch.randn(2, 5, 4, 8, 16, generator=torch.Generator().manual_seed(8))
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, v)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


@pytest.mark.parametrize("name", ["head_mask", "indices", "block_indices", "sinks", "anything"])
def test_unknown_arguments_raise(name):
    q, k, v = drawn()
    with pytest.raises(ValueError, match=f"Module passes {name} to its attention"):
        attention_forward(torch.nn.Module(), q, k, v, None, **{name: torch.zeros(1)})
    attention_forward(torch.nn.Module(), q, k, v, None, **{name: None})
