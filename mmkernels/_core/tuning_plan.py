"""What `python -m mmkernels tune` measures, what matters most first."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import Gpu
from mmkernels._core.tuning_choice import ATTENTION_KERNELS, Problem
from mmkernels._core.tuning_patch_cases import PATCH_STEPS
from mmkernels.patch_embed import triton_config

# A training step's attention before what is done once an image, and that before decoding.
KERNELS = (
    "forward", "backward_keys", "backward_queries", "patch_forward", "decode", "patch_weight",
    "backward_bias",
)  # fmt: skip


class Scope(NamedTuple):
    """What to tune.

    Attributes:
        kernels: some of KERNELS.
        head_dims: of attention.
        patches: of the patch embedding, sides out of PATCH_STEPS.
        dtypes: of q, k and v, and of the patch embedding's weight.
        bias: attention with a bias, too.
    """

    kernels: tuple[str, ...]
    head_dims: tuple[int, ...]
    patches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    bias: bool


def problems(scope: Scope, gpu: Gpu) -> list[Problem]:
    """Each once, in the order of KERNELS, then as the scope names its parts."""
    found: dict[str, Problem] = {}
    for kernel in (kernel for kernel in KERNELS if kernel in scope.kernels):
        made = _attention if kernel in ATTENTION_KERNELS else _patches
        for problem in made(kernel, scope, gpu):
            found.setdefault(problem.key(), problem)
    return list(found.values())


def _attention(kernel: str, scope: Scope, gpu: Gpu) -> Iterator[Problem]:
    for dim in scope.head_dims:
        for dtype in scope.dtypes:
            for masked in (False, True):
                for bias in (False, True) if scope.bias else (False,):
                    yield tuning.Problem(kernel, dim, dim, dtype, masked, bias)


def _patches(kernel: str, scope: Scope, gpu: Gpu) -> Iterator[Problem]:
    for patch in scope.patches:
        for dtype in scope.dtypes:
            for pixels in (dtype, torch.uint8):
                problem = triton_config.Problem(kernel, PATCH_STEPS[patch], pixels, dtype)
                if kernel == "patch_forward":
                    yield from triton_config.by_tile(problem, gpu)
                else:
                    yield problem
