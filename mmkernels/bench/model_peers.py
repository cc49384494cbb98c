"""The other ways to run a model: copies of it that share its weights, each with its own attention.

A copy has modules and a config of its own, so changing one leaves the others as they were.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import mmkernels as mm
from mmkernels.bench.calls import imported
from mmkernels.bench.case import Unavailable


def on_gpu(model: nn.Module) -> bool:
    """Are its weights on a GPU?"""
    return next(model.parameters()).is_cuda


def with_same_weights(model: nn.Module) -> Any:
    """A copy of a model that has the same parameters and buffers in the same memory."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def replaced(model: nn.Module) -> Any:
    """A copy after `mm.replace`.

    Raises:
        RuntimeError: something in it was left, so that less than all would be measured.
    """
    ours = with_same_weights(model)
    report = mm.replace(ours)
    if report.left or not report.swapped:
        raise RuntimeError(f"not all of the model runs on mmkernels: {report}")
    return ours


def eager(model: nn.Module) -> Any:
    """A copy whose attention forms its weights: of transformers, or of timm."""
    plain = with_same_weights(model)
    if hasattr(plain, "set_attn_implementation"):
        plain.set_attn_implementation("eager")
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return plain


def flash_attention_2(model: nn.Module) -> Any:
    """A copy with the implementation of that name in transformers.

    Raises:
        Unavailable: it runs on other devices or dtypes only, is not installed, or the model is of
            another library.
    """
    if not on_gpu(model):
        raise Unavailable("runs on GPUs only")
    if next(model.parameters()).dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable("takes float16 and bfloat16 only")
    if not hasattr(model, "set_attn_implementation"):
        raise Unavailable("is an implementation of transformers; the model is of another library")
    imported("flash_attn")
    flash = with_same_weights(model)
    flash.set_attn_implementation("flash_attention_2")
    return flash


def liger(model: nn.Module) -> tuple[Any, Callable[[], Any]]:
    """A copy with Liger's norms, rotary embedding and MLPs, and the scope that a call of it needs.

    Liger exchanges names in the module that the model's class is from, which models of other
    implementations look up, too: they have Liger's within the scope only.

    Raises:
        Unavailable: Liger needs a GPU, is not installed, or knows none of the models in this one.
    """
    if not on_gpu(model):
        raise Unavailable("runs on GPUs only")
    known = imported("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN

    ours = with_same_weights(model)
    part = getattr(ours, "language_model", ours)
    apply = known.get(getattr(getattr(part, "config", None), "model_type", None))
    if apply is None:
        raise Unavailable(f"has nothing for a {type(part).__name__}")
    names = vars(sys.modules[type(part).__module__])
    before = dict(names)
    try:
        apply(model=part, fused_linear_cross_entropy=False)  # the loss is no part of these cases
    finally:
        changed = {name: value for name, value in names.items() if before.get(name) is not value}
        originals = {name: before[name] for name in changed if name in before}
        names.update(originals)

    @contextmanager
    def scope() -> Iterator[None]:
        names.update(changed)
        try:
            yield
        finally:
            names.update(originals)

    return ours, scope
