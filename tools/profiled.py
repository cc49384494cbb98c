"""Launches each of our kernels once, for a profiler: ncu's counters, or the clock of torch's.

    ncu --profile-from-start off ... python -m tools.profiled
    python -m tools.profiled --clock

Every call is warmed up outside of what is profiled. It prints JSON: the cases in the order of their
launches and, with `--clock`, the time of each kernel.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench import roofline
from mmkernels.errors import BackendUnavailable
from tools.gpu.profile import BACKENDS, limiter_by_clock


class Launch(NamedTuple):
    """One call.

    Attributes:
        case: what it computes.
        backend: on which.
        prepare: makes its inputs; returns the call.
        flops: that it is asked for.
        bytes: that must move at least.
    """

    case: str
    backend: str
    prepare: Callable[[], Callable[[], object]]
    flops: float
    bytes: float


class Sizes(NamedTuple):
    """Of the calls' tensors, and where these lie.

    Attributes:
        batch: of attention, and of images.
        seqlen: of attention.
        heads: of attention; decode has four times as many.
        cached: keys of each sequence of decode.
        images: patch size, edge of an image, embed_dim.
        dtype: of all.
        device: of all.
    """

    batch: tuple[int, int]
    seqlen: int
    heads: int
    cached: int
    images: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    device: str


FULL = Sizes((4, 128), 4096, 16, 4096, ((16, 224, 768), (14, 384, 1152)), torch.bfloat16, "cuda")
# Triton's interpreter multiplies bfloat16 wrongly.
TOY = Sizes((1, 1), 40, 2, 40, ((16, 32, 32), (14, 28, 32)), torch.float16, "cpu")


def launches(sizes: Sizes, backend: str) -> Iterator[Launch]:
    """All of a backend, the most telling ones first."""
    for head_dim in (128, 64):
        for causal in (False, True):
            for backward in (False, True):
                yield attention(sizes, backend, head_dim, causal, backward)
    for patch, edge, dim in sizes.images:
        for backward in (False, True):
            yield patches(sizes, backend, patch, edge, dim, backward)
    if backend == "triton":
        yield decode(sizes)


def attention(s: Sizes, backend: str, head_dim: int, causal: bool, backward: bool) -> Launch:
    """A forward pass, or the backward pass behind one."""

    def prepare() -> Callable[[], object]:
        shape = (s.batch[0], s.seqlen, s.seqlen, s.heads, s.heads, head_dim)
        q, k, v = testing.make_qkv(*shape, dtype=s.dtype, device=s.device)
        leaves = [x.requires_grad_(backward) for x in (q, k, v)]
        return _pass(
            lambda: mm.attention(*leaves, causal=causal, backend=backend), leaves, backward
        )

    pairs = s.seqlen * (s.seqlen + 1) / 2 if causal else s.seqlen**2
    flops = 4 * s.batch[0] * s.heads * pairs * head_dim * (2.5 if backward else 1)
    tensors = 8 if backward else 4  # q, k, v, out; and their gradients
    moved = tensors * s.batch[0] * s.seqlen * s.heads * head_dim * s.dtype.itemsize
    name = f"attention {'backward' if backward else 'forward'}, D{head_dim}"
    return Launch(f"{name}, {'causal' if causal else 'full'}", backend, prepare, flops, moved)


def decode(s: Sizes) -> Launch:
    """One token a sequence, four query heads a key head."""
    sequences, kv_heads, head_dim = 8 * s.batch[0], s.heads, 128

    def prepare() -> Callable[[], object]:
        shape = (sequences, 1, s.cached, 4 * kv_heads, kv_heads, head_dim)
        q, k, v = testing.make_qkv(*shape, dtype=s.dtype, device=s.device)
        lengths = torch.full((sequences,), s.cached, dtype=torch.int32, device=s.device)
        return lambda: mm.attention_with_kvcache(q, k, v, cache_seqlens=lengths, backend="triton")

    keys = sequences * s.cached * kv_heads * head_dim
    return Launch("decode, D128", "triton", prepare, 16 * keys, 2 * keys * s.dtype.itemsize)


def patches(s: Sizes, backend: str, patch: int, edge: int, dim: int, backward: bool) -> Launch:
    """Tokens of images, or the gradient of the weight."""
    batch = s.batch[1]

    def prepare() -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((batch, 3, edge, edge), (dim, 3, patch, patch))
        pixels, weight = (
            torch.randn(shape, generator=generator).to(s.device, s.dtype) for shape in shapes
        )
        weight.requires_grad_(backward)
        return _pass(lambda: mm.patch_embed(pixels, weight, backend=backend), [weight], backward)

    tokens = batch * (edge // patch) ** 2
    moved = (batch * 3 * edge**2 + dim * 3 * patch**2 + tokens * dim) * s.dtype.itemsize
    name = f"patch embedding {'dweight' if backward else 'forward'}, P{patch}"
    return Launch(name, backend, prepare, 2 * tokens * dim * 3 * patch**2, moved)


def _pass(
    forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool
) -> Callable[[], object]:
    if not backward:
        return forward
    out = forward()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def counted(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Launches it where ncu counts; a kernel of torch's before it says where it begins."""
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return []


