"""Every case of the suites, as pytest-benchmark shows, stores and compares benchmarks.

All implementations of a case take turns, which pytest-benchmark does not know: they are measured
as in `python -m mmkernels bench`, and the times of mmkernels are its rounds. The whole record,
peers included, is the benchmark's `extra_info`.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from mmkernels.bench.case import OURS


class ReplayClock:
    """A timer that replays times which were measured in turns with those of peers."""

    __name__ = "replay"  # what pytest-benchmark writes down

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: BenchmarkFixture, times: list[float]) -> None:
        """Makes `times` the rounds of a benchmark that has this clock as its timer."""
        steps = iter(times)

        def tick() -> None:
            self.now += next(steps)

        benchmark.pedantic(tick, rounds=len(times))


clock = ReplayClock()


# A compiler behind a peer warns of what is its own affair.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=clock)
def test_case(benchmark, session, case):
    record = session.measured(case)
    assert record["failed"] is None, record["failed"]
    if OURS not in record["results"]:
        pytest.skip(record["left_out"][OURS])
    benchmark.group = f"{record['suite']}, {record['dtype']}, {record['mode']}"
    benchmark.extra_info.update(record)
    clock.replay(benchmark, record["results"][OURS]["times_s"])
