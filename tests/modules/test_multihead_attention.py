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

TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
HEADS, WIDTH, BATCH, LEN_Q, LEN_K = 2, 16, 3, 4, 6
OPTIONS = {
    "packed": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 10, "vdim": 12},
    "kdim_no_bias": {"kdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
}
# (dtype kind of key_padding_mask, dtype kind and rank of attn_mask, is_causal)
MASKS = {
    "no_mask": (None, None, False),
    "padding_bool": ("bool", None, False),
    "padding_float": ("float", None, False),
    "attn_2d_bool": (None, ("bool", 2), False),
    "attn_2d_float": (None, ("float", 2), False),
    "attn_3d_bool": (None, ("bool", 3), False),
    "attn_3d_float": (None, ("float", 3), False),
    "bool_bool": ("bool", ("bool", 3), False),
    "bool_float": ("bool", ("float", 2), False),
    "float_bool": ("float", ("bool", 2), False),
    "float_float": ("float", ("float", 3), False),
    "causal": (None, ("causal", 2), True),
    "causal_padding": ("bool", ("causal", 2), True),
    "not_really_causal": (None, ("float", 2), True),
}
LAYOUTS = ("batch_first", "seq_first", "unbatched")
INPUTS = ("self", "cross_shared", "cross")
WEIGHTS = (
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)


def make_pair(dtype: torch.dtype = torch.float64, **options):
    """The same parameters in torch's module and in ours, biases not left at 0."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "dtype": dtype} | options
    theirs = nn.MultiheadAttention(**options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_mask(kind: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A mask that leaves every query its key 0: without a key, torch gives NaN."""
    if kind is None:
        return None
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    hidden = torch.rand(shape) < 0.4
    hidden[..., :1] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=dtype).masked_fill(hidden, -torch.inf).requires_grad_()


def make_inputs(inputs, layout, theirs, *, batch=BATCH, len_q=LEN_Q, len_k=LEN_K):
    """query, key and value; the same object where `inputs` says so."""

    def sequence(length, width):
        shape = {
            "batch_first": (batch, length, width),
            "seq_first": (length, batch, width),
            "unbatched": (length, width),
        }[layout]
        return torch.randn(shape, dtype=theirs.out_proj.weight.dtype, requires_grad=True)

    query = sequence(len_q, theirs.embed_dim)
    if inputs == "self":
        return query, query, query
    key = sequence(len_k, theirs.kdim)
    return query, key, key if inputs == "cross_shared" else sequence(len_k, theirs.vdim)


def make_masks(masks, layout, theirs, *, batch, len_q, len_k):
    padding, attn, is_causal = masks
    batch = () if layout == "unbatched" else (batch,)
    dtype = theirs.out_proj.weight.dtype
    kind, rank = attn or (None, 2)
    leading = (theirs.num_heads * (batch or (1,))[0],) if rank == 3 else ()
    return {
        "key_padding_mask": make_mask(padding, (*batch, len_k), dtype),
        "attn_mask": make_mask(kind, (*leading, len_q, len_k), dtype),
        "is_causal": is_causal,
    }


def results(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **arguments):
    """Outputs and the gradients of all inputs, float masks and parameters, by name."""
    out, weights = module(query, key, value, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator)).sum()
    found = {"out": out}
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator)).sum()
        found["weights"] = weights
    leaves = {"query": query, "key": key, "value": value} | dict(module.named_parameters())
    leaves |= {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(ours: dict, theirs: dict, dtype: torch.dtype) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        got = ours[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype, name
            torch.testing.assert_close(
                got, want, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}"
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


@pytest.mark.parametrize("weights", WEIGHTS[:2])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=["packed", "bias_kv"])
@pytest.mark.parametrize("masks", ["no_mask", "padding_bool", "attn_2d_float", "causal"])
def test_autocast(masks, options, weights):
    theirs, ours = make_pair(torch.float32, **options)
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K}
    tensors = make_inputs("cross", "seq_first", theirs, **sizes)
    arguments = make_masks(MASKS[masks], "seq_first", theirs, **sizes) | weights
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (results(module, *tensors, **arguments) for module in (ours, theirs))
    for name, expected in want.items():
        if expected is not None:
            assert got[name].dtype == expected.dtype, name
            scale = expected.float().abs().max()
            assert (got[name].float() - expected.float()).abs().max() <= 0.05 * scale, name


