"""Clocks: seconds of a call on a CPU or a GPU, and calls that take turns on one of them."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from mmkernels.bench.case import SEED

# A sample shorter than this holds more of the clock than of the call: it repeats the call.
SHORTEST_SAMPLE = 1e-3
# Below this, what a GPU takes is less than what launching may cost, which is then told.
LAUNCH_BOUND = 50e-6
LAUNCHES = 20
# To keep a GPU busy for a second: more cycles than it has; and no longer than any operation needs.
CYCLES, LONGEST_LAUNCH = 2.5e9, 5e-3


class Turns(NamedTuple):
    """How often each implementation runs.

    Attributes:
        least: samples of each.
        most: likewise.
        seconds: of an implementation, between those two.
    """

    least: int
    most: int
    seconds: float


# On a GPU warmed up for as long before the first sample.
FULL, QUICK = Turns(7, 50, 0.8), Turns(5, 30, 0.1)
WARM_UP = 0.025


class Timed(NamedTuple):
    """A call made ready for the clock.

    Attributes:
        sample: takes one sample: seconds of one call.
        estimate: seconds that a sample costs in all, with repeats and preparation.
        timer: what was timed: "host", "events" of the device alone, or "wall", with the launches.
        launch: seconds that the host needs to launch a call; None where that is no matter.
    """

    sample: Callable[[], float]
    estimate: float
    timer: str
    launch: float | None


class Clock(Protocol):
    """Times calls on one device."""

    def ready(self, call: Callable[[], object], wall: bool = False) -> Timed:
        """Warms a call up and decides how it is timed.

        Args:
            call: to time.
            wall: with what the host needs to launch it.
        """

    def synchronize(self) -> None:
        """Waits for all that was launched."""


class HostClock:
    """For a CPU: the wall clock."""

    def ready(self, call: Callable[[], object], wall: bool = False) -> Timed:
        """Repeats calls that are too short for the clock."""

        def seconds(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return time.perf_counter() - start

        seconds(1)
        repeats = 1
        while (estimate := seconds(repeats)) < SHORTEST_SAMPLE:
            repeats *= 2
        return Timed(lambda: seconds(repeats) / repeats, estimate, "host", None)

    def synchronize(self) -> None:
        """Nothing: a call returns when it is done."""


class DeviceClock:
    """For a GPU: events around a call.

    Before every sample the L2 cache is overwritten, and the GPU kept busy while the host launches,
    so that the time between the events is the device's alone; with `wall` it is not kept busy.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def synchronize(self) -> None:
        """Waits for all that was launched."""
        torch.cuda.synchronize()

    def ready(self, call: Callable[[], object], wall: bool = False) -> Timed:
        """Warms up, and measures what a launch costs."""
        self.synchronize()
        began, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - began < WARM_UP:
            call()
            self.synchronize()
            calls += 1
        launch = self._launch(call)
        cycles = 0 if wall else int(CYCLES * min(launch, LONGEST_LAUNCH))

        def sample() -> float:
            self._flush.zero_()
            if cycles:
                torch.cuda._sleep(cycles)
            else:
                self.synchronize()
            return self._between(call)

        sample()
        start = time.perf_counter()
        seconds = sample()
        estimate = time.perf_counter() - start
        told = wall or seconds < LAUNCH_BOUND
        return Timed(sample, estimate, "wall" if wall else "events", launch if told else None)

    def _launch(self, call: Callable[[], object]) -> float:
        start, calls = time.perf_counter(), 0
        while calls < LAUNCHES and time.perf_counter() - start < LAUNCHES * LONGEST_LAUNCH:
            call()
            calls += 1
        seconds = (time.perf_counter() - start) / calls
        self.synchronize()
        return seconds

    def _between(self, call: Callable[[], object]) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def of(device: torch.device) -> Clock:
    """The clock of a device.

    Raises:
        ValueError: it is neither a CPU nor a CUDA (or ROCm) device.
    """
    if device.type == "cpu":
        return HostClock()
    if device.type == "cuda":
        return DeviceClock(device)
    raise ValueError(f"device is {device}; benchmarks run on cpu and cuda devices")


def take_turns(timed: Mapping[str, Timed], turns: Turns) -> dict[str, list[float | None]]:
    """Seconds of every implementation by round; None in rounds without it.

    What slows the machine down for a while then slows all of them, and leaves their ratios alone.
    The order is another one in every round: whoever always follows the same neighbour finds the
    caches and the threads as that one leaves them. A slow one takes part in fewer rounds, spread
    over all of them.
    """
    counts = {
        name: min(turns.most, max(turns.least, int(turns.seconds / max(one.estimate, 1e-9))))
        for name, one in timed.items()
    }
    rounds = max(counts.values())
    times: dict[str, list[float | None]] = {name: [] for name in timed}
    order, shuffle = list(timed.items()), random.Random(SEED).shuffle
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            shuffle(order)
            for name, one in order:
                count = counts[name]
                due = (index + 1) * count // rounds > index * count // rounds
                times[name].append(one.sample() if due else None)
    finally:
        if was_enabled:
            gc.enable()
    return times


def summary(times: Sequence[float | None]) -> dict[str, object]:
    """Median and interquartile range in seconds, with the times that they come from."""
    taken = [x for x in times if x is not None]
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {"median_s": statistics.median(taken), "iqr_s": high - low, "times_s": taken}


def speedup(ours: Sequence[float | None], peer: Sequence[float | None]) -> dict[str, float]:
    """How often faster than the peer: by the medians, and the median of each round's ratio."""
    pairs = [(a, b) for a, b in zip(ours, peer, strict=True) if a is not None and b is not None]
    mine = statistics.median(x for x in ours if x is not None)
    return {
        "ratio": statistics.median(x for x in peer if x is not None) / mine,
        "pairwise_ratio": statistics.median(b / a for a, b in pairs),
    }
