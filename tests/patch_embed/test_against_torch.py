"""Is the patch embedding torch's convolution, and are its gradients the numerical ones?"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends
from tests.patch_embed.cases import image_bytes, normal, tokens_of, weights

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Shape(NamedTuple):
    """Sizes of a call; kernel, stride and size have a number for each dimension of a patch."""

    batch: int
    channels: int
    dim: int
    prefix: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    size: tuple[int, ...]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kernel, stride, size = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        kernel.append(draw(st.integers(1, 5)))
        stride.append(draw(st.integers(1, 6)))
        rest = draw(st.integers(0, stride[-1] - 1))
        size.append(kernel[-1] + stride[-1] * draw(st.integers(0, 3)) + rest)
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    dim, prefix = draw(st.integers(1, 9)), draw(st.integers(0, 2))
    return Shape(batch, channels, dim, prefix, tuple(kernel), tuple(stride), tuple(size))


def arguments_of(shape: Shape) -> dict[str, Tensor]:
    made = {
        "pixels": normal(shape.batch, shape.channels, *shape.size),
        **weights(shape.dim, shape.channels, *shape.kernel),
    }
    if shape.prefix:
        made["prefix_tokens"] = normal(shape.prefix, shape.dim, seed=5)
    return made


def convolution(shape: Shape, pixels, weight, bias, prefix_tokens=None) -> Tensor:
    run = CONVOLUTIONS[len(shape.kernel)]
    tokens = run(pixels, weight, bias, shape.stride).flatten(2).transpose(1, 2)
    if prefix_tokens is None:
        return tokens
    return torch.cat((prefix_tokens.expand(len(tokens), -1, -1), tokens), 1)


def results(function, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    out = function(**leaves)
    dout = normal(*out.shape, seed=99).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def assert_same(shape: Shape, backend: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(shape)
    wanted = results(lambda **x: convolution(shape, **x), arguments)
    device = testing.device_for(backend)
    got = results(
        lambda **x: mm.patch_embed(**x, stride=shape.stride, backend=backend),
        {name: x.to(device, dtype) for name, x in arguments.items()},
    )
    near = (
        {"atol": 1e-11, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 5e-5, "rtol": 1e-4}
    )
    for name, x in got.items():
        assert x.dtype == dtype
        torch.testing.assert_close(
            x.cpu().double(), wanted[name], **near, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=60)
@given(shapes())
def test_any_shape(backend, shape):
    assert_same(shape, backend, torch.float64)


SOME = {
    "audio": Shape(2, 2, 3, 1, (5,), (3,), (15,)),
    "image": Shape(2, 3, 5, 2, (3, 4), (3, 4), (7, 9)),
    "overlapping": Shape(1, 1, 9, 0, (5, 3), (2, 1), (10, 5)),
    "apart": Shape(3, 1, 2, 0, (1, 2), (4, 3), (6, 8)),
    "video": Shape(1, 2, 4, 1, (2, 1, 3), (1, 2, 3), (3, 4, 7)),
}


@backends.each("triton")
@pytest.mark.parametrize("shape", SOME.values(), ids=SOME)
def test_some_shapes(shape, backend):
    assert_same(shape, backend, torch.float32)


TAIL = tokens_of(2, 4, 1, 3)
# Name -> pixels and options, tiny: all that is floating point is perturbed value by value.
TINY = {
    "tail": lambda: (normal(2, 2, 4, 5), weights(3, 2, 2, 2) | TAIL),
    "normalized": lambda: (
        normal(2, 2, 4, 4),
        weights(3, 2, 2, 2) | {"pixel_mean": (0.3, 0.6), "pixel_std": (0.5, 0.2)},
    ),
    "bytes": lambda: (
        image_bytes(2, 2, 4, 4),
        weights(3, 2, 2, 2) | {"pixel_mean": 0.4, "pixel_std": (0.5, 0.2)} | TAIL,
    ),
    "overlapping, padded": lambda: (
        normal(2, 1, 4, 3), weights(3, 1, 3, 2) | {"stride": (2, 1), "pad": True}
    ),
    "gathered": lambda: (
        normal(2, 1, 2, 4),
        weights(3, 1, 2, 2)
        | {"pos_embed": normal(3, 3), "pos_index": torch.tensor([[2, 2], [0, 2]])},
    ),
    "of samples": lambda: (
        normal(2, 1, 2, 4),
        weights(3, 1, 2, 2) | {"pos_embed": normal(2, 3, 3), "prefix_tokens": normal(2, 1, 3)},
    ),
    "video": lambda: (normal(1, 1, 3, 2, 4), weights(2, 1, 2, 2, 2) | {"stride": (1, 2, 2)}),
    "audio": lambda: (normal(2, 2, 6), weights(2, 2, 3) | {"stride": 2, "pad": True}),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", TINY)
def test_gradcheck(name, backend):
    pixels, options = TINY[name]()
    arguments = {"pixels": pixels} | options
    leaves = {
        key: x.clone().requires_grad_()
        for key, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }

    def run(*tensors):
        return mm.patch_embed(
            **arguments | dict(zip(leaves, tensors, strict=True)), backend=backend
        )

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_of_images_of_mixed_size(backend):
    images = [normal(1, 2, 4), normal(1, 4, 3, seed=1)]
    options = weights(2, 1, 2, 2) | tokens_of(1, 4, 1, 2)
    options["token_mask"] = options["token_mask"][0]
    options["pos_embed"] = normal(6, 2)
    names = [name for name, x in options.items() if x.is_floating_point()]
    leaves = [x.clone().requires_grad_() for x in (*images, *(options[name] for name in names))]

    def run(first, second, *tensors):
        changed = options | dict(zip(names, tensors, strict=True))
        return mm.patch_embed_varlen([first, second], **changed, backend=backend)[0]

    assert torch.autograd.gradcheck(run, leaves)
