"""What a patch embedding gives, with its gradients, and comparison of two of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    # Eager rounds after the product and after every sum that follows.
    torch.bfloat16: {"atol": 4e-2, "rtol": 4e-2},
}


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter of order one, none left at 0 or uninitialised."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def with_gradients(out: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """out, and the gradients of a fixed random sum of it, by name of the leaf.

    A leaf that is not reached is an error: a gradient lost on the way is seen.
    """
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out.float() * weights).sum(), list(leaves.values()))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def results(module: nn.Module, *inputs: Tensor, **arguments) -> dict[str, Tensor]:
    """Output and gradients of all parameters."""
    return with_gradients(module(*inputs, **arguments), dict(module.named_parameters()))


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype=None) -> None:
    """Same names, dtypes, shapes and values, those of integers exactly."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert ours[name].dtype == want.dtype, name
        torch.testing.assert_close(
            ours[name],
            want,
            **TOLERANCE.get(dtype or want.dtype, {"atol": 0, "rtol": 0}),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def outcome(call: Callable, *inputs: Tensor):
    """What call gives, or the message of its failed assertion."""
    try:
        return call(*inputs)
    except AssertionError as error:
        return str(error)
