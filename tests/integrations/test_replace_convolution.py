"""`mm.replace` on convolutions that cut patches: torch's results, errors, dtypes and shapes."""

import copy

import pytest
import torch
from torch import nn

import mmkernels as mm
from mmkernels.testing import assert_accurate
from tests.integrations.counting import kernel_calls

# name: convolution, shape of its input
PATCHES = {
    "2-D": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 12)),
    "2-D, sides not multiples": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 18, 15)),
    "2-D, oblong": (lambda: nn.Conv2d(3, 8, (2, 4), (2, 4)), (2, 3, 8, 12)),
    "2-D, no bias": (lambda: nn.Conv2d(3, 8, 4, 4, bias=False), (2, 3, 16, 12)),
    "2-D, padding by name": (lambda: nn.Conv2d(3, 8, 4, 4, padding="valid"), (2, 3, 8, 12)),
    "2-D, overlapping": (lambda: nn.Conv2d(1, 8, 16, 10), (2, 1, 36, 56)),
    "2-D, with gaps": (lambda: nn.Conv2d(3, 8, 2, 4), (2, 3, 16, 12)),
    "2-D, one patch a sample": (lambda: nn.Conv2d(3, 8, 4, 4), (5, 3, 4, 4)),
    "1-D": (lambda: nn.Conv1d(2, 8, 4, 4), (2, 2, 18)),
    "3-D": (lambda: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 12)),
    "3-D, one patch a sample": (lambda: nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (6, 3, 2, 4, 4)),
}
EVERY = pytest.mark.parametrize("case", PATCHES)


def make(case, dtype=torch.float32):
    conv, shape = PATCHES[case]
    return conv().to(dtype), torch.randn(shape, dtype=dtype)


def changed(conv):
    ours = copy.deepcopy(conv)
    (entry,) = mm.replace(ours).entries
    assert entry.swapped and entry.kind == "patch embedding" and entry.name == ""
    return ours


