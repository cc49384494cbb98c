"""What problems share: a pass with its gradients as a call, and the check of its results."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import BackendUnavailable, testing
from mmkernels.bench.case import Call, Results, Unavailable

# Those of a GPU, by name.
GPU_BACKENDS = ("triton", "cuda")


def solver(function: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor | None) -> Call:
    """A call that returns (out,), or out and the gradients of the leaves.

    Args:
        function: makes out.
        leaves: tensors that have a gradient.
        dout: the gradient of out, in any shape; None: inference, nothing is recorded.
    """

    def forward() -> Results:
        with torch.no_grad():
            return (function(),)

    def forward_backward() -> Results:
        assert dout is not None
        out = function()
        return (out.detach(), *torch.autograd.grad(out, leaves, dout.view(out.shape)))

    return forward if dout is None else forward_backward


def on_backend(name: str, call: Call) -> Call:
    """The call, which asks for a backend; raises `Unavailable` with its reason if it declines."""

    def asked() -> Results:
        try:
            return call()
        except BackendUnavailable as error:
            raise Unavailable(error.reasons[name]) from error

    return asked


def imported(name: str) -> Any:
    """A module of a library, imported.

    Problems ask when they are made: what an import takes does not belong to a first call.

    Args:
        name: "timm.layers".

    Raises:
        Unavailable: the library is not installed.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    return importlib.import_module(name)


def largest_error(names: Sequence[str], results: Results, exact: Results, eager: Results) -> float:
    """The largest absolute error of results, each held to the error rule.

    Args:
        names: of the results, for the message.
        results: of an implementation; sizes of 1 may be missing.
        exact: the same in float64.
        eager: the same of the yardstick.

    Raises:
        AssertionError: a result breaks the error rule of `mmkernels.testing`.
    """
    errors = []
    for name, got, *wanted in zip(names, results, exact, eager, strict=True):
        one, yardstick = (x.reshape(got.shape) for x in wanted)
        testing.assert_accurate(name, got, one, yardstick)
        errors.append(float((got.double() - one).abs().max()))
    return max(errors)
