"""`mm.replace(model)`: attention and patch embeddings of an existing model on mmkernels.

Modules are found by what they compute (`structure.py`) and changed in place (`forwards.py`); models
of transformers are switched by the setting that they read in every call.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmkernels.integrations import structure
from mmkernels.integrations.forwards import (
    Changed,
    Maker,
    change,
    change_back,
    multihead_attention,
    original_class,
    patch_convolution,
    scoped_attention,
)
from mmkernels.integrations.report import Entry, Kind, Report
from mmkernels.integrations.structure import Found, Seam
from mmkernels.integrations.switches import PREVIOUS, switch_back, switch_fast_path

_MAKERS: dict[Seam, Maker] = {
    Seam.MULTIHEAD: multihead_attention,
    Seam.SDPA: scoped_attention,
    Seam.PATCHES: patch_convolution,
}
_HOW = {
    Seam.MULTIHEAD: "as mmkernels.modules.MultiheadAttention, with need_weights=False",
    Seam.SDPA: "its calls of scaled_dot_product_attention",
    Seam.PATCHES: "patches by mmkernels.patch_embed",
}

_lock = threading.RLock()


def replace(model: nn.Module) -> Report:
    """Lets mmkernels compute the attention and the patch embeddings of a model, in place.

    Found are: models of transformers (4.57 and later) that use its attention interface,
    `torch.nn.MultiheadAttention`, modules that call torch's `scaled_dot_product_attention`, as
    those of timm and diffusers do, and convolutions that cut patches. Everything else stays, and
    the report says why.

    Parameters, state_dict, hooks, wrappers (PEFT, DDP), autocast, checkpointing, `torch.compile`,
    `copy.deepcopy` and pickling work as before; docs/models.md tells the exceptions. Doing it again
    changes nothing and reports the same. Threads may run the model meanwhile.

    Args:
        model: any module; all modules in it are looked at.

    Returns:
        What was swapped, what was left, and why.

    Raises:
        TypeError: model is no module, or compiled by TorchScript.
    """
    _check(model)
    with _lock:
        return Report(tuple(_entries(model)))


def restore(model: nn.Module) -> None:
    """Undoes `replace` in all modules of a model; what was not replaced stays as it is.

    Args:
        model: as for `replace`.

    Raises:
        TypeError: as there.
    """
    _check(model)
    with _lock:
        _restore(model.modules())


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[Report]:
    """`replace` for a block; at its end what it changed is changed back.

    Blocks of several threads with the same model may overlap: the last one ends it.

    Args:
        model: as for `replace`.

    Yields:
        What `replace` returns.

    Raises:
        TypeError: as there.
    """
    with _lock:
        _check(model)
        before = {id(module) for module in model.modules() if _is_replaced(module)}
        depth, outer = _blocks.get(model, (0, before))
        report = replace(model)
        _blocks[model] = depth + 1, outer
    try:
        yield report
    finally:
        with _lock:
            depth, outer = _blocks.pop(model)
            if depth > 1:
                _blocks[model] = depth - 1, outer
            else:
                _restore(module for module in model.modules() if id(module) not in outer)


# Model -> number of open `replaced` blocks, and what was replaced before the first of them.
_blocks: WeakKeyDictionary[nn.Module, tuple[int, set[int]]] = WeakKeyDictionary()


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"replace: model is {type(model).__name__}; it must be a torch.nn.Module, "
            "whose modules are changed in place"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "replace: model is compiled by TorchScript, which fixes its code; replace the module "
            "that it was made from, and use torch.compile or torch.export"
        )


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, Changed) or PREVIOUS in module.__dict__


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        change_back(module)
        switch_back(module)


def _entries(model: nn.Module) -> Iterator[Entry]:
    """Changes every module that can be, and tells of each."""
    found = list(structure.search(model))
    interface: dict[str, tuple[bool, str]] = {}
    if any(one.seam is Seam.INTERFACE for one in found):
        from mmkernels.integrations.switches import switch_interface

        interface = switch_interface(model, found)
    for one in found:
        if one.name in interface:
            swapped, reason = interface[one.name]
        else:
            why_left = _why_left(one)
            swapped, reason = why_left is None, why_left or _HOW[one.seam]
            if swapped and not isinstance(one.module, Changed):
                change(one.module, _MAKERS[one.seam])
        kind: Kind = "patch embedding" if one.seam is Seam.PATCHES else "attention"
        yield Entry(one.name, original_class(one.module).__name__, kind, swapped, reason)
    for module in model.modules():
        switch_fast_path(module)


def _why_left(one: Found) -> str | None:
    """Why a module cannot get another forward; None: it can."""
    module, seam = one.module, one.seam
    if isinstance(module, Changed):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which fixes its code"
    if isinstance(module, torch.fx.GraphModule):
        return "traced by torch.fx, which fixes its code"
    if "forward" in module.__dict__:
        return "something has bound another forward to it, as hooks of accelerate do"
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; replace before that, or after remove_parametrizations"
    if seam is Seam.PATCHES:
        return structure.why_no_patches(module)
    if seam is Seam.MULTIHEAD and type(module) is not nn.MultiheadAttention:
        return "a subclass of torch.nn.MultiheadAttention, which may have code of its own"
    if seam is Seam.MULTIHEAD and not one.weights_declined:
        return "not called with need_weights=False, so it forms the attention weights"
    if seam is Seam.NONE:
        return "computes softmax(q k^T) v itself, and calls no attention function"
    if seam is Seam.SDPA and (setting := structure.bypassed(one)):
        return f"its {setting}, so it calls no attention function"
    if elsewhere := structure.dispatched_elsewhere(one):
        return f"diffusers runs it on its attention backend {elsewhere!r}, not on 'native'"
    if seam is Seam.SDPA and one.implementation == "eager":
        return 'built with attn_implementation="eager"; load the model with "sdpa"'
    return None
