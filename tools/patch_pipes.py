"""`TRITON_INTERPRET=0 python -m tools.patch_pipes`: rewrites the patch embedding's pipes.

As `tools.pipes` does in docs/performance.md, for the kernels of `mmkernels/patch_embed`, with the
largest tiles of the table, which large batches get.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels._core import tuning
from tools.generated import replaced, table
from tools.pipes import PAGE, emulated, triton_version

BLOCK = "patch pipes"
HEADER = [
    "kernel", "embedding", "pixels", "useful share of MMA FLOPs", "issue ÷ tensor",
    "ceiling, TFLOP/s", "serial, TFLOP/s",
]  # fmt: skip
KERNELS = {"forward_kernel": "forward", "weight_kernel": "backward, dweight"}


class Case(NamedTuple):
    """An embedding of a model.

    Attributes:
        name: of the model.
        batch: samples.
        side: of the image.
        patch: of a patch.
        dim: values of a token.
        prefix: class tokens.
        pixels: dtype of the image.
    """

    name: str
    batch: int
    side: int
    patch: int
    dim: int
    prefix: int
    pixels: torch.dtype

    @property
    def flops(self) -> int:
        """2 for each value of a patch and of a token, in either pass."""
        tokens = (self.side // self.patch) ** 2
        return 2 * self.batch * tokens * 3 * self.patch**2 * self.dim

    def arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """Pixels, and all other arguments."""
        tokens = self.prefix + (self.side // self.patch) ** 2
        options: dict[str, Any] = {
            "weight": torch.zeros(self.dim, 3, self.patch, self.patch, dtype=torch.bfloat16),
            "bias": torch.zeros(self.dim, dtype=torch.bfloat16),
            "pos_embed": torch.zeros(tokens, self.dim, dtype=torch.bfloat16),
        }
        if self.prefix:
            options["prefix_tokens"] = torch.zeros(self.prefix, self.dim, dtype=torch.bfloat16)
        if self.pixels == torch.uint8:
            options |= {"pixel_mean": 0.5, "pixel_std": 0.5}
        return torch.zeros(self.batch, 3, self.side, self.side, dtype=self.pixels), options


CASES = [
    Case(*model, pixels)
    for model in (("ViT-B/16", 32, 224, 16, 768, 1), ("SigLIP-so400m/14", 7, 384, 14, 1152, 0))
    for pixels in (torch.bfloat16, torch.uint8)
]


def launches(case: Case, arch: str = "sm_90") -> list[Any]:
    """What the emulator counts of both passes of a case, as `tools.pipes.emulated` gives it."""
    from mmkernels.patch_embed import triton_config

    pixels, options = case.arguments()
    options["weight"].requires_grad_()
    largest = triton_config.TABLE[arch].forward[0]

    def call() -> None:
        with tuning.override("patch_forward", largest):
            out = mm.patch_embed(pixels, **options, backend="triton")
        out.backward(torch.zeros_like(out))

    return emulated(call, arch)


@functools.cache
def rows(case: Case) -> list[list[str]]:
    """The table's rows of a case: forward, and the weight's gradient."""
    lines = []
    for done in launches(case):
        if done.kernel in KERNELS:
            pipes = done.result.pipes(case.flops)
            ratio = pipes["issue slots"] / pipes["tensor cores (wgmma rate)"]
            share = pipes["useful share of MMA FLOPs"]
            rates = (f"{pipes[rate]:.0f}" for rate in ("ceiling, TFLOP/s", "serial, TFLOP/s"))
            dtype = str(case.pixels).removeprefix("torch.")
            lines.append(
                [KERNELS[done.kernel], case.name, dtype, f"{share:.2f}", f"{ratio:.2f}", *rates]
            )
    return lines


def block() -> str:
    """What stands between the comments."""
    batches = ", ".join(dict.fromkeys(f"{case.name} batch {case.batch}" for case in CASES))
    head = (
        f"bfloat16 weights, {batches}, the table's largest tiles for an H100, "
        f"{triton_version()}; counted in an emulator of its instructions, not measured on a GPU."
    )
    lines = [line for case in CASES for line in rows(case)]
    return f"{head}\n\n{table(HEADER, lines)}"


def main() -> None:
    """Rewrites the block in docs/performance.md."""
    PAGE.write_text(replaced(PAGE.read_text(), BLOCK, block()))


if __name__ == "__main__":
    main()