def clocked(call: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The kernels of a call and their microseconds; on a CPU, where there are none, our ops."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    return [
        {"kernel": event.name, "microseconds": event.time_range.elapsed_us()}
        for event in profiler.events()
        if (
            event.device_type == DeviceType.CUDA if on_gpu else event.name.startswith("mmkernels::")
        )
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        The exit code: 0; 1 if a call failed.
    """
    parser = argparse.ArgumentParser(description="Launch each of our kernels once.")
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--clock", action="store_true", help="time kernels by torch's profiler")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--limit", type=float, default=600, help="seconds; begin nothing after")
    arguments = parser.parse_args(argv)
    sizes, began = TOY if arguments.toy else FULL, time.monotonic()
    found: dict[str, Any] = {"cases": [], "left_out": {}, "not_reached": []}
    ceilings = None
    if arguments.clock:
        ceilings = roofline.measure(torch.device(sizes.device), quick=True)
        found |= {"ceilings": ceilings, "rows": []}
    failed = False
    for launch in launches(sizes, arguments.backend):
        of = {"case": launch.case, "backend": launch.backend}
        if time.monotonic() - began > arguments.limit:
            found["not_reached"].append(launch.case)
            continue
        try:
            call = launch.prepare()
            call()
            found["cases"].append(of)
            if ceilings is None:
                counted(call)
            else:
                rows = clocked(call, sizes.device)
                found["rows"] += [of | row | _limit(launch, rows, ceilings, sizes) for row in rows]
        except BackendUnavailable as error:
            found["left_out"][launch.case] = error.reasons[launch.backend]
        except KeyboardInterrupt:  # the time is out: what was launched is to be read
            failed, arguments.limit = True, -1.0
            found["not_reached"].append(launch.case)
        except Exception as error:  # kept; the other kernels are to be seen
            failed = True
            found["left_out"][launch.case] = f"{type(error).__name__}: {error}"
        print(launch.case, file=sys.stderr)
    print(json.dumps(found))
    return int(failed)


def _limit(
    launch: Launch, rows: list[dict[str, Any]], ceilings: dict[str, Any], sizes: Sizes
) -> dict[str, Any]:
    """The share of the ceiling that all kernels of a call reach together, and what that says."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    both = [(launch.flops, None), (None, launch.bytes)]
    by_flops, by_bytes = (roofline.least_seconds(ceilings, dtype, *one) or 0 for one in both)
    seconds = sum(row["microseconds"] for row in rows) / 1e6
    share = 100 * max(by_flops, by_bytes) / seconds if seconds else None
    return {"share": share, "limiter": limiter_by_clock(share, by_flops >= by_bytes)}


if __name__ == "__main__":
    sys.exit(main())
