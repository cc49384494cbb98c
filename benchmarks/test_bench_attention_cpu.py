"""Attention on a CPU beside torch's, mask by mask; and how time and memory of a window grow."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import peers
from benchmarks.peers import MaskMod, Problem, Size
from benchmarks.timing import clock, interleaved, speedup, summary
from mmkernels import masks
from mmkernels.attention.interval import IntervalMask

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    # The compiler behind FlexAttention warns of what is its own affair.
    pytest.mark.filterwarnings("default:::torch"),
]

ROOT = Path(__file__).parents[1]
SIZE, QUICK_SIZE = Size(4096, 8, 128), Size(256, 2, 32)
PAIRS, QUICK_PAIRS = 7, 2
SHORT, SHORT_PAIRS = Size(256, 8, 64), 51
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WINDOW = 256
DOCUMENTS = 8


class Case(NamedTuple):
    """A mask of S rows, what it is to torch, and the speed-up over SDPA to reach.

    Attributes:
        mask: S -> the interval mask.
        peer: what SDPA is given instead.
        targets: forward, and forward + backward.
        mask_mod: S -> the mask in FlexAttention's form; None where SDPA is the better peer.
    """

    mask: Callable[[int], IntervalMask | None]
    peer: str
    targets: tuple[float, float]
    mask_mod: Callable[[int], MaskMod] | None = None


def documents(seqlen: int) -> IntervalMask:
    """Eight documents of equal length, each bidirectional."""
    return masks.packed(torch.arange(DOCUMENTS + 1) * (seqlen // DOCUMENTS))


def flex_prefix(seqlen: int) -> MaskMod:
    return lambda b, h, i, j: (j <= i) | (j < seqlen // 4)


def flex_window(seqlen: int) -> MaskMod:
    return lambda b, h, i, j: (j <= i) & (j > i - WINDOW)


def flex_documents(seqlen: int) -> MaskMod:
    return lambda b, h, i, j: i // (seqlen // DOCUMENTS) == j // (seqlen // DOCUMENTS)


CASES = {
    "full": Case(lambda s: None, "no mask", (0.95, 0.95)),
    "causal": Case(masks.causal, "is_causal", (0.95, 0.95)),
    "prefix-LM, prefix S/4": Case(
        lambda s: masks.prefix_lm(s // 4, s), "dense mask", (1.3, 1.3), flex_prefix
    ),
    "window 256": Case(
        lambda s: masks.window(s, window_size=(WINDOW - 1, 0)),
        "dense mask",
        (5.0, 4.5),
        flex_window,
    ),
    "8 packed documents": Case(documents, "dense mask", (5.0, 5.0), flex_documents),
}


@functools.lru_cache(maxsize=1)
def problem(mask: str, dtype: str, size: Size) -> Problem:
    return Problem(size, CASES[mask].mask(size.seqlen), DTYPES[dtype])


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", CASES)
def test_speed(benchmark, quick, mask, dtype, mode):
    size, pairs = (QUICK_SIZE, QUICK_PAIRS) if quick else (SIZE, PAIRS)
    target = CASES[mask].targets[mode != "forward"]
    with_flex = mode == "forward" and not quick and not peers.why_not_flex()
    measure(benchmark, "speed-up", mask, dtype, mode, size, pairs, target, with_flex)


@pytest.mark.parametrize("mask", CASES)
def test_short_sequences(benchmark, quick, mask):
    """Where cutting up a mask may cost more than it saves."""
    size, pairs = (QUICK_SIZE, QUICK_PAIRS) if quick else (SHORT, SHORT_PAIRS)
    measure(benchmark, "short", mask, "float32", "forward", size, pairs, None, False)


def measure(benchmark, kind, mask, dtype, mode, size, pairs, target, with_flex):
    """Checks and times mmkernels and its peers, and hands all there is to say to the benchmark."""
    case, backward = CASES[mask], mode != "forward"
    this = problem(mask, dtype, size)
    dense = this.mask if case.peer == "dense mask" else None
    attentions = {
        "mmkernels": peers.ours(this.mask),
        "SDPA": peers.sdpa(this.dtype, dense, is_causal=case.peer == "is_causal"),
    }
    if case.mask_mod and with_flex:
        attentions["FlexAttention"] = peers.flex(case.mask_mod(size.seqlen), size)
    solvers = {name: this.solver(attention, backward) for name, attention in attentions.items()}
    errors = {name: this.check(name, solver()) for name, solver in solvers.items()}
    times = interleaved(solvers, pairs)
    ours = times.pop("mmkernels")
    benchmark.extra_info.update(
        kind=kind,
        mask=mask,
        dtype=dtype,
        mode=mode,
        shape=str(size),
        sdpa_given=case.peer,
        target=target,
        max_error=errors,
        ours=summary(ours),
        peers={name: {**summary(peer), **speedup(ours, peer)} for name, peer in times.items()},
    )
    clock.replay(benchmark, ours)


def test_growth_of_a_window(benchmark, quick):
    """Twice the sequence takes twice the time and memory; a dense mask alone four times."""
    size, pairs = (QUICK_SIZE, QUICK_PAIRS) if quick else (SIZE, PAIRS)
    short = size._replace(seqlen=2048 if quick else 32768)
    long = short._replace(seqlen=2 * short.seqlen)
    memory = {str(s): memory_of_a_fresh_process(s) for s in (short, long)}
    solvers = {}
    for s in (short, long):
        mask = masks.window(s.seqlen, window_size=(WINDOW - 1, 0))
        solvers[str(s)] = Problem(s, mask, torch.float32).solver(peers.ours(mask), backward=False)
    times = interleaved(solvers, pairs)
    added = [m["after"] - m["before"] for m in memory.values()]
    benchmark.extra_info.update(
        kind="growth",
        mask="window 256",
        dtype="float32",
        mode="forward",
        target=2.3,
        time_ratio=speedup(*times.values())["ratio"],
        memory_ratio=added[1] / added[0],
        dense_mask_bytes={str(s): s.seqlen**2 for s in (short, long)},
        memory_bytes=memory,
        times={name: summary(t) for name, t in times.items()},
    )
    clock.replay(benchmark, times[str(long)])


def memory_of_a_fresh_process(size: Size) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.peak_memory", *map(str, size), str(WINDOW)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
