"""Does `pytest benchmarks` run a suite, and write a JSON that the reports can read?"""

import json
import os
import subprocess
import sys

import pytest

from mmkernels.bench import report
from tools.generated import ROOT

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


def test_a_suite_runs_under_pytest_benchmark(tmp_path):
    path = tmp_path / "run.json"
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--suite", "overhead"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--benchmark-json={path}"],
        cwd=ROOT,
        # One thread: several, on cores that other tests keep busy, spend their time waiting.
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmarks: smoke test, not a result" in done.stdout
    raw = json.loads(path.read_text())
    assert "node" not in raw["machine_info"], "the host's name is nobody's business"
    assert set(raw["commit_info"]) == {"id", "dirty", "time"}
    for benchmark in raw["benchmarks"]:
        ours = benchmark["extra_info"]["results"]["mmkernels"]
        assert benchmark["stats"]["data"] == pytest.approx(ours["times_s"])
    data = report.load(path)
    assert {record["suite"] for record in data["records"]} == {"overhead"}
    assert all(record["failed"] is None for record in data["records"])
    assert "pytest benchmarks --quick" in data["environment"]["command"]
    assert data["ceilings"]["copy"]["bytes"] > 0
    assert "mmkernels" in report.text(data)
