"""Modules of other libraries with another forward, changed and changed back in place.

A changed module keeps its parameters, buffers, hooks and attributes; only its class becomes a
subclass, as `torch.nn.utils.parametrize` does it. A forward bound to the instance instead would
stay bound to the original in a shallow copy, which is what `nn.DataParallel` replicates.
"""

import copyreg
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmkernels.integrations.sdpa import sdpa_override
from mmkernels.patch_embed.api import patch_embed


class Changed(nn.Module):
    """Base of a changed module's class.

    Attributes:
        original: the class before the change.
        forward_of: the class that brings the forward.
    """

    original: type[nn.Module]
    forward_of: type

    def _get_name(self) -> str:
        return f"{type(self).__name__} (mmkernels)"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A class made at run time has no name to be pickled by: the two it is made from have."""
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self.original, self.forward_of, *reduced[1][1:])
            reduced = (_rebuilt, arguments, *reduced[2:])
        return reduced


class PatchConvolution(_ConvNd):
    """The forward of a convolution whose steps cut patches: one product, by `mm.patch_embed`.

    Returns (B, D, *grid) as a view of (B, N, D), the layout of channels_last, so that the usual
    `flatten(2).transpose(1, 2)` copies nothing. What the operator would take and a convolution
    would not (bytes, another dtype), and what it does not (one image without a batch), goes to the
    convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, *size) to (B, D, *grid)."""
        if not self._is_served(input):
            return super().forward(input)
        weight, bias, size = self.weight, self.bias, input.shape[2:]
        if size == weight.shape[2:]:  # patches that are cut out, one a sample
            tokens = patch_embed(input.flatten(1), weight.flatten(1), bias)
            return tokens.view(*tokens.shape, *(1 for _ in size))
        tokens = patch_embed(input, weight, bias, stride=self.stride)
        grid = [
            (n - k) // s + 1 for n, k, s in zip(size, weight.shape[2:], self.stride, strict=True)
        ]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def _is_served(self, input: Tensor) -> bool:
        weight = self.weight
        autocast = torch.amp.is_autocast_available(weight.device.type)
        autocast = autocast and torch.is_autocast_enabled(weight.device.type)
        return (
            isinstance(input, Tensor)
            and type(weight) in (Tensor, nn.Parameter)  # no DTensor
            and input.ndim == weight.ndim
            and input.shape[1] == weight.shape[1]
            and input.is_floating_point()
            and (input.dtype == weight.dtype or autocast)
            and input.device == weight.device
            and all(n >= k for n, k in zip(input.shape[2:], weight.shape[2:], strict=True))
        )


class ScopedAttention(nn.Module):
    """A forward that runs as it is, with `scaled_dot_product_attention` exchanged meanwhile."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, on mmkernels."""
        with sdpa_override():
            return super().forward(*args, **kwargs)


def change(module: nn.Module, forward_of: type) -> None:
    """Gives module the forward of another class.

    Args:
        module: it, not changed yet.
        forward_of: `PatchConvolution`, `ScopedAttention`, or a subclass of module's class.
    """
    module.__class__ = _changed_class(type(module), forward_of)


def change_back(module: nn.Module) -> None:
    """Undoes `change`, if it was done."""
    if isinstance(module, Changed):
        module.__class__ = module.original  # type: ignore[assignment]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `change`."""
    return module.original if isinstance(module, Changed) else type(module)


def _changed_class(original: type[nn.Module], forward_of: type) -> type[nn.Module]:
    """The subclass for modules of a class; one for all of them, so that a graph serves them all."""
    key = original, forward_of
    if key not in _classes:
        bases = (forward_of,) if issubclass(forward_of, original) else (forward_of, original)
        names = {name: original.__dict__.get(name) for name in ("__module__", "__doc__")}
        names |= {"__qualname__": original.__qualname__, "original": original}
        made = type(original.__name__, (Changed, *bases), names | {"forward_of": forward_of})
        _classes.setdefault(key, made)
    return _classes[key]


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def _rebuilt(original: type[nn.Module], forward_of: type, *arguments: Any) -> nn.Module:
    kind: Any = _changed_class(original, forward_of)
    return kind.__new__(kind, *arguments)
