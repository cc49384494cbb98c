"""Is a run's JSON whole, kept if the run is cut off, and honest about what was not reached?"""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest
from mmkernels.bench import environment, roofline, run, suites
from tests.bench.fake import case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "QUICK_SIZES", {"cpu": (32, 2**12)})


def measured(cases, **options) -> dict:
    return run.measured(cases, CPU, quick=True, command="a command", **options)


def test_a_run_holds_environment_ceilings_and_records():
    saved, steps = [], []
    cases = [case(name="one"), case("wrong", name="two")]
    data = measured(cases, save=lambda d: saved.append(json.dumps(d)), step=steps.append)
    assert data["schema"] == run.SCHEMA and data["finished"] and data["not_reached"] == []
    assert [r["failed"] is None for r in data["records"]] == [True, False]
    assert set(data["ceilings"]["matmul"]) == {"float32", "bfloat16", "float16"}
    assert data["ceilings"]["copy"]["bytes"] > 0
    told = data["environment"]
    assert {"device", "cpu", "threads", "torch", "commit", "date", "seed"} <= set(told)
    assert (told["command"], told["quick"], told["device_type"]) == ("a command", True, "cpu")
    assert steps == [str(c) for c in cases]
    first = json.loads(saved[0])
    assert (len(first["records"]), first["finished"]) == (1, False)
    assert first["not_reached"] == [str(cases[1])]


def test_no_case_is_begun_after_the_limit():
    data = measured([case(name="one"), case(name="two")], limit=0.0)
    assert not data["records"] and not data["finished"]
    assert len(data["not_reached"]) == 2


def test_the_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.json"
    run.write(path, {"a": 1})
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            run.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_compilers_begin_with_empty_caches(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with run.fresh_caches():
        inside = {name: os.environ[name] for name in run.CACHES}
        assert "kept" not in inside.values() and len(set(inside.values())) == 2
    assert os.environ["TRITON_CACHE_DIR"] == "kept"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_the_slower_of_two_ceilings_bounds_the_time():
    ceilings = {"matmul": {"bfloat16": 100.0}, "copy": {"bytes": 10.0}}
    assert roofline.least_seconds(ceilings, "bfloat16", 200.0, 50.0) == 5.0
    assert roofline.least_seconds(ceilings, "bfloat16", 800.0, 50.0) == 8.0
    assert roofline.least_seconds(ceilings, "uint8", 800.0, None) is None


def test_float32_is_ieee_in_a_run_and_then_as_before():
    cudnn, seen = torch.backends.cudnn, []

    def state():
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        measured([dataclasses.replace(case(), make=lambda: seen.append(state()))])
        assert seen == [("highest", False, True)]
        assert state() == ("high", True, False)
    finally:
        torch.set_float32_matmul_precision(before)


def test_pytest_measures_under_the_same_conditions(monkeypatch):
    monkeypatch.setattr(conftest, "Session", lambda *_: torch.backends.cudnn.allow_tf32)
    config = SimpleNamespace(
        invocation_params=SimpleNamespace(args=()), stash={}, getoption=lambda name: True
    )
    session = conftest.session.__wrapped__(config)
    assert next(session) is False
    session.close()
    assert torch.backends.cudnn.allow_tf32


def test_a_case_that_costs_the_gpu_its_context_is_kept(monkeypatch):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run.clock, "of", lambda device: None)
    monkeypatch.setattr(environment, "describe", lambda *_: {})
    monkeypatch.setattr(environment, "clocks", lambda *_: {})
    monkeypatch.setattr(roofline, "measure", lambda *_: {})
    monkeypatch.setattr(run.measure, "measure", lambda *_: {"failed": "lost"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    saved: list[str] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.measured(
            [case()], torch.device("cuda"), quick=True, command="",
            save=lambda data: saved.append(json.dumps(data)),
        )  # fmt: skip
    assert json.loads(saved[-1])["records"] == [{"failed": "lost"}]


def test_no_path_and_no_host_in_the_environment():
    told = json.dumps(environment.describe(CPU, True, "python -m mmkernels bench"))
    assert os.path.expanduser("~") not in told and os.uname().nodename not in told


def test_what_changes_the_choice_of_a_backend_is_told(monkeypatch):
    monkeypatch.setenv("MMKERNELS_BACKEND", "reference")
    told = environment.describe(CPU, True, "")["variables"]
    assert told["MMKERNELS_BACKEND"] == "reference"


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"suite is \['nosuch'\]; it must be of attention"):
        suites.cases(["nosuch"], CPU, True)
