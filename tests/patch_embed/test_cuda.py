"""What the CUDA patch embedding declines, and why. Nothing runs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels as mm
from mmkernels.patch_embed import cuda
from mmkernels.patch_embed.build import build

bf16, uint8 = torch.bfloat16, torch.uint8


def reason(
    pixels: Tensor | None = None, weight: tuple[int, ...] = (64, 3, 16, 16), dtype: Any = bf16,
    **options: Any,
) -> str | None:  # fmt: skip
    """Why the kernels decline a call, whatever the GPU."""
    x = torch.empty(2, 3, 32, 48, dtype=dtype) if pixels is None else pixels
    return cuda._call_why_not(
        build("patch_embed", [x], torch.empty(weight, dtype=dtype), **options)
    )


def image(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dtype": torch.float32}, "weight is float32; the CUDA kernels take float16 and bfloat16"),
        ({"weight": (64, 3, 8, 8)}, "patches are 1 x 8 x 8; the CUDA kernels take 1 x 14 x 14"),
        ({"weight": (64, 3, 16, 14)}, "patches are 1 x 16 x 14"),
        ({"weight": (60, 3, 16, 16)}, "embed_dim is 60; the CUDA kernels need a multiple of 8"),
        ({"pad": True}, "pad is True"),
        ({"pixels": image(2, 3, 32, 48, dtype=torch.float32)}, "pixels is torch.float32"),
        ({"pixel_mean": 0.5, "pixel_std": 0.5}, "the CUDA kernels normalise uint8 only"),
        ({"pixels": image(2, 3, 3, 32, 48), "weight": (64, 3, 1, 16, 16)}, "has 3 frames"),
        ({"pixels": image(2, 32, 48, 4).movedim(3, 1)[:, :3]}, "want channels first with a last"),
        (
            {
                "pixels": image(2, 32, 48, 3, dtype=uint8).movedim(3, 1),
                "pixel_mean": 0.5,
                "pixel_std": (0.4, 0.5, 0.6),
            },
            "pixel_std differs between channels",
        ),
        ({"pixels": image(2, 32, 44, 3).movedim(3, 1)[:, :, :, 1:]}, "start at multiples of 8"),
        ({"pixels": image(2, 3, 32, 44)}, "start at multiples of 8 values"),
        ({"pixels": image(2, 3, 32, 56, dtype=uint8)}, "start at multiples of 16 values"),
        ({"pixels": image(2, 3, 32, 49), "weight": (64, 3, 14, 14)}, "at multiples of 2 values"),
        ({"pixels": image(2, 3, 32, 56)[..., 4:]}, "start at multiples of 8 values"),
        ({"pos_embed": image(6, 64, dtype=torch.float64)}, "pos_embed is torch.float64"),
        ({"stride": 10}, "patches 10 apart"),
        (
            {"pos_embed": image(9, 64), "pos_index": torch.zeros(6, dtype=torch.int32)},
            "pos_index is given",
        ),
        (
            {"token_mask": torch.ones(6, dtype=torch.bool), "mask_token": image(64)},
            "token_mask is given",
        ),
    ],
)
def test_a_call_is_declined_for_what_it_asks(options, part):
    assert part in (reason(**options) or "")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"stride": 8},
        {"pixels": image(2, 3, 32, 48, dtype=uint8), "pixel_mean": 0.5, "pixel_std": 0.5},
        {"pixels": image(2, 32, 48, 3).movedim(3, 1)},
        {"pixels": image(2, 32, 49, 4, dtype=uint8).movedim(3, 1), "weight": (64, 4, 14, 14)},
        {"pixels": image(2, 1, 28, 30), "weight": (64, 1, 14, 14)},
        {"pixels": image(2, 3, 33, 64)[:, :, 1:, 16:-1]},
        {"pos_embed": image(6, 64), "prefix_tokens": image(1, 64)},
    ],
)
def test_a_call_is_served(options):
    assert reason(**options) is None


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_auto_passes_over_it_in_both_passes(monkeypatch):
    """Though it could serve the call."""
    monkeypatch.setattr(cuda.library, "load_error", lambda: None)
    monkeypatch.setattr(cuda, "_instance_why_not", lambda *_: None)
    with FakeTensorMode(), torch.device("cuda"):
        weight = torch.empty(64, 3, 16, 16, dtype=bf16, requires_grad=True)
        pixels = torch.empty(2, 3, 32, 48, dtype=bf16)
        explained = mm.explain(mm.patch_embed, pixels, weight)
        named = mm.explain(mm.patch_embed, pixels, weight, backend="cuda")
    assert explained.backward is not None and named.backend == "cuda"
    for one in (explained, explained.backward):
        assert one.backend != "cuda" and "not yet measured" in (one.reasons["cuda"] or "")


def test_cpu_tensors_are_declined():
    explained = mm.explain(mm.patch_embed, image(2, 3, 32, 48), image(64, 3, 16, 16))
    assert explained.reasons["cuda"] == "weight is on cpu; the CUDA kernels run on NVIDIA GPUs"
