"""Does `make bench-check` see what became slower, and nothing else?"""

import dataclasses
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from mmkernels._core import triton_runtime
from tests.bench import fake
from tools import bench_check, counters, ratios
from tools.bench_check import BASELINES, main
from tools.ratios import Baseline, Watched

CASE, KERNEL = "attention, sm_90", "forward_kernel"
COUNTS = dict.fromkeys(counters.COUNTERS.values(), 1000)
HERE = {"torch": "2.11"}


@pytest.fixture
def counted(monkeypatch):
    """What is counted here, by part; a test changes it."""
    now = {part: {CASE: {KERNEL: dict(COUNTS)}} for part in counters.PARTS}
    for part in counters.PARTS:
        made = counters.Part({CASE: lambda: []}, lambda p=part: f"{p} 2.0", lambda: None)
        monkeypatch.setitem(counters.PARTS, part, made)
    monkeypatch.setattr(counters, "missing", lambda part: None)
    monkeypatch.setattr(counters, "counted_all", lambda part, step: now[part])
    return now


@pytest.fixture
def folder(counted, tmp_path):
    """Baselines that hold what is counted here."""
    assert main(["counters", "--accept"], tmp_path) == 0
    return tmp_path


def test_equal_counts_pass(folder, capsys):
    capsys.readouterr()
    assert main(["counters"], folder) == 0
    text = capsys.readouterr().out
    assert "counters, CUDA: 1 cases, CUDA 2.0: no differences" in text
    assert "ACCEPT" not in text


@pytest.mark.parametrize("counter", COUNTS)
@pytest.mark.parametrize("change", [1, -1])
def test_one_more_or_less_fails_and_is_named(counter, change, counted, folder, capsys):
    counted["CUDA"][CASE][KERNEL][counter] += change
    assert main(["counters"], folder) == 1
    text = capsys.readouterr().out
    assert f"| {CASE} | {KERNEL} | {counter} | 1,000 | {1000 + change:,} |" in text
    assert "make bench-check ACCEPT=1" in text


def test_kernels_and_cases_that_came_or_went_fail(counted, folder, capsys):
    counted["CUDA"][CASE] = {"other_kernel": dict(COUNTS)}
    counted["Triton"]["another case"] = counted["Triton"].pop(CASE)
    assert main(["counters"], folder) == 1
    text = capsys.readouterr().out
    for row in (f"{CASE} | {KERNEL} | MMA FLOPs | 1,000 | –", "other_kernel | MMA FLOPs | – | 1,0"):
        assert row in text
    assert f"another case | {KERNEL} | sectors read | – | 1,000" in text


def test_another_compiler_is_not_compared(counted, folder, capsys, monkeypatch):
    counted["CUDA"][CASE][KERNEL]["MMA FLOPs"] += 1
    other = counters.PARTS["CUDA"]._replace(compiler=lambda: "CUDA 2.1")
    monkeypatch.setitem(counters.PARTS, "CUDA", other)
    assert main(["counters"], folder) == 0, "Triton's part is compared"
    assert "counted with CUDA 2.0, here CUDA 2.1: not compared" in capsys.readouterr().out


def test_nothing_compared_is_a_status_of_its_own(folder, capsys, monkeypatch):
    monkeypatch.setattr(counters, "missing", lambda part: f"no {part}")
    assert main(["counters"], folder) == 2
    assert "counters, Triton: not compared: no Triton" in capsys.readouterr().out


def test_a_part_that_cannot_be_counted_here_keeps_its_baseline(folder, monkeypatch):
    before = bench_check.load(folder / "counters.json")
    monkeypatch.setattr(counters, "missing", lambda part: "no" if part == "CUDA" else None)
    assert main(["counters", "--accept"], folder) == 0
    assert bench_check.load(folder / "counters.json") == before


def test_a_kernel_that_fails_is_red_and_the_other_part_still_runs(folder, capsys, monkeypatch):
    def counted_all(part, step):
        if part == "Triton":
            raise RuntimeError("attention, sm_90: out-of-bounds read")
        return {CASE: {KERNEL: COUNTS}}

    monkeypatch.setattr(counters, "counted_all", counted_all)
    before = (folder / "counters.json").read_text()
    assert main(["counters"], folder) == main(["counters", "--accept"], folder) == 1
    text = capsys.readouterr().out
    assert "out-of-bounds read" in text and "counters, CUDA: 1 cases" in text
    assert (folder / "counters.json").read_text() == before


def test_a_baseline_is_written_aside_and_renamed(counted, folder, monkeypatch):
    path, renamed = folder / "counters.json", []
    before = path.read_text()
    counted["CUDA"][CASE][KERNEL]["MMA FLOPs"] = 7

    def replace(source, target):
        assert path.read_text() == before, "written in place"
        renamed.append((source, target))
        os.rename(source, target)

    monkeypatch.setattr("mmkernels.bench.run.os.replace", replace)
    assert main(["counters", "--accept"], folder) == 0
    assert [target for _, target in renamed] == [path] * len(counters.PARTS)
    assert bench_check.load(path)["CUDA"]["cases"][CASE][KERNEL]["MMA FLOPs"] == 7
    assert main(["counters"], folder) == 0


