"""When values, and not just shapes and dtypes, can be checked."""

import os

import torch
from torch import Tensor

ALWAYS = os.environ.get("MMKERNELS_CHECK") == "1"


def readable(*tensors: Tensor | None) -> bool:
    """True where reading the tensors' values is possible and synchronises no device.

    On the CPU always, on a GPU only with MMKERNELS_CHECK=1, never while tracing or in torch.func.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        tensor is None
        or (
            type(tensor) in (Tensor, torch.nn.Parameter) and (tensor.device.type == "cpu" or ALWAYS)
        )
        for tensor in tensors
    )


def captured(device: torch.device) -> bool:
    """True while a CUDA graph records what happens there: its memory is the graph's own."""
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )
