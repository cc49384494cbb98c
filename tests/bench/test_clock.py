"""Do implementations take turns, and are the statistics what they are called?"""

import gc
import time

import pytest
import torch

from mmkernels.bench import clock
from mmkernels.bench.clock import HostClock, Timed, Turns


def timed(name: str, log: list[str], estimate: float) -> Timed:
    def sample() -> float:
        assert not gc.isenabled()
        log.append(name)
        return estimate

    return Timed(sample, estimate, "host", None)


def test_implementations_take_turns():
    log: list[str] = []
    times = clock.take_turns({n: timed(n, log, 0.1) for n in "ab"}, Turns(3, 9, 0.5))
    rounds = list(zip(log[::2], log[1::2], strict=True))
    assert set(rounds) == {("a", "b"), ("b", "a")}, "and not always in the same order"
    assert times == {"a": [0.1] * 5, "b": [0.1] * 5}
    assert gc.isenabled()


def test_a_slow_one_runs_in_fewer_rounds_that_are_spread_over_all():
    log: list[str] = []
    ones = {"fast": timed("fast", log, 0.1), "slow": timed("slow", log, 1.0)}
    times = clock.take_turns(ones, Turns(2, 8, 0.8))
    assert len(times["fast"]) == len(times["slow"]) == 8
    assert [index for index, x in enumerate(times["slow"]) if x is not None] == [3, 7]


def test_rounds_have_limits():
    log: list[str] = []
    assert len(clock.take_turns({"a": timed("a", log, 9.0)}, Turns(3, 8, 0.1))["a"]) == 3
    assert len(clock.take_turns({"a": timed("a", log, 1e-9)}, Turns(3, 8, 0.1))["a"]) == 8


def test_statistics():
    found = clock.summary([4.0, 1.0, None, 3.0, 2.0, 5.0])
    assert (found["median_s"], found["iqr_s"]) == (3.0, 2.0)
    assert found["times_s"] == [4.0, 1.0, 3.0, 2.0, 5.0]
    pairs = clock.speedup([1.0, 2.0, 4.0, 1.0], [2.0, 6.0, 4.0, None])
    assert pairs == {"ratio": 4.0 / 1.5, "pairwise_ratio": 2.0}


def test_a_call_shorter_than_a_sample_is_repeated():
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    one = HostClock().ready(call)
    before = calls
    seconds = one.sample()
    assert calls - before > 100
    assert 0 < seconds < 1e-4
    assert one.estimate >= clock.SHORTEST_SAMPLE


def test_a_long_call_is_timed_once_a_sample():
    calls = []
    one = HostClock().ready(lambda: (calls.append(1), time.sleep(0.002)))
    before = len(calls)
    assert 0.002 <= one.sample() < 0.1
    assert len(calls) == before + 1


def test_a_device_without_a_clock_is_refused():
    with pytest.raises(ValueError, match="device is meta; benchmarks run on cpu and cuda"):
        clock.of(torch.device("meta"))