def test_what_cannot_be_counted_says_why(monkeypatch, tmp_path):
    monkeypatch.delenv("MMKERNELS_PTXSIM", raising=False)
    assert counters.missing("CUDA").startswith("MMKERNELS_PTXSIM is not set")
    monkeypatch.setenv("MMKERNELS_PTXSIM", str(tmp_path))
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: True)
    assert "TRITON_INTERPRET=0" in counters.missing("Triton")
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: False)
    monkeypatch.setattr(triton_runtime, "import_error", lambda: "triton does not import")
    assert counters.missing("Triton") == "triton does not import"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert counters.missing("CUDA") == "nvcc is not on PATH"


def test_launches_of_one_kernel_are_kept_apart(monkeypatch):
    results = [dict.fromkeys(counters.COUNTERS, n) for n in (1, 2)]
    part = SimpleNamespace(cases={CASE: lambda: [("k_kernel", x) for x in results]})
    monkeypatch.setitem(counters.PARTS, "CUDA", part)
    counts = counters.counted("CUDA", CASE)
    assert {name: x["MMA FLOPs"] for name, x in counts.items()} == {"k_kernel": 1, "k_kernel 2": 2}


def committed_counts(part: str) -> dict:
    kept = bench_check.load(BASELINES / "counters.json")[part]
    if kept["compiler"] != (here := counters.PARTS[part].compiler()):
        pytest.skip(f"counted with {kept['compiler']}, here {here}")
    return kept["cases"]


@pytest.mark.parametrize("part", counters.PARTS)
def test_every_case_is_committed(part):
    kept = bench_check.load(BASELINES / "counters.json")[part]
    assert list(kept["cases"]) == list(counters.PARTS[part].cases)
    for counts in kept["cases"].values():
        assert all(list(one) == list(COUNTS) for one in counts.values())


@pytest.mark.compiled
@pytest.mark.ptxsim
def test_a_triton_kernel_counted_again_is_the_committed_one():
    case = "attention, sm_90, D64, causal"
    assert counters.counted("Triton", case) == committed_counts("Triton")[case]


@pytest.mark.nvcc
@pytest.mark.ptxsim
def test_a_cuda_kernel_counted_again_is_the_committed_one():
    case = "attention forward, sm_80, D80, causal"
    assert counters.counted("CUDA", case) == committed_counts("CUDA")[case]


# Median 1.5; the farthest run is 20 % away, so the band is 30 %: 1.05 to 1.95.
RUNS = (1.5, 1.2, 1.45, 1.55, 1.5, 1.5, 1.5)


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """measuring({"a": [ratios one after another], ...}): the status, and how often each ran."""
    monkeypatch.setattr(ratios, "WATCHED", {"a": "SDPA", "b": "F.conv2d"})
    monkeypatch.setattr(
        ratios, "watched", lambda: {a: Watched(a, peer) for a, peer in ratios.WATCHED.items()}
    )
    monkeypatch.setattr(ratios, "machine", lambda: ("this CPU", HERE))
    baselines = {name: Baseline(peer, RUNS) for name, peer in ratios.WATCHED.items()}
    entry = {"environment": HERE, "cases": ratios.saved(baselines)}
    (tmp_path / "ratios.json").write_text(json.dumps({"this CPU": entry}))

    def run(values, *arguments):
        left, calls = {name: iter(x) for name, x in values.items()}, []

        def measured(one):
            calls.append(one.case)
            return next(left[one.case])

        monkeypatch.setattr(ratios, "measured", measured)
        status = main(["ratios", *arguments], tmp_path)
        return status, [calls.count(name) for name in values]

    return run


def test_noise_within_the_band_passes(measuring, capsys):
    assert measuring({"a": [1.06], "b": [1.94]}) == (0, [1, 1])
    text = capsys.readouterr().out
    assert "| a | SDPA | 1.50 | ± 30% | 1.06 | as before |" in text
    assert "ACCEPT" not in text


def test_a_slowdown_fails_after_three_tries(measuring, capsys):
    assert measuring({"a": [1.04, 0.9, 1.0], "b": [1.5]}) == (1, [3, 1])
    text = capsys.readouterr().out
    assert "| a | SDPA | 1.50 | ± 30% | 1.04 | SLOWER in 3 of 3 tries |" in text
    assert "make bench-check ACCEPT=1" in text


@pytest.mark.parametrize("tries", [[1.0, 1.5], [1.0, 1.0, 1.06]])
def test_one_good_try_is_enough(tries, measuring):
    assert measuring({"a": tries, "b": [1.5]}) == (0, [len(tries), 1])


