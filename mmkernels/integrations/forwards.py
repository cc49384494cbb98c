"""Modules of other libraries with another forward, changed and changed back in place.

A changed module keeps its parameters, buffers, hooks and attributes; only its class becomes a
subclass, as `torch.nn.utils.parametrize` does it. A forward bound to the instance instead would
stay bound to the original in a shallow copy, which is what `nn.DataParallel` replicates.

Each maker below takes a module's class and returns the forward of its subclass. Such a forward may
outlive the change, looked up by another thread or kept by somebody's hook; then it is the original.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.sdpa import sdpa_override
from mmkernels.modules.attention import MultiheadAttention
from mmkernels.patch_embed.api import patch_embed

Maker = Callable[[Any], Callable[..., Any]]


class Changed(nn.Module):
    """Base of a changed module's class.

    Attributes:
        original: the class before the change.
        maker: what made the forward.
    """

    original: type[nn.Module]
    maker: Maker

    def _get_name(self) -> str:
        return f"{type(self).__name__} (mmkernels)"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """A class made at run time has no name to be pickled by: the two it is made from have."""
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self.original, type(self).maker, *reduced[1][1:])
            reduced = (_rebuilt, arguments, *reduced[2:])
        return reduced


def patch_convolution(original: type[nn.modules.conv._ConvNd]) -> Callable[..., Any]:
    """For a convolution whose steps cut patches: one product, by `mm.patch_embed`.

    It returns (B, D, *grid) as a view of (B, N, D), the layout of channels_last, so that the usual
    `flatten(2).transpose(1, 2)` copies nothing. What the operator would take and a convolution
    would not (bytes, another dtype), and what it does not (one image without a batch), goes to the
    convolution.
    """

    @functools.wraps(original.forward)
    def forward(self: nn.modules.conv._ConvNd, input: Tensor) -> Tensor:
        if not isinstance(self, Changed) or not _is_served(self.weight, input):
            return original.forward(self, input)
        weight, bias, size = self.weight, self.bias, input.shape[2:]
        if size == weight.shape[2:]:  # patches that are cut out, one a sample
            tokens = patch_embed(input.flatten(1), weight.flatten(1), bias)
            return tokens.view(*tokens.shape, *(1 for _ in size))
        tokens = patch_embed(input, weight, bias, stride=self.stride)
        grid = [
            (n - k) // s + 1 for n, k, s in zip(size, weight.shape[2:], self.stride, strict=True)
        ]
        return tokens.transpose(1, 2).unflatten(2, grid)

    return forward


def _is_served(weight: Tensor, input: Tensor) -> bool:
    autocast = torch.amp.is_autocast_available(weight.device.type)
    autocast = autocast and torch.is_autocast_enabled(weight.device.type)
    return (
        isinstance(input, Tensor)
        and type(weight) in (Tensor, nn.Parameter)  # no DTensor
        and input.layout == torch.strided
        and input.ndim == weight.ndim
        and input.shape[1] == weight.shape[1]
        and input.is_floating_point()
        and (
            input.dtype == weight.dtype
            # which does not cast these
            or (autocast and torch.float64 not in (input.dtype, weight.dtype))
        )
        and input.device == weight.device
        and all(n >= k for n, k in zip(input.shape[2:], weight.shape[2:], strict=True))
    )


def scoped_attention(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward itself, with `scaled_dot_product_attention` exchanged meanwhile."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Changed):
            return original.forward(self, *args, **kwargs)
        with sdpa_override():
            return original.forward(self, *args, **kwargs)

    return forward


def multihead_attention(original: type[nn.MultiheadAttention]) -> Callable[..., Any]:
    """The forward of `mm.modules.MultiheadAttention`."""

    @functools.wraps(original.forward)
    def forward(self: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        kind: Any = MultiheadAttention if isinstance(self, Changed) else original
        return kind.forward(self, *args, **kwargs)

    return forward


def change(module: nn.Module, maker: Maker) -> None:
    """Gives module the forward that one of the makers makes."""
    module.__class__ = _changed_class(type(module), maker)


def change_back(module: nn.Module) -> None:
    """Undoes `change`, if it was done."""
    if isinstance(module, Changed):
        module.__class__ = _without_change(type(module))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `change`."""
    return module.original if isinstance(module, Changed) else type(module)


def _changed_class(original: type[nn.Module], maker: Maker) -> type[nn.Module]:
    """The subclass for modules of a class; one for all of them, so that a graph serves them all."""
    key = original, maker
    if key not in _classes:
        names = {name: original.__dict__.get(name) for name in ("__module__", "__doc__")}
        names |= {"__qualname__": original.__qualname__, "original": original}
        names |= {"maker": staticmethod(maker), "forward": maker(original)}
        _classes.setdefault(key, type(original.__name__, (Changed, original), names))
    return _classes[key]


_classes: dict[tuple[type, Maker], type[nn.Module]] = {}


def _without_change(kind: Any) -> Any:
    """The class before the change; one that was put on top of it since, as FSDP does, made anew."""
    if Changed in kind.__bases__:
        return kind.original
    bases = tuple(_without_change(x) if issubclass(x, Changed) else x for x in kind.__bases__)
    return type(kind.__name__, bases, dict(kind.__dict__))


def _rebuilt(original: type[nn.Module], maker: Maker, *arguments: Any) -> nn.Module:
    kind: Any = _changed_class(original, maker)
    return kind.__new__(kind, *arguments)
