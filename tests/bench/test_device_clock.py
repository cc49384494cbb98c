"""What the clock of a GPU asks of torch.cuda, answered by a made-up one."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from mmkernels.bench import clock

DEVICE = torch.device("cuda")


class FakeGpu:
    """Stands in for torch.cuda: every event recorded is `seconds` after the one before it."""

    def __init__(self, monkeypatch, seconds: float) -> None:
        self.log: list[str] = []
        ticks = itertools.count()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(event) -> None:
                self.log.append("record")
                event.at = 1e3 * seconds * next(ticks)

            def synchronize(event) -> None:
                self.log.append("wait")

            def elapsed_time(event, other) -> float:
                return other.at - event.at

        fake = {
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
            "Event": Event,
            "synchronize": lambda: self.log.append("synchronize"),
            "_sleep": lambda cycles: self.log.append(f"sleep {cycles > 0}"),
        }
        for name, value in fake.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(clock, "WARM_UP", 0.0)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, **k))
        self.clock = clock.of(DEVICE)

    def ready(self, wall: bool = False) -> clock.Timed:
        timed = self.clock.ready(lambda: self.log.append("call"), wall)
        self.log.clear()
        return timed


def test_a_long_call_is_timed_by_events_while_the_gpu_is_kept_busy(monkeypatch):
    gpu = FakeGpu(monkeypatch, seconds=0.003)
    timed = gpu.ready()
    assert timed.sample() == pytest.approx(0.003)
    assert gpu.log == ["sleep True", "record", "call", "record", "wait"]
    assert (timed.timer, timed.launch) == ("events", None)


def test_of_a_short_call_the_launch_is_told(monkeypatch):
    gpu = FakeGpu(monkeypatch, seconds=40e-6)
    timed = gpu.ready()
    assert timed.sample() == pytest.approx(40e-6)
    assert gpu.log == ["sleep True", "record", "call", "record", "wait"]
    assert timed.timer == "events" and timed.launch > 0


def test_a_launch_that_takes_long_is_not_repeated_for_long(monkeypatch):
    gpu = FakeGpu(monkeypatch, seconds=0.003)
    monkeypatch.setattr(clock, "LONGEST_LAUNCH", 1e-4)
    calls = []
    gpu.clock.ready(lambda: (calls.append(1), time.sleep(0.003)))
    assert len(calls) < 10


def test_the_wall_clock_has_the_launches_in_it(monkeypatch):
    gpu = FakeGpu(monkeypatch, seconds=40e-6)
    timed = gpu.ready(wall=True)
    timed.sample()
    assert gpu.log == ["synchronize", "record", "call", "record", "wait"]
    assert timed.timer == "wall"