def test_a_faster_one_is_reported_and_no_failure(measuring, capsys):
    assert measuring({"a": [1.96], "b": [1.5]}) == (0, [1, 1])
    assert "faster than the baseline: ACCEPT=1 to keep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (("another CPU", HERE), "here is another CPU, torch 2.11; the baseline is of this CPU"),
        (("this CPU", {"torch": "2.12"}), "torch 2.12; the baseline is of this CPU, torch 2.11"),
    ],
)
def test_another_machine_or_torch_is_not_compared(machine, words, measuring, monkeypatch, capsys):
    monkeypatch.setattr(ratios, "machine", lambda: machine)
    assert measuring({"a": [], "b": []}) == (2, [0, 0])
    assert words in capsys.readouterr().out


def test_accepting_records_runs_and_keeps_other_machines(measuring, monkeypatch, tmp_path):
    monkeypatch.setattr(ratios, "machine", lambda: ("another CPU", HERE))
    values = {"a": itertools.cycle([2.0, 2.1]), "b": itertools.repeat(3.0)}
    assert measuring(values, "--accept") == (0, [ratios.RUNS] * 2)
    kept = bench_check.load(tmp_path / "ratios.json")
    assert list(kept) == ["this CPU", "another CPU"]
    a = kept["another CPU"]["cases"]["a"]
    assert a == {"peer": "SDPA", "ratio": 2.0, "band": 0.15, "runs": [2, 2.1, 2, 2.1, 2, 2.1, 2]}
    assert measuring({"a": [1.71], "b": [3.0]}) == (0, [1, 1])


def test_what_is_too_noisy_to_fail_is_not_recorded(measuring, tmp_path, capsys):
    before = (tmp_path / "ratios.json").read_text()
    values = {"a": itertools.cycle([2.0, 2.0, 2.0, 2.7]), "b": itertools.repeat(3.0)}
    assert measuring(values, "--accept") == (1, [ratios.RUNS] * 2)
    assert "not written: a band is above ± 50%" in capsys.readouterr().out
    assert (tmp_path / "ratios.json").read_text() == before


def test_a_baseline_of_other_cases_fails(measuring, monkeypatch, capsys):
    monkeypatch.setattr(ratios, "WATCHED", {"a": "eager", "b": "F.conv2d"})
    assert measuring({"a": [], "b": []}) == (1, [0, 0])
    assert "the baseline is of other cases" in capsys.readouterr().out


def test_what_cannot_be_measured_is_red(measuring, capsys):
    assert measuring({"a": [1.5], "b": []}) == (1, [1, 1])
    assert "ratios: StopIteration" in capsys.readouterr().out


def test_the_band_is_that_of_the_runs():
    assert Baseline("SDPA", RUNS).band == pytest.approx(0.3)
    assert Baseline("SDPA", (2.0, 2.0, 2.02)).band == ratios.LEAST_BAND
    baseline = Baseline("SDPA", RUNS)
    assert (baseline.floor, baseline.ceiling) == pytest.approx((1.05, 1.95))


def test_a_case_is_measured_beside_its_peer_alone():
    one = ratios.beside(fake.case(), "float64")
    assert list(one.case.make().implementations) == ["mmkernels", "float64"]
    assert ratios.measured(one) > 0
    for peer, words in (("wrong", "error"), ("absent", "no such library")):
        with pytest.raises(RuntimeError, match=words):
            ratios.measured(ratios.beside(fake.case(), peer))
    with pytest.raises(RuntimeError, match="error"):
        ratios.measured(ratios.beside(fake.case("wrong"), "float64"))


def test_inputs_are_made_once_for_all_runs_and_timed_in_one_thread(monkeypatch):
    made, threads = [], []

    def make():
        made.append(fake.Product())
        made[0].check = lambda results: threads.append(torch.get_num_threads()) or 0.0
        return made[0]

    torch.set_num_threads(2)
    try:
        one = ratios.beside(dataclasses.replace(fake.case(), make=make), "float64")
        assert ratios.measured(one) > 0 and ratios.measured(one) > 0
        assert torch.get_num_threads() == 2
        assert ratios.machine()[1]["threads"] == 1
    finally:
        torch.set_num_threads(1)
    assert len(made) == 1 and set(threads) == {1}


def test_a_watched_case_that_no_suite_has_is_named(monkeypatch):
    monkeypatch.setattr(ratios, "WATCHED", {"attention, no such model": "SDPA"})
    monkeypatch.setattr("mmkernels.bench.suites.cases", lambda *given: [fake.case()])
    with pytest.raises(ValueError, match="no such model"):
        ratios.watched()


def test_the_committed_bands_follow_from_their_runs():
    kept = bench_check.load(BASELINES / "ratios.json")
    if not kept:
        pytest.skip("no ratios are recorded yet; make bench-check PARTS=ratios ACCEPT=1")
    for entry in kept.values():
        baselines = ratios.loaded(entry["cases"])
        assert entry["cases"] == ratios.saved(baselines)
        assert all(len(one.runs) == ratios.RUNS for one in baselines.values())
        assert {name: one.peer for name, one in baselines.items()} == ratios.WATCHED


def test_every_watched_case_is_in_the_suites():
    assert ratios.watched().keys() == ratios.WATCHED.keys()
