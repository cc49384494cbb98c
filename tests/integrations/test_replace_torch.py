"""`mm.replace` on the attention of torch: MultiheadAttention, transformer layers, functions."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels as mm
from mmkernels.testing import assert_accurate
from tests.integrations.counting import kernel_calls
from tests.integrations.libraries import ROUNDING, assert_parity, claimed, kernels_of, measure
from tests.modules.pairs import (
    BATCH,
    LAYOUTS,
    LEN_K,
    LEN_Q,
    MASKS,
    OPTIONS,
    WEIGHTS,
    assert_same,
    make_inputs,
    make_masks,
    make_pair,
    results,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
HIDDEN = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask


def replaced(module: nn.Module, count: int) -> nn.Module:
    """A copy, in which so many attention modules were swapped and none left."""
    ours = copy.deepcopy(module)
    report = mm.replace(ours)
    assert (len(report.swapped), len(report.left)) == (count, 0), report
    return ours


def pair(dtype=torch.float64, **options):
    theirs, _ = make_pair(dtype, **options)
    return theirs, replaced(theirs, 1)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_multihead(options, masks):
    """Outputs, weights and all gradients; a kernel runs unless weights are asked for."""
    for layout, weights in itertools.product(LAYOUTS, WEIGHTS):
        theirs, ours = pair(batch_first=layout == "batch_first", **OPTIONS[options])
        sizes = {"batch": BATCH, "len_q": LEN_Q, "len_k": LEN_K}
        tensors = make_inputs("cross", layout, theirs, **sizes)
        arguments = make_masks(MASKS[masks], layout, theirs, **sizes) | weights
        with kernel_calls() as calls:
            got = results(ours, *tensors, **arguments)
        assert calls.attention == (0 if weights["need_weights"] else 1)
        assert_same(got, results(theirs, *tensors, **arguments), torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_of_itself(training, grad):
    """In evaluation and without gradients, too, where torch has one function for all of it."""
    theirs, ours = pair(torch.float32, batch_first=True)
    theirs.train(training), ours.train(training)
    x = torch.randn(3, 6, 16)
    with torch.set_grad_enabled(grad), kernel_calls() as calls:
        got, weights = ours(x, x, x, key_padding_mask=HIDDEN, need_weights=False)
        wanted, _ = theirs(x, x, x, key_padding_mask=HIDDEN, need_weights=False)
    assert weights is None
    assert calls.attention == 1
    torch.testing.assert_close(got, wanted)


def test_multihead_in_float32_at_the_error_rule():
    theirs, ours = pair(torch.float32, batch_first=True)
    x = torch.randn(3, 6, 16)

    def run(module):
        given = x.to(module.out_proj.weight.dtype)
        return module(given, given, given, need_weights=False)[0]

    exact = measure(copy.deepcopy(theirs).double(), run)
    assert_parity(measure(ours, run), exact, measure(theirs, run))


def test_multihead_drops_weights_in_training():
    _, ours = pair(batch_first=True, dropout=0.5)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    first, second = (ours.train()(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    ours.eval()
    first, second = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


class Talkative(nn.MultiheadAttention):
    """A subclass, which may do anything."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out + 1, weights


def test_subclass_is_left():
    module = Talkative(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    before, _ = module(x, x, x, need_weights=False)
    (entry,) = mm.replace(module).entries
    assert not entry.swapped
    assert "a subclass of torch.nn.MultiheadAttention" in entry.reason
    assert torch.equal(module(x, x, x, need_weights=False)[0], before)


def encoder(norm=False, **options) -> nn.TransformerEncoder:
    options = {"dropout": 0.0, "batch_first": True} | options
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    model = nn.TransformerEncoder(
        layer, 2, nn.LayerNorm(16) if norm else None, enable_nested_tensor=not layer.norm_first
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


ENCODERS = {
    "relu": {},
    "gelu": {"activation": "gelu", "norm": True},
    "norm first": {"norm_first": True, "norm": True},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "own activation": {"activation": F.silu},
}
ENCODER_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": HIDDEN},
    "causal": {"mask": CAUSAL(6), "is_causal": True},
    "causal, found out": {"mask": CAUSAL(6)},
    "causal and padding": {"mask": CAUSAL(6).isinf(), "src_key_padding_mask": HIDDEN},
    "bias": {"mask": torch.linspace(-2, 2, 36).view(6, 6)},
}


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Without torch's fast path, which takes a mask of numbers for one of bools and gives NaN."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def real(out: Tensor, batch_first: bool = True) -> Tensor:
    return (out if batch_first else out.transpose(0, 1))[~HIDDEN]


@pytest.mark.parametrize("masks", ENCODER_MASKS)
@pytest.mark.parametrize("options", ENCODERS)
def test_encoder(options, masks):
    """In no mode does torch's fused layer or its nested tensors bypass the kernel."""
    theirs = encoder(**ENCODERS[options])
    ours = replaced(theirs, 2)
    batch_first = ENCODERS[options].get("batch_first", True)
    x = torch.randn((3, 6, 16) if batch_first else (6, 3, 16))
    for training, context in itertools.product(
        (False, True), (torch.enable_grad, torch.no_grad, torch.inference_mode)
    ):
        with context():
            with layer_by_layer():
                wanted = theirs.train(training)(x, **ENCODER_MASKS[masks])
            with kernel_calls() as calls:
                got = ours.train(training)(x, **ENCODER_MASKS[masks])
        assert calls.attention == 2
        assert got.shape == wanted.shape
        got, wanted = real(got, batch_first), real(wanted, batch_first)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ["relu", "norm first"])
