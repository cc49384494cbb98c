"""Attention of models that call torch's `scaled_dot_product_attention`, as timm's do.

    import torch
    from mmkernels.integrations.sdpa import sdpa_override

    model = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
    with sdpa_override():
        out = model(torch.randn(2, 10, 64))

The model stays as it is, and calls torch's own again after the block.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mmkernels._core import registry
from mmkernels.attention.api import scaled_dot_product_attention

__all__ = ["sdpa_override"]


class sdpa_override(TorchFunctionMode):
    """Runs this thread's `scaled_dot_product_attention` on mmkernels, as a context manager.

    It sees every call, however the model imported the function, and those that
    `nn.MultiheadAttention` makes (with `need_weights=False`; the weights come from other code).

    Args:
        backend: as for `mmkernels.attention`; "auto" leaves the choice as it is outside.

    Raises:
        ValueError: there is no such backend.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        registry.requested(backend)  # a wrong name is refused here
        self.backend = backend

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Exchanges two functions; every other runs as it is."""
        if func is F.scaled_dot_product_attention:
            return self._run(scaled_dot_product_attention, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._run(_multi_head_attention_forward, args, kwargs)
        return func(*args, **(kwargs or {}))

    def _run(self, func: Callable, args: tuple, kwargs: dict[str, Any] | None) -> Any:
        if self.backend == "auto":
            return func(*args, **(kwargs or {}))
        with registry.use_backend(self.backend):
            return func(*args, **(kwargs or {}))


def _copy_with_names(function: Any, **names: object) -> FunctionType:
    """A copy of a Python function that finds `names` where it looked for its module's."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# torch turns the mode off while it runs the body of this Python function, so the body gets ours by
# name. It makes the weights in other code, and uses no backend for that.
_multi_head_attention_forward = _copy_with_names(
    F.multi_head_attention_forward, scaled_dot_product_attention=scaled_dot_product_attention
)
