"""The CUDA sources without a GPU: launchers run in the emulator of PTX, kernels compiled by nvcc.

The emulator is found through MMKERNELS_PTXSIM.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels

ROOT = Path(mmkernels.__file__).parent.parent
CSRC = ROOT / "csrc"
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDTHS = {64: 64, 72: 80, 80: 80, 96: 96, 128: 128}  # head dim -> that of the kernel


@functools.cache
def ptxsim() -> Any:
    """The emulator."""
    if (folder := os.environ["MMKERNELS_PTXSIM"]) not in sys.path:
        sys.path.insert(0, folder)
    import ptxsim

    return ptxsim


@functools.cache
def launchers(name: str, arch: str = "sm_80", folder: str = "attention") -> Any:
    """A source of a folder of csrc, its launcher bound to the emulator."""
    text = b"".join(path.read_bytes() for path in sorted(CSRC.rglob("*.*")))
    # The emulator keeps what it built, by the command line and the sources beside this one.
    stamp = f"SOURCES_{hashlib.sha256(text).hexdigest()[:16]}"
    source = CSRC / folder / f"{name}.cu"
    lock = Path(tempfile.gettempdir()) / f"mmkernels_{folder}_{name}_{arch}_{stamp}.lock"
    with lock.open("w") as file:  # or another process loads what this one has half written
        fcntl.flock(file, fcntl.LOCK_EX)
        return ptxsim().build_host(source, arch, include=[CSRC], defines=[stamp])


def on_device(x: Tensor) -> Tensor:
    """A contiguous copy placed as on a GPU: aligned, and what lies around it may not be read."""
    return ptxsim().aligned(x)


STRIDED = ("heads first", "one head for all", "part of a wider tensor")


def strided(kind: str, x: Tensor) -> Tensor:
    """x (B, S, H, D) with other strides."""
    batch, length, heads, dim = x.shape
    if kind == "heads first":
        return on_device(x.transpose(1, 2)).transpose(1, 2)
    if kind == "one head for all":
        return on_device(x[:, :, :1]).expand(x.shape)
    wide = x.new_full((batch, length + 3, heads + 1, dim + 8), torch.nan)
    wide[:, 3:, 1:, 8:] = x
    return on_device(wide)[:, 3:, 1:, 8:]


# Each head dim in one dtype at least; the others are slow.
EVERY_WIDTH = pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        pytest.param(head_dim, dtype, marks=() if quick else pytest.mark.slow)
        for head_dim in WIDTHS
        for dtype in SHORT
        for quick in [(dtype == torch.float16) == (head_dim == 80)]
    ],
)


class AttentionForward(ctypes.Structure):
    """The struct of csrc/attention/forward.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "start", "end", "out", "lse", "redo")
        ),
        *(
            (f"stride_{name}", ctypes.c_int64)
            for name in (
                *("qb", "qs", "qh", "kb", "ks", "kh", "vb", "vs", "vh"),
                *("start_b", "start_s", "end_b", "end_s"),
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "seqlen_q", "seqlen_k", "heads", "kv_heads", "head_dim")
        ),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    *,
    arch: str = "sm_80",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Any]:
    """out, lse, and what the emulator counted; raises on whatever it found.

    sm_90a is the Hopper kernel, and behind it the portable one for the rows that it marked; without
    keys, or with a stride of 0, the portable one alone. csrc/attention/forward_op.cpp chooses so.

    Tensors lie where `on_device` or views of it put them.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    nan = float("nan")
    out = on_device(torch.full((batch, seqlen_q, heads, head_dim), nan, dtype=q.dtype))
    lse = on_device(torch.full((batch, heads, seqlen_q), nan))
    p = AttentionForward(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=k.shape[1], heads=heads, kv_heads=k.shape[2],
        head_dim=head_dim, softcap=softcap,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    if start is not None and end is not None:
        tensors |= {"start": start, "end": end}
    for name, x in tensors.items():
        setattr(p, name, x.data_ptr())
        dims = "bs" if name in ("start", "end") else "bsh" if name in "qkv" else ""
        separator = "_" if len(name) > 1 else ""
        for dim, letter in enumerate(dims):
            stride = 0 if x.shape[dim] == 1 else x.stride(dim)
            setattr(p, f"stride_{name}{separator}{letter}", stride)
    name = f"{WIDTHS[head_dim]}_{SHORT[q.dtype]}"
    if arch == "sm_90a" and not all(_boxable(x) for x in (q, k, v)):
        arch = "sm_90"
    if arch != "sm_90a" or k.shape[1] == 0:
        result = _launch(f"forward_{name}", f"forward_{name}", arch, p, tensors, seed)
        return out, lse, result
    if "start" in tensors:
        tensors["redo"] = on_device(torch.full((batch, heads, -(-seqlen_q // 16)), -1).int())
        p.redo = tensors["redo"].data_ptr()
    hopper = f"forward_sm90_{name}"
    result = _launch(f"hopper_forward_{name}", hopper, arch, p, tensors, seed)
    if "redo" in tensors:
        assert set(tensors["redo"].unique().tolist()) <= {0, 1}
        if tensors["redo"].any():
            assert not v.isfinite().all() or not k.isfinite().all(), "rows are marked without cause"
            _launch(f"forward_{name}", f"forward_{name}", "sm_90", p, tensors, seed)
    return out, lse, result


def _boxable(x: Tensor) -> bool:
    return all(n == 1 or step > 0 for n, step in zip(x.shape, x.stride(), strict=True))


def _launch(
    source: str,
    launcher: str,
    arch: str,
    p: ctypes.Structure,
    tensors: dict[str, Tensor],
    seed: int,
) -> Any:
    """What the emulator counted of a launch, None if there was nothing to launch."""
    status, results = launchers(source, arch).run(
        f"mmkernels_attention_{launcher}",
        ctypes.byref(p),
        None,
        buffers=list(tensors.values()),
        check="report",
        seed=seed,
    )
    assert status == 0, f"the launcher returned {status}"
    (result,) = results or [None]
    if result is not None and result.issues:
        raise AssertionError("\n".join(issue["message"] for issue in result.issues))
    return result
