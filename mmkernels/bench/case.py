"""What a benchmark measures: a case, its problem, and the implementations that solve it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SEED = 0
# The implementation whose ratios are published; others of ours begin with the same word.
OURS = "mmkernels"

Results = tuple[Tensor, ...]
# One call of an implementation.
Call = Callable[[], Results]


class Unavailable(Exception):
    """An implementation cannot take part here; says why in one line."""


class Problem(Protocol):
    """The inputs of a case, the implementations, and the check of what they return.

    Attributes:
        flops: floating point operations asked for, 2 a multiplication and addition, hidden pairs
            of a mask not counted; None: not what the case is about.
        bytes: the fewest bytes that must move: each input read once and each output written once;
            None: likewise.
        implementations: name -> a function that does what a model would do once (compile, build a
            mask, bring a weight into another format) and returns the call to time. It raises
            `Unavailable` where the implementation cannot take part. `OURS` comes first. In an
            optional bracket a name says what the peer is given: "SDPA (dense mask)".
    """

    flops: float | None
    bytes: float | None
    implementations: Mapping[str, Callable[[], Call]]

    def check(self, results: Results) -> float:
        """The largest absolute error of an implementation's results.

        Raises:
            AssertionError: it breaks the error rule of `mmkernels.testing`; says where.
        """


@dataclass(frozen=True)
class Case:
    """One row of a report, before it is measured.

    Attributes:
        suite: which it belongs to, such as "attention".
        name: the model that has this shape, and its input: "SigLIP-so400m/14 384".
        shape: the sizes, in the field's letters: "B1 H16 S729 D72".
        mask: of attention, such as "prefix-LM"; "" where there is none to speak of.
        dtype: of the inputs.
        mode: "forward", "backward", "decode", ...; never empty.
        make: builds the problem, its tensors on the device that the suite was asked for.
        scale: the size that the plot of a scaling has on its axis, such as S; None: not in a plot.
        wall: on a GPU, too, time what a user waits for, launches included: of whole models, and of
            calls that compute next to nothing.
    """

    suite: str
    name: str
    shape: str
    mask: str
    dtype: torch.dtype
    mode: str
    make: Callable[[], Problem]
    scale: int | None = None
    wall: bool = False

    @property
    def dtype_name(self) -> str:
        """Without the module: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        parts = (self.suite, self.name, self.shape, self.mask, self.dtype_name, self.mode)
        return ", ".join(filter(None, parts))
