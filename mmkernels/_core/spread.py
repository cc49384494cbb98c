"""Whether the sequence of the attention calls that are made now is spread over processes.

`distributed.context_parallel` sets it while it runs a model's modules; the public attention
functions then hand their arguments to it. Process-wide, like `use_backend`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """How such calls run.

    Attributes:
        seqlen: of the whole sequence.
        attention: takes the arguments of `mmkernels.attention`, all but q, k and v by name.
    """

    seqlen: int
    attention: Callable[..., Any]


active: Spread | None = None


def refuse(where: str, fix: str) -> None:
    """Raises where a function has no form for a spread sequence."""
    if active is not None:
        raise ValueError(
            f"{where}: called within context_parallel, where the sequence is spread over "
            f"processes; {fix}"
        )