@pytest.mark.parametrize("weights", WEIGHTS[:2])
def test_autocast_takes_what_the_layer_before_returns(weights):
    theirs, ours = make_pair(torch.float32, batch_first=True)
    x = torch.randn(BATCH, LEN_K, WIDTH).bfloat16()
    mask = torch.randn(LEN_K, LEN_K).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (module(x, x, x, attn_mask=mask, **weights) for module in (ours, theirs))
    torch.testing.assert_close(got, want, **TOLERANCE[torch.bfloat16])
    with pytest.raises(TypeError, match=r"query is torch\.bfloat16"):
        ours(x, x, x, attn_mask=mask, **weights)


@pytest.mark.parametrize("weights", WEIGHTS[:2])
@pytest.mark.parametrize(
    "masks, layout",
    [
        ("no_mask", "unbatched"),
        ("bool_float", "batch_first"),
        ("attn_3d_float", "seq_first"),
        ("causal", "seq_first"),
    ],
)
def test_compiles_into_one_graph(masks, layout, weights):
    _, ours = make_pair(add_zero_attn=masks == "attn_3d_float", batch_first=layout == "batch_first")
    sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K}
    tensors = make_inputs("cross_shared", layout, ours, **sizes)
    arguments = make_masks(MASKS[masks], layout, ours, **sizes) | weights
    want = results(ours, *tensors, **arguments)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = results(compiled, *tensors, **arguments)
    got = {name.replace("_orig_mod.", ""): x for name, x in got.items()}
    assert_same(got, want, torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_per_sample_gradients():
    _, ours = make_pair()
    parameters = dict(ours.named_parameters())
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)

    def loss(parameters, x):
        out, _ = torch.func.functional_call(ours, parameters, (x, x, x), {"need_weights": False})
        return out.square().sum()

    for sample, grad in enumerate(
        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["in_proj_weight"]
    ):
        want = torch.autograd.grad(loss(parameters, x[sample]), ours.in_proj_weight)[0]
        torch.testing.assert_close(grad, want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("weights", WEIGHTS[:2])
def test_nested_tensors(weights):
    theirs, ours = make_pair(torch.float32, batch_first=True)
    theirs.eval(), ours.eval()
    samples = [torch.randn(length, WIDTH) for length in (3, 5)]
    x = torch.nested.nested_tensor(samples)
    with torch.inference_mode():
        got, want = (module(x, x, x, **weights)[0] for module in (ours, theirs))
        for a, b in zip(got.unbind(), want.unbind(), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="is_causal"):
            ours(x, x, x, is_causal=True, **weights)
    with pytest.raises(ValueError, match=r"nested.*to_padded_tensor"):
        ours(x, x, x, **weights)  # torch serves nested tensors without gradients only
    jagged = torch.nested.nested_tensor(samples, layout=torch.jagged)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"nested.*to_padded_tensor"):
        ours(jagged, jagged, jagged, **weights)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_in_an_encoder_layer_of_torch(training, norm_first):
    theirs = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.train(training), ours.train(training)
    x = torch.randn(BATCH, LEN_K, WIDTH)
    padding = torch.tensor([6, 4, 5])[:, None] <= torch.arange(LEN_K)
    causal = nn.Transformer.generate_square_subsequent_mask(LEN_K)
    for arguments in (
        {},
        {"src_key_padding_mask": padding},
        {"src_mask": causal, "is_causal": True},
        {"src_mask": causal, "src_key_padding_mask": padding.float().masked_fill(padding, -1e9)},
    ):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(
                ours(x, **arguments), theirs(x, **arguments), **TOLERANCE[torch.float32]
            )


def test_in_a_decoder_layer_of_torch():
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, dropout=0.0)
    ours = copy.deepcopy(theirs)
    ours.self_attn, ours.multihead_attn = (MultiheadAttention(WIDTH, HEADS) for _ in range(2))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, memory = torch.randn(LEN_Q, BATCH, WIDTH), torch.randn(LEN_K, BATCH, WIDTH)
    arguments = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(LEN_Q),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.tensor([6, 4, 5])[:, None] <= torch.arange(LEN_K),
    }
    torch.testing.assert_close(ours(x, memory, **arguments), theirs(x, memory, **arguments))


