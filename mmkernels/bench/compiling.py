"""torch.compile as a peer: whether it can run here, and what other cases left behind."""

import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from mmkernels.bench.case import Unavailable


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, compiled for sizes that stay as they are.

    Raises:
        Unavailable: the compiler behind it is missing.
    """
    if device.type == "cpu" and shutil.which("g++") is None:
        raise Unavailable("needs g++, which is not on PATH")
    return torch.compile(function, dynamic=False)


def forget() -> None:
    """Drops what other cases compiled, which counts towards a limit of torch's.

    To be called once a case, before anything of it is compiled: a function that is dropped compiles
    again at its next call, which would then be timed.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
