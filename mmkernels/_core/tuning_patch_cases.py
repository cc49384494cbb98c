"""What tuning the patch embedding runs: a call of an op, the reference's results beside it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import testing
from mmkernels._core import ops
from mmkernels._core.tuning_search import Case
from mmkernels.patch_embed.build import build
from mmkernels.patch_embed.triton_config import Problem

# By the side of a square patch: values of one step of its product.
PATCH_STEPS = {16: 64, 14: 32, 7: 16}
STATISTICS = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}


class Sizes(NamedTuple):
    """Of a call: samples, patches along an image's side, values of a token."""

    batch: int
    grid: int
    dim: int


# Timed: many turns of the largest tiles. Checked: more rows and values than the largest tile holds,
# and numbers of them that no tile divides.
TIMED, CHECKED = Sizes(256, 16, 768), Sizes(3, 9, 325)
# For a dry run.
TOY = {"timed": Sizes(1, 2, 40), "checked": Sizes(1, 3, 72)}


def make_case(
    problem: Problem,
    device: torch.device | str,
    *,
    timed: Sizes = TIMED,
    checked: Sizes = CHECKED,
) -> Case:
    """The case of a problem, with the usual sizes unless others are given."""
    large = _Call(problem, timed, device)
    # Also what a configuration serves besides: pixels that are normalised, tokens that are masked.
    small = [_Call(problem, checked, device), _Call(problem, checked, device, varied=True)]
    wanted = [(call, call.run("reference", torch.float64), call.eager()) for call in small]

    def verify() -> None:
        for call, exact, eager in wanted:
            testing.assert_accurate(call.name, call.run("triton", problem.dtype), exact, eager)

    return Case(problem, verify, lambda: large.run("triton", problem.dtype))


class _Call:
    """The inputs of the op that runs a problem's kernel, and the name of its result."""

    def __init__(
        self, problem: Problem, sizes: Sizes, device: torch.device | str, varied: bool = False
    ) -> None:
        batch, grid, dim = sizes
        side = next(side for side, step in PATCH_STEPS.items() if step == problem.step)
        self.forward = problem.kernel == "patch_forward"
        self.name = "out" if self.forward else "dweight"
        self.dtype = problem.dtype
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, problem.dtype)

        shape = (batch, 3, grid * side, grid * side)
        if problem.pixels == torch.uint8:
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            pixels = torch.randn(shape, generator=generator)
        self.pixels = pixels.to(device, problem.pixels)
        self.options: dict[str, Any] = {
            "weight": normal(dim, 3, side, side) / side,
            "bias": normal(dim),
            "pos_embed": normal(1 + grid**2, dim),
            "prefix_tokens": normal(1, dim),
        }
        if varied:
            mask = torch.rand((batch, grid**2), generator=generator) < 0.4
            masked = {"token_mask": mask.to(device), "mask_token": normal(dim)}
            self.options |= {**STATISTICS, **masked}
        self.dout = normal(batch * (1 + grid**2), dim)

    def run(self, backend: str, dtype: torch.dtype) -> Tensor:
        """The result of the op, from inputs cast to dtype; bytes stay bytes."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        pixels = self.pixels if dtype == self.dtype else cast(self.pixels)
        options = {name: cast(x) for name, x in self.options.items()}
        inputs = build("patch_embed", [pixels], **options)
        if self.forward:
            return ops.call("patch_embed_forward", *inputs, backend)
        wanted = [False, True, False, False, False, False]
        return ops.call("patch_embed_backward", cast(self.dout), *inputs, wanted, backend)[1]

    def eager(self) -> Tensor:
        """The same of eager PyTorch in the problem's dtype."""
        weight = self.options["weight"].clone().requires_grad_()
        out = testing.eager_patch_embed(self.pixels, **{**self.options, "weight": weight})
        out = out.flatten(0, 1)
        if self.forward:
            return out.detach()
        return torch.autograd.grad(out, weight, self.dout)[0].unsqueeze(2)  # (D, C, 1, side, side)
