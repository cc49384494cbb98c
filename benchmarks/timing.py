"""Times of functions that take turns, and the statistics that are published of them."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from pytest_benchmark.fixture import BenchmarkFixture


def interleaved(
    functions: Mapping[str, Callable[[], object]], pairs: int
) -> dict[str, list[float]]:
    """Seconds of each function, run in turns: A, B, A, B, ...

    What slows the machine down for a while then slows all of them, and leaves their ratios alone.
    One untimed round comes first.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    gc.collect()
    gc.disable()
    try:
        for _ in range(pairs):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def summary(times: Sequence[float]) -> dict[str, object]:
    """Median and interquartile range, with the times they come from."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_s": statistics.median(times), "iqr_s": high - low, "times_s": list(times)}


def speedup(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """How often faster than the peer: the ratio of medians, and the median of the pairs' ratios."""
    pairwise = [b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "ratio": statistics.median(peer) / statistics.median(ours),
        "pairwise_ratio": statistics.median(pairwise),
    }


class ReplayClock:
    """A pytest-benchmark timer that replays times which were measured in turns with a peer's."""

    __name__ = "replay"  # what pytest-benchmark writes down

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: BenchmarkFixture, times: Iterable[float]) -> None:
        """Makes `times` the rounds of a benchmark that has this clock as its timer."""
        times = list(times)
        steps = iter(times)

        def tick() -> None:
            self.now += next(steps)

        benchmark.pedantic(tick, rounds=len(times))


# For pytest.mark.benchmark(timer=clock).
clock = ReplayClock()
