"""Is the report true of code that misleads: other branches, other names, other callers?"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as fused

import mmkernels as mm
from tests.integrations.counting import kernel_calls

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q, k, v):
    return torch.softmax(q @ k.mT / 4, -1) @ v


class Flag(nn.Module):
    def __init__(self, flash):
        super().__init__()
        self.flash = flash

    def forward(self, x):
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x) if self.flash else by_hand(x, x, x)


class EarlyReturn(Flag):
    def forward(self, x):
        x = x[:, None]
        if not self.flash:
            return by_hand(x, x, x)
        return F.scaled_dot_product_attention(x, x, x)


class Both(Flag):
    def __init__(self, flash):
        super().__init__(flash)
        self.wanted = True

    def forward(self, x):
        x = x[:, None]
        if self.wanted and self.flash:
            return F.scaled_dot_product_attention(x, x, x)
        return by_hand(x, x, x)


class OtherName(nn.Module):
    def forward(self, x):
        x = x[:, None]
        return fused(x, x, x)


class Held(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        x = x[:, None]
        return self.function(x, x, x)


class SoftmaxModule(nn.Module):
    def forward(self, x):
        return nn.Softmax(-1)(x @ x.mT) @ x


def claims_and_runs(model, *inputs):
    report = mm.replace(model)
    with kernel_calls() as calls, torch.no_grad():
        model(*inputs)
    return len(report.swapped), len(report.left), calls.attention


@pytest.mark.parametrize("kind", [Flag, EarlyReturn, Both])
@pytest.mark.parametrize("flash", [True, False])
def test_branch_that_a_setting_decides(kind, flash):
    model = kind(flash)
    wanted = model(X)
    assert claims_and_runs(model, X) == ((1, 0, 1) if flash else (0, 1, 0))
    torch.testing.assert_close(model(X), wanted)
    if not flash:
        (left,) = mm.replace(model).left
        assert "flash" in left.reason
        assert "is False" in left.reason or "is True" in left.reason


@pytest.mark.parametrize("model", [OtherName(), Held(attend), Held(F.scaled_dot_product_attention)])
def test_function_by_another_name(model):
    assert claims_and_runs(model, X) == (1, 0, 1)


def test_softmax_that_is_a_module():
    assert claims_and_runs(SoftmaxModule(), X) == (0, 1, 0)


class Callers(nn.Module):
    """Two attentions, called with these arguments."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(16, 2, batch_first=True)
        self.second = nn.MultiheadAttention(16, 2, batch_first=True)


class OneDeclines(Callers):
    def forward(self, x):
        x, _ = self.first(x, x, x, need_weights=False)
        return self.second(x, x, x)[0]


class OneAsks(Callers):
    def forward(self, x):
        x, _ = self.first(x, x, x, need_weights=False)
        return self.second(x, x, x, need_weights=True, average_attn_weights=False)[0]


class ByPlace(Callers):
    def forward(self, x):
        x, _ = self.first(x, x, x, None, False)
        return self.second(x, x, x, None, True)[0]


@pytest.mark.parametrize("kind", [OneDeclines, OneAsks, ByPlace])
def test_each_call_of_multi_head_attention_counts(kind):
    assert claims_and_runs(kind(), X) == (1, 1, 1)


class CalledTwice(Callers):
    def forward(self, x):
        x, _ = self.first(x, x, x, need_weights=False)
        x, _ = self.first(x, x, x)
        return self.second(x, x, x, need_weights=False)[0]


def test_all_calls_of_one_attention_must_decline():
    assert claims_and_runs(CalledTwice(), X) == (1, 1, 1)


class ListOfThem(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x, x, x, need_weights=False)
        return x


def test_multi_head_attentions_in_a_list():
    assert claims_and_runs(ListOfThem(), X) == (2, 0, 2)


class LayerWithWeights(nn.TransformerEncoderLayer):
    """The usual way to get at the weights."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x, self.weights = self.self_attn(
            x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=True
        )
        return self.dropout1(x)


def test_layer_that_asks_for_weights():
    layer = LayerWithWeights(16, 2, 32, batch_first=True)  # in training, past the fast path
    assert claims_and_runs(layer, X) == (0, 1, 0)


def test_convolution_of_single_pixels_is_no_patch_embedding():
    """The shortcut of a residual network, say."""
    assert mm.replace(nn.Sequential(nn.Conv2d(8, 8, 1, stride=2))).entries == ()