@pytest.mark.parametrize(
    "sizes",
    [(16, 3), (0, 1), (16, 0), (-4, 2)],
    ids=["indivisible", "no_width", "no_heads", "negative"],
)
def test_bad_sizes(sizes):
    with pytest.raises((ValueError, AssertionError)):
        nn.MultiheadAttention(*sizes)
    with pytest.raises(ValueError, match="positive multiple of num_heads"):
        MultiheadAttention(*sizes)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K = (BATCH, LEN_Q, WIDTH), (BATCH, LEN_K, WIDTH)
BAD_ARGUMENTS = {
    "query_not_a_tensor": ({"query": None}, TypeError, "query is a NoneType"),
    "query_1d": ({"query": zeros(WIDTH)}, ValueError, "query and key have shapes"),
    "query_4d": ({"query": zeros(1, *Q)}, ValueError, "query and key have shapes"),
    "key_rank": ({"key": zeros(*K[1:])}, ValueError, "query and key have shapes"),
    "value_rank": ({"value": zeros(*K[1:])}, ValueError, "value has shape"),
    "query_width": ({"query": zeros(BATCH, LEN_Q, 15)}, ValueError, r"query has .*4, 16\)"),
    "key_width": ({"key": zeros(BATCH, LEN_K, 15)}, ValueError, r"key has .*6, 16\)"),
    "value_width": ({"value": zeros(BATCH, LEN_K, 15)}, ValueError, r"value has .*6, 16\)"),
    "value_length": ({"value": zeros(BATCH, LEN_K + 1, WIDTH)}, ValueError, "value has shape"),
    "batch": ({"query": zeros(2, *Q[1:])}, ValueError, "key has shape"),
    "query_dtype": ({"query": zeros(*Q, dtype=torch.float64)}, TypeError, "query is torch.float64"),
    "key_dtype": ({"key": zeros(*K, dtype=torch.int64)}, TypeError, "key is torch.int64"),
    "value_device": ({"value": zeros(*K, device="meta")}, ValueError, "value is on meta"),
    "padding_int": (
        {"key_padding_mask": zeros(BATCH, LEN_K, dtype=torch.int64)},
        TypeError,
        "key_padding_mask is torch.int64; convert it to torch.bool",
    ),
    "padding_shape": (
        {"key_padding_mask": zeros(BATCH, LEN_Q)}, ValueError, r"key_padding_mask has .*\(3, 6\)"
    ),
    "padding_rank": ({"key_padding_mask": zeros(LEN_K)}, ValueError, "key_padding_mask has shape"),
    "padding_dtype": (
        {"key_padding_mask": zeros(BATCH, LEN_K, dtype=torch.float64)},
        TypeError,
        "key_padding_mask is torch.float64",
    ),
    "mask_list": ({"attn_mask": [[0.0]]}, TypeError, "attn_mask is a list"),
    "mask_int": ({"attn_mask": zeros(LEN_Q, LEN_K, dtype=torch.uint8)}, TypeError, "attn_mask is"),
    "mask_rank": ({"attn_mask": zeros(LEN_K)}, ValueError, "attn_mask has shape"),
    "mask_shape": ({"attn_mask": zeros(LEN_K, LEN_Q)}, ValueError, r"\(4, 6\) or \(6, 4, 6\)"),
    "mask_heads": ({"attn_mask": zeros(BATCH, LEN_Q, LEN_K)}, ValueError, "attn_mask has shape"),
    "mask_dtype": ({"attn_mask": zeros(LEN_Q, LEN_K, dtype=torch.float16)}, TypeError, "attn_mask"),
    "hint_only": ({"is_causal": True}, ValueError, "is_causal=True promises"),
}  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("wrong, error, match", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(wrong, error, match, need_weights):
    theirs, ours = make_pair(torch.float32, batch_first=True)
    arguments = {"query": zeros(*Q), "key": zeros(*K), "value": zeros(*K)} | wrong
    with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError)):
        theirs(**arguments, need_weights=need_weights)
    with pytest.raises(error, match=match):
        ours(**arguments, need_weights=need_weights)
