"""`make gpu` where there is no GPU: what it refuses, shares out, keeps, and installs."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tools.gpu import __main__ as command
from tools.gpu import install, page, plan, verbs
from tools.gpu.process import ROOT, Done, Runner
from tools.gpu.record import Record
from tools.gpu.run import Run, limit, parsed

FACTS = {"dry_run": True, "total_seconds": 9, "environment": {"device": "cpu", "gpu": "none"}}


@pytest.fixture
def run(tmp_path) -> Run:
    record = Record(tmp_path / "out", FACTS)
    return Run(record, Runner(record.folder / "gpu.log"), dry=True)


def kept(run: Run) -> dict:
    return json.loads((run.record.folder / "gpu.json").read_text())


def statuses(run: Run) -> dict[str, str]:
    return {part["name"]: part["status"] for part in kept(run)["parts"]}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# The plan


def test_all_steps_are_there_and_end_within_nine_minutes():
    assert list(command.STEPS) == list(plan.SHARES)
    assert plan.TOTAL <= 9 * 60 - 20
    assert plan.DRY_TOTAL <= 5 * 60


def test_steps_are_chosen_by_name_with_commas_or_spaces():
    assert plan.chosen([]) == list(plan.SHARES)
    assert plan.chosen(["bench,tests"]) == plan.chosen(["bench", "tests"])
    assert plan.chosen(["bench,tests"]) == ["install", "tests", "bench"]
    with pytest.raises(ValueError, match="no step test; there are install, doctor, tests"):
        plan.chosen(["test"])


def test_time_that_a_step_leaves_is_the_next_ones_and_no_later_one_loses_its_share():
    clock = Clock()
    budget = plan.Budget(list(plan.SHARES), False, clock)
    shares = {step: seconds for step, (seconds, _) in plan.SHARES.items()}
    assert budget.allowed("install") == shares["install"]
    clock.now += 10
    assert budget.allowed("doctor") == shares["install"] - 10 + shares["doctor"]
    clock.now = 100 + shares["install"] + shares["doctor"] + shares["tests"] + 8  # overran
    assert budget.allowed("tune") == shares["tune"] - 8
    clock.now = 100 + plan.TOTAL - 30
    assert budget.allowed("sanitize") == 30
    clock.now = 100 + plan.TOTAL - 1
    assert budget.allowed("sanitize") == 0


def test_a_step_alone_has_the_whole_time():
    clock = Clock()
    budget = plan.Budget(["install", "bench"], False, clock)
    clock.now += 3
    assert budget.allowed("bench") == plan.TOTAL - 3


def test_a_step_that_would_begin_too_late_is_recorded_and_a_broken_one_ends_alone(run):
    clock, began = Clock(), []

    def slow(run: Run, seconds: float) -> None:
        began.append(seconds)
        clock.now += plan.DRY_TOTAL

    def broken(run: Run, seconds: float) -> None:
        raise RuntimeError("it broke")

    steps = {"install": broken, "doctor": slow, "sanitize": slow}
    budget = plan.Budget(list(steps), True, clock)
    command.execute(run, list(steps), budget, steps)
    assert began == [plan.DRY_TOTAL]
    assert statuses(run) == {"install": "failed", "sanitize": "not reached"}
    assert "RuntimeError: it broke" in (run.record.folder / "gpu.md").read_text()
    assert kept(run)["finished"]


def test_a_limit_leaves_time_for_what_has_begun():
    assert (limit(140), limit(30), limit(8.5)) == ("115", "15", "4")


# The command


def test_it_refuses_without_a_gpu_and_what_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["tests"], {}) == 1
    assert "torch sees no GPU: nothing is run; DRY_RUN=1" in capsys.readouterr().err
    assert command.main(["test"], {}) == 2
    assert "no step test; there are install" in capsys.readouterr().err
    assert command.main([], {"DRY_RUN": "yes"}) == 2
    assert "DRY_RUN is yes; it must be 1, or 0" in capsys.readouterr().err
    assert command.main([], {"DRY_RUN": "1", "OUT": __file__}) == 2
    assert "OUT must be a folder" in capsys.readouterr().err


def test_a_dry_run_writes_the_same_files_and_says_what_it_is(tmp_path):
    """The smallest one: what a GPU alone can do."""
    variables = {**os.environ, "DRY_RUN": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu", "sanitize"],
        capture_output=True, text=True, cwd=ROOT, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "sanitize: sanitize  not possible" in lines[0] and lines[0] == lines[-2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu.json", "gpu.log", "gpu.md",
    ]  # fmt: skip
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert data["dry_run"] and data["finished"] and data["steps"] == ["install", "sanitize"]
    assert data["environment"]["command"] == "make gpu DRY_RUN=1 sanitize"
    assert "DRY RUN" in (tmp_path / "out" / "gpu.md").read_text().splitlines()[0]


@pytest.mark.slow
def test_a_whole_dry_run(tmp_path):
    variables = {**os.environ, "DRY_RUN": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu"], capture_output=True, text=True, cwd=ROOT, env=variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert data["finished"]
    assert {part["step"] for part in data["parts"]} >= set(plan.SHARES) - {"install"}
    assert data["doctor"]["samples"] and data["tune"]["dry_run"] and data["bench"]["records"]
    assert data["profile"]["triton"]["rows"]
    assert any(part.get("passed") for part in data["parts"] if part["step"] == "tests")
    text = (tmp_path / "out" / "gpu.md").read_text()
    for title in ("Parts", "Doctor", "Tuned configurations", "Benchmarks", "What limits"):
        assert f"## {title}" in text
    assert "could not be read" not in text and "no JSON" not in text


# What is kept


def test_a_part_that_fails_or_hangs_is_kept(run):
    run.python("tests", "good", ["-c", "print('fine')"], 60)
    run.python("tests", "bad", ["-c", "raise SystemExit(3)"], 60)
    run.python("tests", "long", ["-c", "import time; print(1, flush=True); time.sleep(60)"], 2)
    assert statuses(run) == {"good": "passed", "bad": "failed", "long": "timed out"}
    assert [part["exit_code"] for part in kept(run)["parts"]][:2] == [0, 3]
    log = (run.record.folder / "gpu.log").read_text()
    assert "[good] fine\n" in log and "[long] 1\n" in log and "KeyboardInterrupt" in log
    assert "| tests | bad | failed | 0 s | exit code 3 |" in (
        (run.record.folder / "gpu.md").read_text()
    )


def test_what_ignores_an_interrupt_is_ended_with_all_that_it_started(run, monkeypatch):
    monkeypatch.setattr("tools.gpu.process.GRACE", 0.5)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    done = run.python("tests", "stubborn", ["-c", code], 1)
    assert time.monotonic() - began < 20
    assert done.timed_out and done.code == -signal.SIGKILL
    assert is_gone(int(done.stdout))


def test_what_begins_after_the_end_ends_at_once(run):
    run.runner.stop()
    done = run.python("tests", "late", ["-c", "import time; time.sleep(60)"], 60)
    assert done.code == -signal.SIGKILL and done.seconds < 20
    assert statuses(run) == {"late": "cut off"}


def is_gone(pid: int) -> bool:
    """Whether a process has ended, at most 5 seconds from now."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


