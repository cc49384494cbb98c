"""Do measured tables that ship serve after the user's own, before the built-in one, and say so?"""

import json
import shutil
import sys
import zipfile

import pytest
import torch

from mmkernels._core import tuning, tuning_choice, tuning_entries, tuning_store
from mmkernels._core.triton_runtime import KNOWN_GPUS
from mmkernels._core.tuning import Config, Problem
from tests.distributions import ROOT, run
from tools import tuning_table

H100 = KNOWN_GPUS["sm_90"]
PROBLEM = Problem("forward", 128, 128, torch.bfloat16, True)
OTHER = PROBLEM._replace(head_dim=64, value_dim=64)
OWN, SHIPPED, ASKED = Config(64, 64, 4, 2), Config(64, 128, 4, 2), Config(16, 16, 4, 1)
TOO_LARGE = Config(128, 128, 4, 4)


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """No tables but the built-in one, and a process that has read nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_store, "SHIPPED", tmp_path / "tuned")
    monkeypatch.delenv("MMKERNELS_TUNING", raising=False)
    tuning.forget()
    yield
    tuning.forget()


def entry(problem=PROBLEM, config=SHIPPED, **changes):
    made_with = {**tuning_entries.made_with(), "triton": "3.8.0", "torch": "2.14.1"}
    config = config._asdict()
    return {"problem": problem.key(), "config": config, "milliseconds": 2.0, **made_with, **changes}


def run_of(*entries, **changes):
    """What `tune --json` prints."""
    problems = {one["problem"]: {"best": one, "trials": []} for one in entries}
    return {"gpu": H100.name, "dry_run": False, "problems": problems, "not_reached": [], **changes}


def test_each_table_serves_before_the_next():
    built_in = PROBLEM.default(H100)
    assert tuning.configuration(PROBLEM, H100) == built_in != SHIPPED
    tuning_table.update(run_of(entry()))
    tuning.forget()
    assert tuning.configuration(PROBLEM, H100) == SHIPPED
    assert tuning.configuration(OTHER, H100) == OTHER.default(H100)
    tuning_store.merge(H100.name, [entry(config=OWN) | tuning_entries.made_with()])
    tuning.forget()
    assert tuning.configuration(PROBLEM, H100) == OWN
    with tuning.override("forward", ASKED):
        assert tuning.configuration(PROBLEM, H100) == ASKED


def test_what_ships_for_one_gpu_serves_no_other():
    tuning_table.update(run_of(entry()))
    other = KNOWN_GPUS["sm_100"]
    assert tuning.configuration(PROBLEM, other) == PROBLEM.default(other)


@pytest.mark.parametrize("changes", [{"triton": "2.0.0"}, {"kernels": "0123456789ab"}])
def test_a_measurement_of_other_kernels_serves_and_is_noted(changes, monkeypatch):
    now = {**tuning_entries.made_with(), "triton": "3.8.0"}
    monkeypatch.setattr(tuning_store, "made_with", lambda: now)
    tuning_table.update(run_of(entry(), entry(OTHER, **changes)))
    assert tuning.configuration(OTHER, H100) == SHIPPED
    assert tuning.note(H100).startswith("1 shipped configurations were measured with another")
    tuning_store.merge(H100.name, [entry(OTHER, OWN) | now])
    tuning.forget()
    assert tuning.note(H100) is None  # the user's own stands before it


def test_one_that_does_not_fit_is_passed_over_with_a_warning():
    tuning_table.update(run_of(entry(config=TOO_LARGE)))
    with pytest.warns(UserWarning, match=r"'forward D128.* does not fit NVIDIA H100.*tune"):
        assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)


def test_where_the_users_own_does_not_fit_the_shipped_one_serves():
    tuning_table.update(run_of(entry()))
    tuning_store.merge(H100.name, [entry(config=TOO_LARGE) | tuning_entries.made_with()])
    with pytest.warns(UserWarning, match="does not fit"):
        assert tuning.configuration(PROBLEM, H100) == SHIPPED


def test_tuning_switched_off_leaves_the_built_in_table(monkeypatch):
    tuning_table.update(run_of(entry()))
    monkeypatch.setenv("MMKERNELS_TUNING", "0")
    assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)


def test_a_broken_file_is_reported_with_the_fix():
    file = tuning_table.update(run_of(entry()))
    file.write_text('{"entries": [3]}')
    with pytest.warns(UserWarning, match="install mmkernels anew. Until then the built-in table"):
        assert tuning.configuration(PROBLEM, H100) == PROBLEM.default(H100)
    assert str(file) in tuning.note(H100)


def test_what_serves_is_said():
    assert tuning_choice.serving(H100) == "the built-in table of sm_90, never measured"
    file = tuning_table.update(run_of(entry(), entry(OTHER)))
    own = tuning_store.merge(H100.name, [entry() | tuning_entries.made_with()])
    tuning.forget()
    first, second, last = tuning_choice.serving(H100).split("; ")
    assert first == f"1 measured here, in {own}" and second == f"2 shipped, in {file}"
    assert last.startswith("the built-in table")


def test_an_update_keeps_other_problems_and_replaces_the_same():
    tuning_table.update(run_of(entry(), entry(OTHER)))
    file = tuning_table.update({"environment": {}, "tune": run_of(entry(config=OWN))})
    assert file.name == "nvidia-h100.json"
    table = json.loads(file.read_text())
    assert table == {"gpu": H100.name, "entries": [entry(config=OWN), entry(OTHER)]}


def test_a_problem_without_a_right_configuration_is_left_out():
    run = run_of(entry())
    run["problems"]["decode D64 Dv64 float16 masked"] = {"best": None, "trials": []}
    assert [one["problem"] for one in tuning_table.entries(run)[1]] == [PROBLEM.key()]


def without(name):
    return {key: value for key, value in entry().items() if key != name}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([], "of type list; wanted: the output of python -m mmkernels tune --json"),
        ({"tune": {"status": 1}}, "does not say 'dry_run': false; wanted: a run on a GPU"),
        (run_of(entry(), dry_run=True), "'dry_run': false"),
        (run_of(entry(), gpu=""), "'gpu' is ''; wanted: the name of a GPU"),
        (run_of(entry(), problems=[]), "'problems' is of type list"),
        (run_of(), "none of its problems has a right configuration"),
        (run_of(problems={"decode D64": {}}), "the problem 'decode D64' has no 'best'"),
        (run_of(problems={"decode D64": {"best": entry()}}), "has an entry of 'forward D128"),
        (
            run_of(entry() | {"problem": "sideways D64"}),
            "'sideways D64' is of no kernel; there are",
        ),
        (run_of(entry(config=Config(48, 64, 4, 2))), "has no config of BLOCK_M 16 to 256"),
        (run_of(entry(milliseconds=0)), "has 0 milliseconds, not a number above 0"),
        (run_of(without("milliseconds")), "has no milliseconds"),
        (run_of(without("triton")), "lacks triton; wanted: what it was measured with"),
    ],
)
def test_a_malformed_run_is_refused_and_nothing_is_written(run, message, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(run))
    assert tuning_table.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: ") and message in error and error.count("\n") == 1
    assert not tuning_store.SHIPPED.exists()


def test_the_command_prints_the_file_and_refuses_what_is_none(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_of(entry())))
    assert tuning_table.main([str(file)]) == 0
    assert capsys.readouterr().out == f"{tuning_store.shipped_path(H100.name)}\n"
    assert tuning_table.main([]) == 2 and "usage" in capsys.readouterr().err
    for content in ("{", None):
        file.write_text(content) if content else file.unlink()
        assert tuning_table.main([str(file)]) == 2
        assert str(file) in capsys.readouterr().err


def test_what_is_in_the_repository_is_in_order(monkeypatch):
    monkeypatch.undo()
    for file in tuning_store.SHIPPED.glob("*.json"):
        gpu = json.loads(file.read_text())["gpu"]
        assert file == tuning_store.shipped_path(gpu)
        found = tuning_entries.read(file)
        assert tuning_table.entries(run_of(*found)) == (H100.name, found)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a source tree")
def test_the_wheel_holds_the_tables(tmp_path):
    pytest.importorskip("setuptools", "77")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    core = tmp_path / "mmkernels" / "_core"
    (core / "tuned").mkdir(parents=True)
    shutil.copy(ROOT / "mmkernels" / "__init__.py", core.parent)
    (core / "__init__.py").touch()
    (core / "tuned" / "nvidia-h100.json").write_text("{}")
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    run(sys.executable, "-c", build, cwd=tmp_path, MMKERNELS_BUILD_CUDA="0")
    (archive,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        assert "mmkernels/_core/tuned/nvidia-h100.json" in wheel.namelist()
