"""Does `mm.modules.MultiheadAttention` live with torch's transforms, layers and errors?"""

import copy

import pytest
import torch
from torch import Tensor, nn

from mmkernels.modules import MultiheadAttention
from tests.modules.pairs import (
    BATCH,
    HEADS,
    LEN_K,
    LEN_Q,
    MASKS,
    TOLERANCE,
    WEIGHTS,
    WIDTH,
    assert_same,
    make_inputs,
    make_masks,
    make_pair,
    results,
)


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