def test_encoder_at_the_error_rule(options):
    theirs = encoder(**ENCODERS[options])
    x = torch.randn(3, 6, 16)

    def run(model):
        dtype = model.layers[0].linear1.weight.dtype
        return real(model(x.to(dtype), src_key_padding_mask=HIDDEN))

    exact = measure(copy.deepcopy(theirs).double(), run)
    assert_parity(measure(replaced(theirs, 2), run), exact, measure(theirs, run))


def test_one_layer_of_an_encoder():
    """The encoder around it goes on making nested tensors, which torch serves."""
    theirs = encoder().eval()
    ours = copy.deepcopy(theirs)
    mm.replace(ours.layers[1])
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        wanted = real(theirs(x, src_key_padding_mask=HIDDEN))
        got = real(ours(x, src_key_padding_mask=HIDDEN))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        with kernel_calls() as calls:
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert calls.attention == 1


def test_restored_encoder_takes_its_fast_path_again():
    model = encoder().eval()
    before = [vars(module).copy() for module in model.modules()]
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=HIDDEN)
        with mm.replaced(model):
            model(x, src_key_padding_mask=HIDDEN)
        with kernel_calls() as calls:
            assert torch.equal(model(x, src_key_padding_mask=HIDDEN), wanted)
    assert calls.by_op == {}
    assert [vars(module) for module in model.modules()] == before


DECODER_MASKS = {
    "none": {},
    "causal": {"tgt_mask": CAUSAL(4), "tgt_is_causal": True},
    "padding": {"tgt_key_padding_mask": HIDDEN[:, 1:5], "memory_key_padding_mask": HIDDEN},
    "memory": {"memory_mask": torch.ones(4, 6).tril(3).log()},
}


@pytest.mark.parametrize("masks", DECODER_MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder(batch_first, masks):
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    theirs = nn.TransformerDecoder(layer, 2, nn.LayerNorm(16))
    target, memory = torch.randn(3, 4, 16), torch.randn(3, 6, 16)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)

    def run(model):
        dtype = model.norm.weight.dtype
        return model(target.to(dtype), memory.to(dtype), **DECODER_MASKS[masks])

    ours = replaced(theirs, 4)
    exact = measure(copy.deepcopy(theirs).double(), run)
    with kernel_calls() as calls:
        got = measure(ours, run)
    assert calls.attention == 4
    assert_parity(got, exact, measure(theirs, run))


@pytest.mark.parametrize("training", [True, False])
def test_whole_transformer(training):
    theirs = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    ours = replaced(theirs, 6)
    source, target = torch.randn(3, 6, 16), torch.randn(3, 4, 16)
    arguments = {
        "src_key_padding_mask": HIDDEN,
        "memory_key_padding_mask": HIDDEN,
        "tgt_mask": CAUSAL(4),
        "tgt_is_causal": True,
    }
    with torch.no_grad():
        wanted = theirs(source, target, **arguments)
        with kernels_of(ours, report := mm.replace(ours)) as ran:
            got = ours(source, target, **arguments)
    assert ran == claimed(report)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Written(nn.Module):
    """Attention as people write it, with a function that it imported or an attribute of one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(16, 48)
        self.how = how

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Pooled(nn.Module):
    """Calls the function behind torch's module, as the CLIP ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            x[:1], x, x, 16, 2, None, torch.cat([self.q.bias, self.k.bias, self.v.bias]),
            None, None, False, 0.0, self.out.weight, self.out.bias, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return out[0]


@pytest.mark.parametrize(
    "theirs",
    [lambda: Written("causal"), lambda: Written("scaled"), Pooled],
    ids=["causal", "scaled", "pooled"],
)
def test_functions_of_torch(theirs):
    theirs = theirs()
    ours = replaced(theirs, 1)
    x = torch.randn(2, 5, 16)

    def run(model):
        return model(x.to(next(model.parameters()).dtype))

    exact = measure(copy.deepcopy(theirs).double(), run)
    with kernel_calls() as calls:
        got = measure(ours, run)
    assert calls.attention == 1
    assert_parity(got, exact, measure(theirs, run))


def test_others_keep_the_function_of_torch():
    """It is exchanged inside of the swapped module only."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Written("causal")

        def forward(self, x):
            return self.inner(x)

    model = Beside()
    mm.replace(model)
    x = torch.randn(2, 2, 5, 8)
    with kernel_calls() as calls:
        model(torch.randn(2, 5, 16))
        assert calls.attention == 1
        out = F.scaled_dot_product_attention(x, x, x)
    assert calls.attention == 1
    assert_accurate(
        "outside",
        out,
        F.scaled_dot_product_attention(*(x.double(),) * 3),
        out,
        rounding=ROUNDING,
    )
