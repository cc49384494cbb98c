"""The backends that tests run on: how each is marked, where its tensors lie, what it computes in.

Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors. That is slow
and multiplies bfloat16 wrongly, so tests have them run on few programs and in other dtypes there.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import testing
from mmkernels._core import registry, triton_runtime, tuning
from mmkernels.attention.interval import IntervalMask

HAS_GPU = torch.cuda.is_available()
# What serves every dtype and head dim; the CUDA kernels' own tests are test_cuda_*.py.
ALL = tuple(
    backend.name for backend in registry.backends("attention_forward") if backend.name != "cuda"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDENED = ("forward", "backward_keys", "backward_queries", "backward_bias")


def interpreted(*backends: str) -> bool:
    """Do the tests of these backends run in Triton's interpreter?"""
    return "triton" in backends and not HAS_GPU


def serves(backend: str, dtype: torch.dtype) -> bool:
    """Does a backend serve this dtype where its tests run?"""
    if backend != "triton":
        return True
    return dtype != torch.float64 and (HAS_GPU or dtype != torch.bfloat16)


def widest(backend: str) -> torch.dtype:
    """The dtype for comparing results closely."""
    return torch.float64 if serves(backend, torch.float64) else torch.float32


def short(dtype: torch.dtype) -> str:
    """The name of a dtype in a test's name."""
    return str(dtype).removeprefix("torch.")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For comparing two ways of computing what is of size 1, in float32 or float64."""
    if dtype == torch.float64:
        return {"atol": 1e-12, "rtol": 1e-10}
    return {"atol": 4e-6, "rtol": 4e-5}


def param(*values: Any, on: str | tuple[str, ...], **options: Any) -> Any:
    """`pytest.param` that is skipped where one of the backends `on` cannot run."""
    names = (on,) if isinstance(on, str) else on
    marks = [*options.pop("marks", ())]
    if interpreted(*names):
        marks.append(pytest.mark.interpreter)
    elif "triton" in names and (reason := triton_runtime.import_error()):
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(*values, marks=marks, **options)


def each(*names: str) -> pytest.MarkDecorator:
    """Parametrizes `backend`."""
    return pytest.mark.parametrize("backend", [param(name, on=name, id=name) for name in names])


def each_in(dtypes: Iterable[torch.dtype], *names: str) -> pytest.MarkDecorator:
    """Parametrizes `backend` and `dtype`, as far as they go together."""
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            param(name, dtype, on=name, id=f"{name}-{short(dtype)}")
            for name, dtype in itertools.product(names, dtypes)
            if serves(name, dtype)
        ],
    )


def moved(x: Any, device: str) -> Any:
    """x, or what is in a tuple, list or dict, on the device; gradients flow through."""
    if isinstance(x, Tensor | IntervalMask):
        return x.to(device)
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(moved(value, device) for value in x)
    return x


def call(function: Callable[..., Any], *args: Any, backend: str, **options: Any) -> Any:
    """function(.., backend=backend) where that backend runs, with arguments and results here."""
    device = testing.device_for(backend)
    got = function(*moved(args, device), backend=backend, **moved(options, device))
    return moved(got, "cpu")


@contextlib.contextmanager
def wide_tiles(block: int) -> Iterator[None]:
    """Tiles of `block` rows and keys in the interpreter.

    Every program and every pass of a loop costs the same there, whatever its tile.
    """
    config = tuning.Config(BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1)
    with contextlib.ExitStack() as stack:
        for kernel in WIDENED if not HAS_GPU else ():
            stack.enter_context(tuning.override(kernel, config))
        yield
