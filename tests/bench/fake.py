"""A problem that is quick to solve: the product of two matrices, rightly and wrongly."""

from collections.abc import Callable, Mapping

import torch

from mmkernels.bench.case import OURS, Call, Case, Results, Unavailable


class Product:
    """A matrix times itself. `fails`: how an implementation called `OURS` misbehaves."""

    flops, bytes = 2.0 * 64**3, 2.0 * 4 * 64**2

    def __init__(self, fails: str = "") -> None:
        self.a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        self.implementations: Mapping[str, Callable[[], Call]] = {
            OURS: self._prepare(
                {"wrong": self.wrong, "raises": self.raises}.get(fails, self.right)
            ),
            "float64": self._prepare(lambda: (self.a.double() @ self.a.double()).float()),
            "wrong": self._prepare(self.wrong),
            "raises": self._prepare(self.raises),
            "absent": self.absent,
        }
        if fails == "absent":
            self.implementations = {OURS: self.absent}

    def right(self) -> torch.Tensor:
        return self.a @ self.a

    def wrong(self) -> torch.Tensor:
        return self.a @ self.a * 1.01

    def raises(self) -> torch.Tensor:
        raise RuntimeError("out of luck\nand more")

    def absent(self) -> Call:
        raise Unavailable("no such library")

    @staticmethod
    def _prepare(function: Callable[[], torch.Tensor]) -> Callable[[], Call]:
        return lambda: lambda: (function(),)

    def check(self, results: Results) -> float:
        error = float((results[0] - self.a.double() @ self.a.double()).abs().max())
        assert error < 1e-3, f"error {error}"
        return error


def case(fails: str = "", name: str = "a product") -> Case:
    """A case of it."""
    return Case("attention", name, "M64", "", torch.float32, "forward", lambda: Product(fails))
