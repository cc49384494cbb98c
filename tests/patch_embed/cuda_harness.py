"""`patch_embed/cuda.py` without a GPU: its ops run by the emulator of PTX."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from mmkernels.patch_embed import cuda
from mmkernels.patch_embed.build import build
from tests.cuda_harness import SHORT, launchers, on_device
from tests.patch_embed.cases import Case, normal


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class PatchForward(ctypes.Structure):
    """The struct of csrc/patch_embed/forward.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "pixels weight bias scale pos prefix out"),
        *_fields(ctypes.c_int64, "stride_xb stride_xc stride_xh"),
        *_fields(ctypes.c_int64, "stride_weight stride_pos"),
        *_fields(ctypes.c_int64, "stride_prefix_b stride_prefix_p"),
        *_fields(ctypes.c_int32, "batch channels row dim grid_h grid_w step_h step_w prefix_rows"),
        *_fields(ctypes.c_int32, "pos_first pos_stride parts processors"),
        *_fields(ctypes.c_bool, "bytes bias_float pos_float prefix_float pos_prefix"),
    )


class PatchWeight(ctypes.Structure):
    """The struct of csrc/patch_embed/weight.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "dout pixels scale partial dweight"),
        *_fields(ctypes.c_int64, "stride_xb stride_xc stride_xh"),
        *_fields(ctypes.c_int32, "batch channels row dim grid_h grid_w step_h step_w prefix_rows"),
        *_fields(ctypes.c_int32, "splits"),
        *_fields(ctypes.c_bool, "bytes"),
    )


class Ops:
    """Stands in for torch.ops.mmkernels_cuda, on CPU tensors; `results` is what was counted.

    For sm_90a it takes the Hopper kernel where csrc/patch_embed/forward_op.cpp does.
    """

    def __init__(self, arch: str, seed: int, processors: int) -> None:
        self.arch, self.seed, self.processors = arch, seed, processors
        self.results: list[Any] = []

    def patch_embed_forward(
        self, pixels: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None,
        prefix: Tensor | None, scale: Tensor | None, out: Tensor, step_h: int, step_w: int,
        pos_first: int, pos_stride: int, pos_prefix: bool,
    ) -> None:  # fmt: skip
        p = PatchForward(
            dim=len(weight), stride_weight=weight.stride(0), pos_first=pos_first,
            pos_stride=pos_stride, pos_prefix=pos_prefix, processors=self.processors,
            parts=1 if scale is None else len(scale), stride_pos=_stride(pos, 0),
            stride_prefix_b=0 if prefix is None or len(prefix) == 1 else prefix.stride(0),
            stride_prefix_p=_stride(prefix, 1), bias_float=_is_float(bias),
            pos_float=_is_float(pos), prefix_float=_is_float(prefix),
            prefix_rows=0 if prefix is None else prefix.shape[1],
            **_grid(pixels, weight, step_h, step_w),
        )  # fmt: skip
        tensors = {"pixels": pixels, "weight": weight, "bias": bias, "scale": scale, "pos": pos}
        patch, arch = weight.shape[2], self.arch
        hopper = arch == "sm_90a" and p.stride_weight % 8 == 0 and (patch == 16 or not p.bytes)
        self._run(
            "hopper_forward" if hopper else "forward", "forward_sm90" if hopper else "forward",
            patch, weight.dtype, p, tensors | {"prefix": prefix, "out": out},
        )  # fmt: skip

    def patch_embed_weight(
        self, dout: Tensor, pixels: Tensor, scale: Tensor | None, partial: Tensor,
        dweight: Tensor, step_h: int, step_w: int,
    ) -> None:  # fmt: skip
        grid = _grid(pixels, dweight, step_h, step_w)
        samples = max(grid["batch"], 1)
        rows = len(dout) // samples - grid["grid_h"] * grid["grid_w"]
        p = PatchWeight(dim=len(dweight), prefix_rows=rows, splits=len(partial), **grid)
        tensors = {"dout": dout, "pixels": pixels, "scale": scale, "partial": partial}
        tensors["dweight"] = dweight
        self._run("weight", "weight", dweight.shape[2], dout.dtype, p, tensors)

    def _run(
        self, source: str, launcher: str, patch: int, dtype: torch.dtype, p: ctypes.Structure,
        tensors: dict[str, Tensor | None],
    ) -> None:  # fmt: skip
        given = {name: x for name, x in tensors.items() if x is not None}
        for name, x in given.items():
            setattr(p, name, x.data_ptr())
        instance = f"{patch}_{SHORT[dtype]}"
        status, results = launchers(f"{source}_{instance}", self.arch, "patch_embed").run(
            f"mmkernels_patch_{launcher}_{instance}", ctypes.byref(p), None,
            buffers=list(given.values()), check="report", seed=self.seed,
        )  # fmt: skip
        assert status == 0, f"the launcher returned {status}"
        for result in results:
            if result.issues:
                raise AssertionError("\n".join(issue["message"] for issue in result.issues))
        self.results += results


def _stride(x: Tensor | None, dim: int) -> int:
    return 0 if x is None else x.stride(dim)


def _is_float(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.float32


def _grid(pixels: Tensor, weight: Tensor, step_h: int, step_w: int) -> dict[str, Any]:
    batch, channels, height, width = pixels.shape
    patch, row = weight.shape[2:]
    return {
        "batch": batch,
        "channels": channels,
        "row": row,
        "grid_h": (height - patch) // step_h + 1,
        "grid_w": (width - row) // step_w + 1,
        "step_h": step_h,
        "step_w": step_w,
        "stride_xb": pixels.stride(0),
        "stride_xc": pixels.stride(1),
        "stride_xh": pixels.stride(2),
        "bytes": pixels.dtype == torch.uint8,
    }


@contextlib.contextmanager
def emulated(arch: str = "sm_80", seed: int = 0, processors: int = 4) -> Iterator[Ops]:
    """`cuda.forward` and `cuda.backward` run by the emulator, for a GPU of so many processors."""
    ops = Ops(arch, seed, processors)
    with (
        mock.patch.object(torch.ops, "mmkernels_cuda", ops, create=True),
        mock.patch.object(cuda, "_processors", lambda device: processors),
        mock.patch.object(cuda, "_reads_by_tma", lambda device: arch == "sm_90a"),
    ):
        yield ops


class Run(NamedTuple):
    """What a call made.

    Attributes:
        results: out and, named as the arguments are, all gradients.
        launches: what the emulator counted: forward, weight, reduction, for each tensor of pixels.
    """

    results: dict[str, Tensor]
    launches: list[Any]


def placed(x: Any) -> Any:
    """As on a GPU: what lies around a tensor may not be read. Strides other than dense are kept."""
    return on_device(x) if isinstance(x, Tensor) and x.is_contiguous() else x


def run(case: Case, backward: bool = True, **emulation: Any) -> Run:
    """out and gradients of a case as `Case.results` gives them; raises on what the emulator finds.

    Declines what `cuda.why_not` does.
    """
    case = Case(placed(case.pixels), {name: placed(x) for name, x in case.options.items()})
    call = build("patch_embed", [case.pixels], **case.options)
    assert (reason := cuda._call_why_not(call)) is None, reason
    with emulated(**emulation) as ops:
        out = cuda.forward(*call)
        results = {"out": out.view(len(case.pixels), -1 if len(out) else 0, out.shape[1])}
        if backward:
            leaves = {"pixels": case.pixels} | case.options
            tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
            floats = [name for name, x in tensors.items() if x.is_floating_point()]
            names = ("pixels", "weight", "bias", "pos_embed", "prefix_tokens")
            wanted = [*(name in floats for name in names), False]
            dout = placed(normal(*results["out"].shape, seed=99).to(out).flatten(0, 1))
            dpixels, *others = cuda.backward(dout, *call, wanted)
            found = dict(zip(names, (dpixels[0] if dpixels else None, *others), strict=False))
            results |= {f"d{n}": found[n].reshape(leaves[n].shape) for n in floats}
    return Run(results, ops.results)


def useful_flops(case: Case) -> int:
    """Of the product alone: two for each pixel of each patch and each value of a token."""
    weight, stride = (
        case.options["weight"],
        case.options.get("stride", case.options["weight"].shape[2]),
    )
    height, width = ((n - weight.shape[2]) // stride + 1 for n in case.pixels.shape[2:])
    return 2 * len(case.pixels) * height * width * math.prod(weight.shape)
