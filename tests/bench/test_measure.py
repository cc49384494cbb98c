"""Does a case's record hold what is right, leave out what is not, and say why?"""

import dataclasses

import pytest
import torch

from mmkernels.bench import clock, compiling, measure, memory
from mmkernels.bench.case import OURS
from tests.bench.fake import Product, case

CPU = torch.device("cpu")
TURNS = clock.Turns(least=3, most=3, seconds=0.0)


def record(fails: str = "") -> dict:
    return measure.measure(case(fails), clock.HostClock(), CPU, TURNS)


def test_a_record_says_all_that_a_report_needs():
    found = record()
    assert list(found["results"]) == [OURS, "float64"]
    assert (found["suite"], found["dtype"], found["mode"]) == ("attention", "float32", "forward")
    assert found["flops"] and found["bytes"] and found["failed"] is None
    for name, result in found["results"].items():
        assert len(result["times_s"]) == 3
        assert result["first_call_s"] > 0 and result["max_error"] < 1e-3
        assert (result["timer"], result["launch_s"]) == ("host", None)
        assert ("ratio" in result) == ("pairwise_ratio" in result) == (name != OURS)


def test_what_is_wrong_fails_or_is_absent_has_no_number_but_a_reason():
    left_out = record()["left_out"]
    assert left_out["raises"] == "RuntimeError: out of luck"
    assert left_out["absent"] == "no such library"
    assert left_out["wrong"].startswith("AssertionError: error ")


@pytest.mark.parametrize("fails", ["wrong", "raises"])
def test_where_ours_is_wrong_nothing_is_timed(fails):
    found = record(fails)
    assert found["results"] == {}
    assert found["failed"].startswith(("AssertionError", "RuntimeError"))


def test_a_problem_that_cannot_be_made_ends_no_run():
    def broken():
        raise MemoryError("too large")

    broken_case = dataclasses.replace(case(), make=broken)
    found = measure.measure(broken_case, clock.HostClock(), CPU, TURNS)
    assert found["failed"] == "MemoryError: too large"


def test_what_does_not_fit_into_memory_is_left_out_and_no_failure(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Product, "check", full)
    found = record()
    assert found["failed"] is None and found["results"] == {}
    assert found["left_out"][OURS] == "the check of its results does not fit into memory"
    large = dataclasses.replace(case(), make=full)
    found = measure.measure(large, clock.HostClock(), CPU, TURNS)
    assert found["failed"] is None
    assert found["left_out"] == {OURS: "its inputs do not fit into memory"}


def test_ours_that_needs_too_much_memory_fails(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(Product, "right", full)
    assert record()["failed"] == "OutOfMemoryError: tried to allocate 80 GiB"


@pytest.mark.parametrize("wall", [False, True])
def test_a_case_says_whether_launches_are_timed(monkeypatch, wall):
    asked = []
    ready = clock.HostClock.ready
    monkeypatch.setattr(clock.HostClock, "ready", lambda *a: asked.append(a[2]) or ready(*a))
    one = dataclasses.replace(case(), wall=wall)
    measure.measure(one, clock.HostClock(), CPU, TURNS)
    assert set(asked) == {wall}


def test_what_other_cases_compiled_is_dropped_once_a_case(monkeypatch):
    done = []
    monkeypatch.setattr(compiling, "forget", lambda: done.append("forget"))
    broken = dataclasses.replace(case(), make=lambda: done.append("make") or 1 / 0)
    measure.measure(broken, clock.HostClock(), CPU, TURNS)
    assert done == ["forget", "make"]


def test_peak_memory_is_of_the_call_alone():
    held = torch.zeros(1 << 20)

    def call():
        doubled = held * 2
        return (doubled + 1).sum()

    assert memory.peak_bytes(call, CPU) == pytest.approx(2 * held.nbytes, rel=0.01)
