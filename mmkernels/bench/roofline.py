"""The ceilings of this machine, measured in the run that they are compared with."""

from collections.abc import Callable

import torch

from mmkernels.bench import clock
from mmkernels.bench.case import SEED
from mmkernels.bench.clock import Clock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Edge of the matrices and bytes of the copy: large enough that more changes nothing.
SIZES = {"cuda": (8192, 2**31), "cpu": (2048, 2**28)}
QUICK_SIZES = {"cuda": (8192, 2**31), "cpu": (256, 2**20)}
SAMPLES, QUICK_SAMPLES = 10, 3


def measure(device: torch.device, quick: bool) -> dict[str, dict[str, float]]:
    """{"matmul": FLOP/s by dtype, "copy": {"bytes": bytes/s, read and written}}.

    The best of several samples: a ceiling is what the machine can do when nothing disturbs it.
    """
    edge, size = (QUICK_SIZES if quick else SIZES)[device.type]
    samples = QUICK_SAMPLES if quick else SAMPLES
    clock_ = clock.of(device)
    copy = 2 * size / _best(_copy(size, device), clock_, samples)
    matmul = {}
    for dtype in DTYPES:
        seconds = _best(_product(edge, dtype, device), clock_, samples)
        matmul[str(dtype).removeprefix("torch.")] = 2 * edge**3 / seconds
    return {"matmul": matmul, "copy": {"bytes": copy}}


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(edge: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (edge, edge)
    a, b = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _best(call: Callable[[], object], clock_: Clock, samples: int) -> float:
    timed = clock_.ready(call)
    return min(timed.sample() for _ in range(samples))


def least_seconds(
    ceilings: dict[str, dict[str, float]], dtype: str, flops: float | None, moved: float | None
) -> float | None:
    """The time below which no implementation can stay at these ceilings.

    Args:
        ceilings: of `measure`.
        dtype: of the products.
        flops: asked for.
        moved: bytes that must move.

    Returns:
        Seconds, the longer of the two; None where nothing is known of either.
    """
    known = []
    if flops and dtype in ceilings["matmul"]:
        known.append(flops / ceilings["matmul"][dtype])
    if moved:
        known.append(moved / ceilings["copy"]["bytes"])
    return max(known, default=None)
