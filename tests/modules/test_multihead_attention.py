"""`mm.modules.MultiheadAttention` against torch's with the same parameters."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmkernels.modules import MultiheadAttention
from mmkernels.modules import attention as module_source
from tests.modules.pairs import (
    BATCH,
    HEADS,
    INPUTS,
    LAYOUTS,
    LEN_K,
    LEN_Q,
    MASKS,
    OPTIONS,
    TOLERANCE,
    WEIGHTS,
    WIDTH,
    assert_same,
    make_inputs,
    make_mask,
    make_masks,
    make_pair,
    results,
)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "options, inputs",
    [
        pytest.param(options, inputs, id=f"{name}-{inputs}")
        for name, options in OPTIONS.items()
        for inputs in INPUTS
        # Keys of another width than the queries can only be tensors of their own.
        if "kdim" not in options or inputs == "cross"
    ],
)
def test_matches_torch(options, inputs, masks, layout, dtype):
    theirs, ours = make_pair(dtype, **options, batch_first=layout == "batch_first")
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_Q if inputs == "self" else LEN_K}
    tensors = make_inputs(inputs, layout, theirs, **sizes)
    arguments = make_masks(masks, layout, theirs, **sizes)
    for weights in WEIGHTS:
        want = results(theirs, *tensors, **arguments, **weights)
        assert_same(results(ours, *tensors, **arguments, **weights), want, dtype)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 20),
    kdim=st.none() | st.integers(1, 9),
    vdim=st.none() | st.integers(1, 9),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("bias", "add_bias_kv", "add_zero_attn")}
    ),
    layout=st.sampled_from(LAYOUTS),
    inputs=st.sampled_from(INPUTS),
    masks=st.sampled_from(list(MASKS.values())),
    weights=st.sampled_from(WEIGHTS),
    batch=st.integers(1, 4),
    len_q=st.integers(1, 9),
    len_k=st.integers(1, 9),
)
def test_random_arguments_match_torch(
    seed, heads, head_dim, kdim, vdim, flags, layout, inputs, masks, weights, batch, len_q, len_k
):
    torch.manual_seed(seed)
    if inputs == "self":
        len_k = len_q
    if inputs != "cross":
        kdim = vdim = None
    theirs, ours = make_pair(
        embed_dim=heads * head_dim, num_heads=heads, kdim=kdim, vdim=vdim, **flags,
        batch_first=layout == "batch_first",
    )  # fmt: skip
    sizes = {"batch": batch, "len_q": len_q, "len_k": len_k}
    tensors = make_inputs(inputs, layout, theirs, **sizes)
    arguments = make_masks(masks, layout, theirs, **sizes)
    arguments |= weights
    want = results(theirs, *tensors, **arguments)
    assert_same(results(ours, *tensors, **arguments), want, torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_goes_both_ways(options):
    theirs, ours = make_pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    again = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    again.load_state_dict(ours.state_dict(), strict=True)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)


def test_same_seed_gives_the_same_initial_parameters():
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, kdim=5)
    torch.manual_seed(3)
    ours = MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, kdim=5)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies(copied):
    module = MultiheadAttention(
        WIDTH, HEADS, add_bias_kv=True, batch_first=True, backend="reference"
    )
    again, x = copied(module), torch.randn(2, 5, WIDTH)
    assert type(again) is MultiheadAttention and again.backend == "reference"
    torch.testing.assert_close(again(x, x, x), module(x, x, x), rtol=0, atol=0)


def test_a_torch_module_can_change_its_class_in_place():
    module, x = nn.MultiheadAttention(WIDTH, HEADS), torch.randn(5, 2, WIDTH)
    want = module(x, x, x, need_weights=False)[0]
    module.__class__ = MultiheadAttention
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], want)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masks", ["no_mask", "padding_bool", "attn_2d_bool", "attn_3d_float"])
def test_inference_matches_the_fast_path_of_torch(masks, weights):
    theirs, ours = make_pair(torch.float32, batch_first=True, dropout=0.5)
    theirs.eval(), ours.eval()
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_Q}
    x = make_inputs("self", "batch_first", theirs, **sizes)
    arguments = make_masks(MASKS[masks], "batch_first", theirs, **sizes)
    with torch.inference_mode():
        got, want = (module(*x, **arguments, **weights) for module in (ours, theirs))
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("weights", WEIGHTS[:2])
@pytest.mark.parametrize("masks", ["no_mask", "padding_bool", "attn_2d_float", "causal"])
def test_half_precision(masks, weights, dtype):
    theirs, ours = make_pair(dtype)
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K}
    tensors = make_inputs("cross", "seq_first", theirs, **sizes)
    arguments = make_masks(MASKS[masks], "seq_first", theirs, **sizes) | weights
    got, want = (module(*tensors, **arguments) for module in (ours, theirs))
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("weights", WEIGHTS[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_takes_float32_masks(dtype, weights):
    """Also where no key is left once the mask is rounded to half precision."""
    _, ours = make_pair(dtype, batch_first=True)
    tensors = make_inputs("cross", "batch_first", ours)
    mask = make_mask("float", (LEN_Q, LEN_K), torch.float32)
    got, want = (ours(*tensors, attn_mask=x, **weights) for x in (mask, mask.to(dtype)))
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    lowest = torch.full((LEN_Q, LEN_K), torch.finfo(torch.float32).min)
    assert all(x is None or x.isfinite().all() for x in ours(*tensors, attn_mask=lowest, **weights))


def test_causal_hint_is_top_left_and_replaces_the_mask():
    _, ours = make_pair()
    query, key, value = make_inputs("cross", "seq_first", ours)
    causal = torch.ones(LEN_Q, LEN_K, dtype=torch.bool).triu(1)
    want = ours(query, key, value, attn_mask=causal, need_weights=False)[0]
    hint = {"attn_mask": torch.zeros_like(causal), "is_causal": True}
    got = ours(query, key, value, **hint, need_weights=False)[0]
    torch.testing.assert_close(got, want)
    got = ours(query, key, value, **hint, need_weights=True)[0]
    assert not torch.allclose(got, want), "with weights, as in torch, the mask itself counts"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
def test_a_query_without_a_key_attends_to_nothing(dtype, weights):
    _, ours = make_pair(torch.float32, batch_first=True)
    tensors = make_inputs("cross", "batch_first", ours)
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[1] = True
    attn_mask = torch.zeros(LEN_Q, LEN_K, dtype=torch.bool)
    attn_mask[2] = True
    if dtype != torch.bool:
        padding, attn_mask = (
            torch.zeros(mask.shape).masked_fill(mask, -torch.inf).requires_grad_()
            for mask in (padding, attn_mask)
        )
    found = results(ours, *tensors, key_padding_mask=padding, attn_mask=attn_mask, **weights)
    bias = ours.out_proj.bias
    assert torch.equal(found["out"][1], bias.expand(LEN_Q, WIDTH))
    assert torch.equal(found["out"][:, 2], bias.expand(BATCH, WIDTH))
    assert all(x.isfinite().all() for x in found.values())
    assert not found["dquery"][1].any() and not found["dquery"][:, 2].any()
    assert not found["dkey"][1].any() and not found["dvalue"][1].any()
    if weights["need_weights"]:
        assert not found["weights"][1].any() and not found["weights"][..., 2, :].any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masks", ["no_mask", "bool_bool", "float_float", "causal"])
@pytest.mark.parametrize("empty", ["batch", "len_q", "len_k"])
def test_empty_inputs(empty, masks, weights):
    theirs, ours = make_pair(batch_first=True)
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K} | {empty: 0}
    tensors = make_inputs("cross", "batch_first", theirs, **sizes)
    arguments = make_masks(MASKS[masks], "batch_first", theirs, **sizes)
    found = results(ours, *tensors, **arguments, **weights)
    assert torch.equal(found["out"], ours.out_proj.bias.expand(found["out"].shape))
    assert all(x is None or not x[x.isnan()].numel() for x in found.values())
    if masks == "no_mask":  # torch's reshapes of masks fail on some of these
        want = theirs(*tensors, **weights)
        torch.testing.assert_close(ours(*tensors, **weights), want)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights):
    _, ours = make_pair(dropout=0.25)
    x = torch.randn(40, 30, WIDTH, dtype=torch.float64)
    torch.manual_seed(0)
    dropped, weights = ours(x, x, x, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(0)
    assert torch.equal(ours(x, x, x, need_weights=need_weights)[0], dropped)
    samples = torch.stack([ours(x, x, x, need_weights=need_weights)[0] for _ in range(64)])
    ours.eval()
    kept, kept_weights = ours(x, x, x, average_attn_weights=False)
    assert (samples.mean(0) - kept).abs().mean() < 0.2 * (dropped - kept).abs().mean()
    if need_weights:  # what torch returns: the weights after dropout
        share = (weights == 0).double().mean()
        assert abs(share - 0.25) < 0.01
        torch.testing.assert_close(weights, (kept_weights / 0.75).where(weights != 0, 0.0))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_everything(need_weights):
    _, ours = make_pair(dropout=1.0)
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    out = ours(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(out, ours.out_proj.bias.expand(3, 2, WIDTH))


def test_projections_reach_the_kernel_without_a_copy(monkeypatch):
    seen = []

    def spy(q, k, v, **arguments):
        seen.append((q, k, v))
        return torch.zeros_like(q)

    monkeypatch.setattr(module_source, "attention", spy)
    for batch_first in (False, True):
        ours = MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        x, memory = torch.randn(5, 5, WIDTH), torch.randn(5, 5, WIDTH)
        ours(x, x, x, need_weights=False)
        ours(x, memory, memory, need_weights=False)
    storages = [[x.untyped_storage().data_ptr() for x in call] for call in seen]
    assert all(len(set(call)) == 1 for call in storages[::2]), "self-attention: one product"
    assert all(call[1] == call[2] for call in storages[1::2]), "shared memory: one for k and v"
    assert all(x.shape == (5, 5, HEADS, WIDTH // HEADS) for call in seen for x in call)


@pytest.mark.parametrize("masks", ["padding_bool", "attn_2d_bool", "causal_padding"])
def test_float_masks_of_zero_and_inf_reach_the_kernel_as_bool(monkeypatch, masks):
    """Torch's transformer layers make every mask a float one, which no interval mask could be."""
    seen = []
    attention = module_source.attention

    def spy(q, k, v, **arguments):
        seen.append(arguments)
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(module_source, "attention", spy)
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K}
    tensors = make_inputs("cross", "batch_first", ours, **sizes)
    given = make_masks(MASKS[masks], "batch_first", ours, **sizes)
    as_float = {
        name: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
        for name, mask in given.items()
        if isinstance(mask, Tensor)
    }
    outs = [ours(*tensors, **given | masks, need_weights=False)[0] for masks in ({}, as_float)]
    assert torch.equal(*outs)
    assert all(call["bias"] is None and call["mask"].dtype == torch.bool for call in seen)