# A run whose second step takes forever: it prints its process, and goes on.
ENDLESS = """
import signal, sys
from pathlib import Path
from tools.gpu import __main__ as command, plan
def quick(run, seconds):
    run.python("doctor", "quick", ["-c", "print('done')"], 60)
def endless(run, seconds):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    run.python("tests", "endless", ["-c", code], 60)
command.STEPS = dict.fromkeys(plan.SHARES, endless) | {"install": quick, "doctor": quick}
sys.exit(command.main([], {"DRY_RUN": "1", "OUT": sys.argv[1]}))
"""


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda how: how.name
)
def test_what_is_done_is_there_if_the_run_is_ended(how, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            log = (out / "gpu.log").read_text() if (out / "gpu.log").exists() else ""
            lines = [x for x in log.splitlines() if x.startswith("[endless] ") and "$" not in x]
            if lines:
                break
            time.sleep(0.1)
        process.send_signal(how)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    data = json.loads((out / "gpu.json").read_text())
    parts = {part["name"]: part["status"] for part in data["parts"]}
    assert parts.pop("quick") == "passed"
    text = (out / "gpu.md").read_text()
    assert "Not finished" in text and "| doctor | quick | passed |" in text
    if how == signal.SIGKILL:
        assert parts == {"endless": "running"}
        os.kill(int(lines[0].split()[1]), signal.SIGKILL)  # nobody is left to do it
        return
    assert process.returncode == 130
    assert parts.pop("endless") == "cut off"
    assert set(parts.values()) == {"not reached"} and "tests: endless" in printed
    assert is_gone(int(lines[0].split()[1]))


def test_folders_of_this_machine_are_not_kept(run):
    run.record.put(doctor={"python": f"at {Path.home()}/bin/python", "in": [str(ROOT / "x")]})
    assert kept(run)["doctor"] == {"python": "at ~/bin/python", "in": ["./x"]}


def test_a_home_that_is_the_root_changes_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/")
    record = Record(tmp_path / "out", {"dry_run": True, "environment": {"device": "cpu"}})
    assert record.anonymous("10 TFLOP/s") == "10 TFLOP/s"


def test_the_json_of_bench_is_kept_twice_and_names_no_folder(run, monkeypatch):
    path = run.record.folder / "bench.json"
    data = {"records": [], "environment": {"command": f"bench --json {path}"}}
    monkeypatch.setattr(Run, "python", lambda *_: path.write_text(json.dumps(data)))
    verbs.bench(run, 60)
    assert kept(run)["bench"] == json.loads(path.read_text())
    assert kept(run)["bench"]["environment"]["command"] == "bench --json OUT/bench.json"


def test_a_page_that_cannot_be_made_ends_nothing(run):
    run.record.put(tune={"problems": {"decode": {"best": None}}})
    text = (run.record.folder / "gpu.md").read_text()
    assert "This part of gpu.json could not be read: KeyError: 'trials'" in text


def test_json_that_is_none_is_said():
    assert parsed('{"a": 1}') == {"a": 1}
    assert parsed("Traceback")["problem"].startswith("no JSON")
    assert parsed("[1]") == {"problem": "not a JSON object"}


# The steps


def test_an_earlier_run_is_set_aside_and_not_taken_for_this_one(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    earlier = {"gpu.json": "{}", "gpu.log": "all", "bench.json": "{}", "bench.md": "an old table"}
    for name, text in earlier.items():
        (folder / name).write_text(text)
    (folder / "2026-11-29-abcdef0.json").write_text("published")
    run = Run(Record(folder, FACTS), Runner(folder / "gpu.log"), dry=True)
    (aside,) = folder.glob("earlier-*")
    assert {path.name: path.read_text() for path in aside.iterdir()} == earlier
    assert (folder / "2026-11-29-abcdef0.json").exists()
    monkeypatch.setattr(Run, "python", lambda *_, **__: None)
    verbs.bench(run, 60)
    assert "problem" in kept(run)["bench"]
    assert "an old table" not in (run.record.folder / "gpu.md").read_text()


def test_tuned_configurations_stand_beside_the_tables(run):
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    trials = [
        {"config": config, "milliseconds": 2.0, "problem": None},
        {"config": config | {"BLOCK_M": 128}, "milliseconds": 1.0, "problem": None},
        {"config": config, "milliseconds": None, "problem": "wrong"},
    ]
    best = {"config": trials[1]["config"], "milliseconds": 1.0}
    run.record.put(tune={"problems": {"forward 128": {"best": best, "trials": trials}}})
    assert (
        "| forward 128 | BLOCK_M 64, BLOCK_N 64, num_warps 4, num_stages 2 | 2.000 ms "
        "| BLOCK_M 128, BLOCK_N 64, num_warps 4, num_stages 2 | 1.000 ms | 3 | 1 |"
    ) in page.render(kept(run))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A tree with sources and nothing built."""
    monkeypatch.setattr(install, "ROOT", tmp_path)
    for folder in ("dist", "csrc", "mmkernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "ops.cpp").touch()
    return tmp_path


def test_the_extension_comes_from_the_newest_wheel_that_has_one(run, checkout):
    old = f"old-{platform.machine()}"
    for name, file in (
        (old, "mmkernels/_C.so"),
        (f"pure-{platform.machine()}", "mmkernels/__init__.py"),
        ("other-machine", "mmkernels/_C.so"),
    ):
        with zipfile.ZipFile(checkout / "dist" / f"{name}.whl", "w") as archive:
            archive.writestr(file, name)
    install.install(run, 60)
    assert kept(run)["extension"] == f"{old}.whl"
    extension = checkout / "mmkernels" / "_C.so"
    assert extension.read_text() == old
    assert not (checkout / "mmkernels" / "__init__.py").exists()
    os.utime(checkout / "dist" / f"{old}.whl", (1, 1))
    os.utime(extension, (1, 1))
    install.install(run, 60)
    assert kept(run)["extension"] == f"{old}.whl, OLDER THAN THE SOURCES"
    extension.write_text("built later")
    install.install(run, 60)
    assert kept(run)["extension"].startswith("_C.so, which was there")
    assert extension.read_text() == "built later"


def test_without_a_wheel_the_extension_is_built_where_nvcc_is(checkout, tmp_path, monkeypatch):
    record = Record(tmp_path / "out", FACTS)
    on_gpu = Run(record, Runner(record.folder / "gpu.log"), dry=False)
    monkeypatch.setattr(install, "tool", lambda name: None)
    install.install(on_gpu, 60)
    assert "nvcc is not on PATH" in kept(on_gpu)["extension"]
    monkeypatch.setattr(install, "tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(on_gpu.runner, "run", lambda *_: built(checkout))
    install.install(on_gpu, 60)
    assert kept(on_gpu)["extension"] == "built"
    assert kept(on_gpu)["parts"][0]["command"] == "python setup.py build_ext --inplace"
    install.install(on_gpu, 60)
    assert kept(on_gpu)["extension"] == "_C.abi3.so, which was there"


def built(checkout: Path) -> Done:
    (checkout / "mmkernels" / "_C.abi3.so").touch()
    return Done(0, False, 1.0, "")
