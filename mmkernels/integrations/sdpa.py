"""Attention of models that call torch's `scaled_dot_product_attention`, as timm's do.

    with sdpa_override():
        logits = model(images)

The model stays as it is, and calls torch's own again after the block.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import mmkernels as mm
from mmkernels._core import registry


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
        # torch turns the mode off while it runs the body of this Python function, so the body gets
        # ours by name.
        self._multi_head_attention = _copy_with_names(
            F.multi_head_attention_forward, scaled_dot_product_attention=self._attention
        )

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Exchanges two functions; every other runs as it is."""
        if func is F.scaled_dot_product_attention:
            func = self._attention
        elif func is F.multi_head_attention_forward:
            func = self._multi_head_attention
        return func(*args, **(kwargs or {}))

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.backend == "auto":
            return mm.scaled_dot_product_attention(*args, **kwargs)
        with mm.use_backend(self.backend):
            return mm.scaled_dot_product_attention(*args, **kwargs)


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