def test_nan_in_a_hidden_key_stays_hidden():
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    query, key = torch.randn(BATCH, LEN_Q, WIDTH), torch.randn(BATCH, LEN_K, WIDTH)
    padding = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
    padding[:, 4:] = True
    arguments = {"key_padding_mask": padding, "need_weights": False}
    want = ours(query, key, key, **arguments)[0]
    key[:, 4:] = torch.nan
    torch.testing.assert_close(ours(query, key, key, **arguments)[0], want)


def test_seq_first_output_is_contiguous():
    ours, x = MultiheadAttention(WIDTH, HEADS), torch.randn(5, 3, WIDTH)
    assert all(ours(x, x, x, **weights)[0].view(-1).numel() for weights in WEIGHTS)


def test_backend_is_passed_on():
    x = torch.randn(5, 2, WIDTH)
    ours = MultiheadAttention(WIDTH, HEADS, backend="reference")
    torch.testing.assert_close(
        ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=True)[0]
    )
    ours.backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        ours(x, x, x, need_weights=False)


def test_repr():
    text = repr(MultiheadAttention(WIDTH, HEADS, kdim=7, dropout=0.1, batch_first=True))
    assert text.startswith("MultiheadAttention(")
    for fact in (
        f"{WIDTH}, {HEADS}",
        "kdim=7",
        "dropout=0.1",
        "batch_first=True",
        "backend='auto'",
    ):
        assert fact in text
