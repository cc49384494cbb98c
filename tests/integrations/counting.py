"""Counts the kernels that really run, whoever calls them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmkernels._core import registry
from mmkernels.patch_embed import flattened


class Calls:
    """The operations that ran since `kernel_calls` began, in all threads."""

    def __init__(self) -> None:
        self._ops: list[str] = []  # appending is atomic, counting up is not

    def note(self, op: str) -> None:
        self._ops.append(op)

    @property
    def by_op(self) -> dict[str, int]:
        return dict(Counter(self._ops))

    @property
    def attention(self) -> int:
        """Attention forwards, those on a KV cache among them."""
        return self._ops.count("attention_forward") + self._ops.count("attention_decode")

    @property
    def patch_embed(self) -> int:
        """Patch embedding forwards, the plain products of patches that are cut out among them."""
        return self._ops.count("patch_embed_forward") + self._ops.count("flattened")


@contextmanager
def kernel_calls() -> Iterator[Calls]:
    """Counts every backend function as it is run, not as it is chosen.

    A call with gradients may also ask for its backward backend in advance: that runs nothing.
    """
    calls, select, product = Calls(), registry.select, flattened.run

    def counting_select(op: str, name: str, inputs: tuple) -> Callable[..., Any]:
        chosen = select(op, name, inputs)

        def run(*arguments: Any) -> Any:
            calls.note(op)
            return chosen(*arguments)

        return run

    def counting_product(*arguments: Any) -> Any:  # the one way around the registry
        calls.note("flattened")
        return product(*arguments)

    registry.select, flattened.run = counting_select, counting_product
    try:
        yield calls
    finally:
        registry.select, flattened.run = select, product
