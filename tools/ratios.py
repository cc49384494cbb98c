"""How much faster than a robust peer mmkernels is on this CPU: the noisy part of `bench-check`.

A time says as much of the machine's other work as of the code. The ratio to a peer that takes turns
with mmkernels in the same process does not, but for noise; how much that is on a machine, repeated
runs say. A baseline holds for the CPU and the torch that it was recorded with.

All run in one thread: where other processes have a core, several threads wait for the one that lost
its own, and a ratio says who was hit.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mmkernels.bench import clock, environment, measure, suites
from mmkernels.bench.case import OURS, Call, Case, Problem, Results

CPU = torch.device("cpu")
# Runs of a recording, and how often a case is measured before it counts as slower.
RUNS, TRIES = 7, 3
# A band is the largest deviation of a run from the median, times this, and no less than that.
MARGIN, LEAST_BAND = 1.5, 0.15
# Nothing is recorded whose band is wider: it would not fail where mmkernels takes twice as long.
MOST_BAND = 0.5
# Case of the suites, by what `str` gives -> the peer.
WATCHED = {
    "attention, SigLIP-so400m/14 384, B1 H16 S729 D72, full, float32, forward": "SDPA",
    "attention, Qwen2.5-7B, B1 H28/4 S1024 D128, causal, float32, forward": "SDPA (is_causal)",
    "attention, Qwen2.5-7B, B1 H28/4 S1024 D128, causal, float32, forward + backward":
        "SDPA (is_causal)",
    "attention, Qwen2.5-VL vision, B1 H16 S1568 D80, 3 packed images, float32, forward":
        "SDPA (dense mask)",
    "attention, SmolLM2-135M, batch of prompts, B4 H9/3 S512 D64, causal, left padding, float32, "
    "forward": "SDPA (dense mask)",
    "scaling, attention, B1 H2 S2048 D64, window 256, float32, forward": "SDPA (dense mask)",
    "decode, Llama-3-8B, paged, B4 H32/8 S512–2048 D128, float32, decode":
        "SDPA (pages gathered, dense mask)",
    "patches, ViT-B/16 224, B4 3×224×224 P16 D768, float32, forward": "F.conv2d",
    "patches, ViT-B/16 224, B4 3×224×224 uint8 P16 D768, float32, forward": "F.conv2d",
    "patches, ViT-B/16 224, B4 3×224×224 P16 D768, float32, forward + backward": "F.conv2d",
    "modules, MultiheadAttention, ViT-B/16 224, B4 S197 E768 H12, float32, forward":
        "nn.MultiheadAttention",
    "overhead, attention, B1 H4 S16 D32, full, float32, forward": "SDPA",
    "overhead, attention, B1 H4 S16 D32, full, float32, forward + backward": "SDPA",
    "overhead, attention_with_kvcache, B1 H4/4 S16 D32, float32, decode": "SDPA",
    "overhead, patch_embed, B1 3×16×16 P16 D32, float32, forward": "F.conv2d",
}  # fmt: skip


class Watched(NamedTuple):
    """A case of mmkernels and one peer."""

    case: Case
    peer: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A problem of which mmkernels and one peer alone take part."""

    problem: Problem
    peer: str
    flops: None = None
    bytes: None = None

    @property
    def implementations(self) -> Mapping[str, Callable[[], Call]]:
        """Both of them."""
        return {name: self.problem.implementations[name] for name in (OURS, self.peer)}

    def check(self, results: Results) -> float:
        """As the whole problem does."""
        return self.problem.check(results)


def beside(case: Case, peer: str) -> Watched:
    """The case with that peer alone; its inputs and what is right are made once, for all runs."""
    make = functools.cache(lambda: Pair(case.make(), peer))
    return Watched(dataclasses.replace(case, make=make), peer)


class Baseline(NamedTuple):
    """What repeated runs of a case gave.

    Attributes:
        peer: what mmkernels was compared with.
        runs: the ratio of each run, above 1 where mmkernels is the faster one.
    """

    peer: str
    runs: Sequence[float]

    @property
    def ratio(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    @property
    def band(self) -> float:
        """The share by which a ratio may differ from the median without saying anything."""
        largest = max(abs(run / self.ratio - 1) for run in self.runs)
        return max(LEAST_BAND, MARGIN * largest)

    @property
    def floor(self) -> float:
        """Below this, mmkernels has become slower."""
        return self.ratio * (1 - self.band)

    @property
    def ceiling(self) -> float:
        """Above this, it has become faster."""
        return self.ratio * (1 + self.band)


def watched() -> dict[str, Watched]:
    """The cases of WATCHED, from the suites at their full size.

    Raises:
        ValueError: the suites have no such case.
    """
    names = dict.fromkeys(name.partition(",")[0] for name in WATCHED)
    cases = {str(case): case for case in suites.cases(list(names), CPU, False)}
    if gone := [name for name in WATCHED if name not in cases]:
        raise ValueError(
            f"tools/ratios.py watches {gone[0]!r}, which no suite has; "
            f"take another case of {', '.join(names)}"
        )
    return {name: beside(cases[name], peer) for name, peer in WATCHED.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes in this thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured(one: Watched) -> float:
    """The median ratio of the peer's time to that of mmkernels, over their turns.

    Raises:
        RuntimeError: a result is wrong, or the peer takes no part.
    """
    with one_thread():
        record = measure.measure(one.case, clock.of(CPU), CPU, clock.FULL)
    if wrong := record["failed"] or record["left_out"].get(one.peer):
        raise RuntimeError(f"{one.case}: {wrong}")
    return record["results"][one.peer]["pairwise_ratio"]


def best_of_tries(
    cases: Mapping[str, Watched], baselines: Mapping[str, Baseline], step: Callable[[str], None]
) -> dict[str, float]:
    """The ratio of each case; of those below their floor the best of TRIES, the others between."""
    best: dict[str, float] = {}
    pending = list(cases)
    for _ in range(TRIES):
        for name in pending:
            best[name] = max(best.get(name, 0.0), measured(cases[name]))
            step(name)
        pending = [name for name in pending if best[name] < baselines[name].floor]
    return best


def recorded(cases: Mapping[str, Watched], step: Callable[[str], None]) -> dict[str, Baseline]:
    """RUNS runs over all cases."""
    runs: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, one in cases.items():
            runs[name].append(round(measured(one), 4))
            step(name)
    return {name: Baseline(one.peer, runs[name]) for name, one in cases.items()}


def machine() -> tuple[str, dict[str, Any]]:
    """What a baseline is kept under, and the environment that is kept with it."""
    with one_thread():
        here = environment.describe(CPU, False, "make bench-check PARTS=ratios ACCEPT=1")
    return f"{here['cpu']}, {here['cpu_capability']}", here


def saved(baselines: Mapping[str, Baseline]) -> dict[str, dict[str, Any]]:
    """For JSON; ratio and band are there for readers and follow from the runs."""
    return {
        name: {"peer": one.peer, "ratio": round(one.ratio, 4), "band": round(one.band, 4),
               "runs": list(one.runs)}
        for name, one in baselines.items()
    }  # fmt: skip


def loaded(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Baseline]:
    """What `saved` gave."""
    return {name: Baseline(one["peer"], one["runs"]) for name, one in cases.items()}