def measure(conv, x):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    out = conv(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    leaves = {"input": x} | dict(conv.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_error_rule(case, dtype):
    conv, x = make(case, dtype)
    ours = changed(conv)
    with kernel_calls() as calls:
        got = measure(ours, x)
    assert (calls.patch_embed, calls.attention) == (1, 0)
    eager, exact = measure(conv, x), measure(copy.deepcopy(conv).double(), x.double())
    for name, wanted in eager.items():
        assert got[name].dtype == wanted.dtype
        rounding = 16 * torch.finfo(dtype).eps if dtype is torch.float64 else None
        assert_accurate(name, got[name], exact[name], wanted, rounding)


@EVERY
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case, given):
    conv, x = make(case)
    x = x.to(given)
    with torch.autocast("cpu", torch.bfloat16), kernel_calls() as calls:
        got = measure(changed(conv), x)
        wanted = measure(conv, x)
    assert calls.patch_embed == 1
    assert got["output"].dtype == torch.bfloat16
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype
        close = {"rtol": 2e-2, "atol": 2e-2 * x.abs().max().item()}
        torch.testing.assert_close(got[name], x, **close)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def every_other(x):
    return x.repeat_interleave(2, 0)[::2].mT.contiguous().mT


def expanded(x):
    return x[:1].expand(3, -1, -1, -1)


@pytest.mark.parametrize("lay_out", [channels_last, every_other, expanded])
@pytest.mark.parametrize("case", ["2-D", "2-D, overlapping", "2-D, one patch a sample"])
def test_layouts_of_the_input(case, lay_out):
    conv, x = make(case)
    with kernel_calls() as calls:
        out = changed(conv)(lay_out(x))
    assert calls.patch_embed == 1
    torch.testing.assert_close(out, conv(lay_out(x)))


@EVERY
def test_layout_of_the_output(case):
    """A view of (B, N, D): the usual ways from (B, D, *grid) to tokens and back copy nothing."""
    conv, x = make(case)
    out, wanted = changed(conv)(x), conv(x)
    tokens = out.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()
    assert tokens.data_ptr() == out.data_ptr()
    batch, dim = wanted.shape[:2]
    torch.testing.assert_close(out.view(batch, dim, -1), wanted.view(batch, dim, -1))
    if "one patch" in case:  # as Qwen2-VL does
        assert out.is_contiguous()
        torch.testing.assert_close(out.view(-1, dim), wanted.view(-1, dim))


@pytest.mark.parametrize("case", ["2-D", "1-D", "3-D"])
def test_without_a_batch(case):
    """Served by the convolution itself."""
    conv, x = make(case)
    assert torch.equal(changed(conv)(x[0]), conv(x[0]))


@pytest.mark.parametrize("case", ["2-D", "1-D", "3-D", "2-D, one patch a sample"])
def test_no_samples(case):
    conv, x = make(case)
    got, wanted = (measure(module, x[:0]) for module in (changed(conv), conv))
    for name, empty in wanted.items():
        assert got[name].shape == empty.shape, name
        assert torch.equal(got[name], empty), name


def size(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


WRONG = [
    size(2, 3, 8, 8, dtype=torch.uint8),
    size(2, 3, 8, 8, dtype=torch.int64),
    size(2, 3, 8, 8, dtype=torch.complex64),
    size(2, 4, 8, 8),
    size(4, 8, 8),
    size(2, 3, 3, 8),
    size(2, 3, 0, 8),
    size(0, 3, 3, 8),
    size(3),
    size(2, 3, 4, 4, 4),
    [1.0],
]
OTHER_FLOATS = [size(2, 3, 8, 8, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize(
    "autocast, x",
    [(False, x) for x in WRONG + OTHER_FLOATS] + [(True, x) for x in WRONG],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else str(x),
)
def test_errors_are_those_of_torch(x, autocast):
    conv = nn.Conv2d(3, 8, 4, 4)
    ours = changed(conv)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            conv(x)
        with pytest.raises(theirs.type) as error:
            ours(x)
    assert str(error.value) == str(theirs.value)


class Scaled(nn.Conv2d):
    """A convolution with code of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


LEFT = {
    "padded": (lambda: nn.Conv2d(3, 8, 4, 4, padding=2), "no padding"),
    "padded by name": (lambda: nn.Conv1d(3, 8, 4, 2, padding=1), "no padding"),
    "dilated": (lambda: nn.Conv2d(3, 8, 4, 4, dilation=2), "no dilation"),
    "groups": (lambda: nn.Conv2d(4, 8, 4, 4, groups=2), "one group"),
    "close steps": (lambda: nn.Conv2d(3, 8, 3, 2), "no patches side by side"),
    "mostly shared": (lambda: nn.Conv2d(3, 8, 16, 8), "no patches side by side"),
    "subclass": (lambda: Scaled(3, 8, 4, 4), "Scaled is a convolution with code of its own"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case):
    make_conv, why = LEFT[case]
    conv = make_conv()
    x = torch.randn(2, conv.in_channels, *(16,) * len(conv.kernel_size))
    before, kind = conv(x), type(conv)
    (entry,) = mm.replace(conv).entries
    assert not entry.swapped
    assert why in entry.reason
    assert type(conv) is kind
    with kernel_calls() as calls:
        assert torch.equal(conv(x), before)
    assert calls.by_op == {}


def test_not_made_yet():
    """A lazy module becomes a convolution in its first call; then it can be swapped."""
    conv, x = nn.LazyConv2d(8, 4, 4), torch.randn(2, 3, 8, 12)
    (entry,) = mm.replace(conv).left
    assert "LazyConv2d" in entry.reason
    wanted = conv(x)
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(changed(conv)(x), wanted)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(64, 8, 4, 4),
        nn.ConvTranspose2d(3, 8, 4, 4),
        nn.Linear(3, 8),
    ],
    ids=str,
)
def test_no_patch_embedding_at_all(conv):
    assert mm.replace(conv).entries == ()


def test_padding_mode_without_padding():
    conv = nn.Conv2d(3, 8, 4, 4, padding_mode="circular")
    x = torch.randn(2, 3, 17, 12)
    torch.testing.assert_close(changed(conv)(x), conv(x))
