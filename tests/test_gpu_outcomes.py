"""Do the tests of `make gpu` go on behind one that kills its process, and is all kept?"""

import json
from pathlib import Path

import pytest

from tools.gpu import outcomes, testing
from tools.gpu.process import ROOT, Runner
from tools.gpu.record import Record
from tools.gpu.run import Run

HEAD = "import os, time, pytest\n"
CRASH = """
def test_a(): pass
def test_b(): os.abort()
def test_c(): assert 1 == 2, "not equal"
def test_d(): pytest.skip("no such thing")
@pytest.fixture
def broken():
    yield
    raise ValueError("when taken down")
def test_e(broken): pass
"""
HANG = "def test_a(): time.sleep(60)\ndef test_b(): pass\n"
LOST = """
import tools.gpu.outcomes
if not os.path.exists("HERE"):
    tools.gpu.outcomes.context_is_lost = lambda: "an illegal memory access"
def test_a():
    open("HERE", "w").close()
    assert 0
def test_b(): pass
"""


@pytest.fixture
def run(tmp_path) -> Run:
    facts = {"dry_run": True, "total_seconds": 9, "environment": {"device": "cpu"}}
    record = Record(tmp_path / "out", facts)
    return Run(record, Runner(record.folder / "gpu.log"), dry=True)


def part_of(
    run: Run, tmp_path: Path, text: str, seconds: float = 60, test_seconds: float | None = None
) -> dict:
    """What is kept of a file of tests."""
    path = tmp_path / "test_it.py"
    path.write_text(HEAD + text.replace("HERE", str(tmp_path / "lost")))
    job = testing.Job("it", str(path), marks="not gpu")
    testing._at_once(run, "tests", [job], seconds, test_seconds)
    return json.loads((run.record.folder / "gpu.json").read_text())["parts"][-1]


def test_tests_go_on_behind_one_that_kills_the_process(run, tmp_path):
    part = part_of(run, tmp_path, CRASH)
    assert part["status"] == "failed"
    counts = {name: part[name] for name in ("passed", "died", "failed", "skipped", "error")}
    assert counts == dict.fromkeys(counts, 1)
    messages = {x["test"].split("::")[1]: x["message"] for x in part["failures"]}
    assert messages["test_b"] == "the process ended in it, with exit status -6"
    assert "not equal" in messages["test_c"] and "when taken down" in messages["test_e"]
    assert part["skips"] == {"no such thing": 1}
    page = (run.record.folder / "gpu.md").read_text()
    assert "::test_c`" in page and "| it | 1 | no such thing |" in page


def test_a_test_that_hangs_ends_after_its_time_and_says_where(run, tmp_path):
    part = part_of(run, tmp_path, HANG, test_seconds=2)
    assert (part["died"], part["passed"]) == (1, 1)
    assert "in test_a" in (run.record.folder / "gpu.log").read_text()


def test_a_lost_gpu_context_fails_no_test_but_the_culprit(run, tmp_path):
    part = part_of(run, tmp_path, LOST)
    assert (part["failed"], part["passed"]) == (1, 1)
    assert "an illegal memory access" in (run.record.folder / "gpu.log").read_text()


def test_what_is_cut_off_is_counted_as_far_as_it_came(run, tmp_path):
    part = part_of(run, tmp_path, "def test_0(): pass\n" + HANG, seconds=10)
    assert (part["status"], part["passed"], part["cut off"]) == ("cut off", 1, 1)
    part = part_of(run, tmp_path, "def test_0(): assert 0\n" + HANG, seconds=10)
    assert (part["status"], part["failed"], part["cut off"]) == ("failed", 1, 1)


def test_a_file_that_does_not_import_is_an_error(run, tmp_path):
    part = part_of(run, tmp_path, "import nothing_of_this_name\n")
    assert (part["status"], part["error"]) == ("failed", 1)
    assert "nothing_of_this_name" in part["failures"][0]["message"]


def test_a_file_of_which_nothing_runs_has_not_passed(run, tmp_path):
    assert part_of(run, tmp_path, "@pytest.mark.gpu\ndef test_a(): pass\n")["status"] == "skipped"


def test_jobs_that_would_begin_too_late_are_not_reached(run, tmp_path):
    assert part_of(run, tmp_path, HANG, seconds=1)["status"] == "not reached"


def test_a_line_that_was_cut_off_is_no_outcome(tmp_path):
    path = tmp_path / "x.jsonl"
    assert outcomes.read(path) == []
    outcomes.add(path, test="a", outcome="passed")
    with path.open("a") as file:
        file.write('{"test": "b", "out')
    assert outcomes.read(path) == [{"test": "a", "outcome": "passed"}]


def test_a_process_for_every_24_gib_and_two_cores(monkeypatch):
    monkeypatch.setattr(testing.os, "cpu_count", lambda: 16)
    memory = {139: 5, 80: 3, 24: 1, 8: 1, 1000: 6}
    assert {gib: testing.processes({"gpu_memory_gib": gib}) for gib in memory} == memory
    monkeypatch.setattr(testing.os, "cpu_count", lambda: 2)
    assert testing.processes({"gpu_memory_gib": 139}) == 1


# The lists


def collected(path: str, keywords: str) -> set[str]:
    """The tests that a job would run."""
    names: set[str] = set()

    class Names:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            names.update(item.nodeid for item in session.items)

    words = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    assert pytest.main([*words, "-k", keywords, path], plugins=[Names()]) == 0
    return names


@pytest.mark.parametrize("path", dict.fromkeys(job.path for job in testing.JOBS))
def test_every_gpu_test_is_in_one_job(path):
    pytest.importorskip("triton")
    parts = [collected(path, job.keywords) for job in testing.JOBS if job.path == path]
    assert all(parts)
    assert set.union(*parts) == collected(path, "")
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_every_file_is_there_and_those_that_need_a_gpu_are_in_a_job():
    jobs = (*testing.JOBS, *testing.SHARED, *testing.INTERPRETED)
    assert all((ROOT / job.path).exists() for job in jobs)
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.name not in ("test_gpu_outcomes.py",)
    }
    assert marked == {job.path for job in testing.JOBS}


def test_memcheck_sees_every_tensor_as_a_block_of_its_own(run):
    code = "import os; print(os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING'))"
    for check, wanted in {"memcheck": "1", "racecheck": "None"}.items():
        done = run.python("sanitize", check, ["-c", code], 60, ("env", "-u", check))
        assert done.stdout.strip() == wanted


def test_a_dry_run_sanitizes_nothing_and_a_gpu_run_every_pair(run, monkeypatch):
    testing.sanitize(run, 60)
    part = run.record.data["parts"][0]
    assert (part["status"], part["reason"]) == ("not possible", "there is no GPU")
    seen = []
    monkeypatch.setattr(testing, "tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(testing, "_at_once", lambda run, step, jobs, *_: seen.extend(jobs))
    testing.sanitize(Run(run.record, run.runner, dry=False), 60)
    assert len(seen) == len(testing.TOOLS) * 2 * len(testing.SANITIZED)
    assert seen[0].launcher[:3] == ("/bin/compute-sanitizer", "--tool", "memcheck")
    assert seen[0].keywords.endswith(" and cuda")
