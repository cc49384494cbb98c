"""Do the benchmarks run, say what they should, and do the pages show a committed run?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report, report_patches
from tools.generated import ROOT, replaced

timing = pytest.importorskip("benchmarks.timing", reason="pytest-benchmark is not installed")


def test_a_smoke_test_runs_and_writes_all_that_a_reader_needs(tmp_path):
    path = tmp_path / "smoke.json"
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--quick", f"--benchmark-json={path}"],
        cwd=ROOT,
        # One thread: several, on cores that other tests keep busy, spend their time waiting.
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke, not a result" in done.stdout
    run = report.Run.load(path)
    assert report.SMOKE in report.summary(run)
    assert (run.environment["quick"], run.environment["threads"]) == (True, 1)
    assert "pytest benchmarks --quick" in run.environment["command"]
    check_json(path)
    check_patches(run)
    assert "### Patch embedding" in report.tables(run)
    assert "**Patch embedding.**" in report.patch_summary(run)


def check_json(path: Path) -> None:
    data = json.loads(path.read_text())
    expected = {"cpu", "threads", "os", "python", "torch", "mmkernels", "command", "seed", "quick"}
    assert expected <= set(data["machine_info"])
    assert "node" not in data["machine_info"], "the host's name is nobody's business"
    assert set(data["commit_info"]) == {"id", "dirty", "time"}
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        if "ours" in info:
            assert benchmark["stats"]["data"] == pytest.approx(info["ours"]["times_s"])


def check_attention(run: report.Run) -> None:
    infos = run.infos(report.ATTENTION)
    combinations = {(info["mask"], info["dtype"], info["mode"]) for info in infos}
    assert len(infos) == len(combinations) == 5 * 2 * 2
    for info in infos:
        assert {"shape", "target", "max_error", "sdpa_given"} <= set(info)
        for name, times in {"ours": info["ours"], **info["peers"]}.items():
            assert {"median_s", "iqr_s", "times_s"} <= set(times)
            assert ("ratio" in times) == ("pairwise_ratio" in times) == (name != "ours")
    (growth,) = run.infos("growth")
    assert {"time_ratio", "target"} <= set(growth)
    # Exact enough at any size: what the call needs doubles with the sequence.
    assert 1.5 < growth["memory_ratio"] < 3
    assert [info["target"] for info in run.infos("overhead")] == [25, 45, None]


def check_patches(run: report.Run) -> None:
    infos = run.infos(report_patches.KIND)
    assert len({info["shape"] for info in infos}) == 8
    assert {info["dtype"] for info in infos} == {
        "float32", "bfloat16", "uint8 to float32", "uint8 to bfloat16"
    }  # fmt: skip
    for info in infos:
        assert {"shape", "dtype", "mode", "target", "max_error"} <= set(info)
        assert {"eager", "patches, F.linear"} <= set(info["peers"])
        for times in info["peers"].values():
            assert {"median_s", "iqr_s", "times_s", "ratio", "pairwise_ratio"} <= set(times)


def test_functions_take_turns():
    turns = []
    functions = {name: lambda name=name: turns.append(name) for name in "ab"}
    times = timing.interleaved(functions, pairs=3)
    assert turns == ["a", "b"] * 4, "one untimed round comes first"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_statistics():
    found = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found["median_s"], found["iqr_s"]) == (3.0, 2.0)
    assert timing.speedup([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == {"ratio": 2.0, "pairwise_ratio": 2.0}


def test_a_wrong_patch_embedding_stops_the_benchmark():
    from benchmarks.patch_peers import PatchProblem, Shape

    problem = PatchProblem(Shape(2, 3, (8, 12), (4, 4), 16, prefix=1), torch.float32, True)
    for name, solver in problem.solvers(backward=True, compiled=False).items():
        results = solver()
        assert problem.check(name, results) < 1e-4
        for index, wrong in enumerate(["out", "dweight", "dbias", "dpos_embed", "dprefix_tokens"]):
            changed = [x * 1.001 if i == index else x for i, x in enumerate(results)]
            with pytest.raises(AssertionError, match=f"{name}: {wrong}"):
                problem.check(name, changed)


def patch_info(shape: str, dtype: str, eager: float, linear: float) -> dict:
    """A patch embedding's numbers, with mmkernels at one second."""
    times = {
        name: {"median_s": seconds, "iqr_s": 0.0, "ratio": seconds, "pairwise_ratio": seconds}
        for name, seconds in {"eager": eager, "patches, F.linear": linear}.items()
    }
    ours = {"median_s": 1.0, "iqr_s": 0.0}
    return {
        "shape": shape, "dtype": dtype, "mode": "forward", "target": 0.95, "ours": ours,
        "peers": times,
    }  # fmt: skip


def test_report_of_patches_shows_the_best_peer_and_losses():
    infos = [patch_info("a", "float32", 2.0, 0.9), patch_info("b", "bfloat16", 0.8, 1.5)]
    text = report_patches.summary(infos)
    assert "| a | 2.00×, 0.90× |  |" in text
    assert "| b |  | 0.80×, 0.80× |" in text
    assert "in 2 of 2 cells, at worst 0.80× (b, bfloat16, beside eager)." in text
    won = report_patches.summary([patch_info("a", "float32", 2.0, 3.0)])
    assert "in 0 of 1 cells." in won
    details = report_patches.details(infos)
    assert details.count("| yes | patches, F.linear | 0.90× |") == 1
    assert details.count("| **no** | eager | 0.80× |") == 1


def committed(block: str = "results") -> report.Run:
    """The run that README links to in a block."""
    _, _, rest = report.README.read_text().partition(f"<!-- begin {block} -->")
    text = rest.partition(f"<!-- end {block} -->")[0]
    (name,) = set(re.findall(r"\]\((benchmarks/results/[^)]+\.json)\)", text))
    return report.Run.load(ROOT / name)


@pytest.mark.parametrize("page", [report.README, report.PERFORMANCE], ids=lambda page: page.name)
def test_page_shows_the_committed_runs(page):
    runs = {block: committed(block) for block in report.BLOCKS}
    assert page.read_text() == report.pages(runs)[page], "run python -m benchmarks.report"


def test_the_newest_run_of_each_kind_is_shown():
    for block, run in report.newest().items():
        assert run.path == committed(block).path, "run python -m benchmarks.report"


@pytest.mark.parametrize(
    ("block", "check"), [("results", check_attention), ("patch results", check_patches)]
)
def test_committed_run_is_complete(block, check):
    run = committed(block)
    check_json(run.path)
    check(run)
    assert not run.quick


def test_plot_is_of_the_committed_run():
    image = pytest.importorskip("PIL.Image")
    with image.open(report.PLOT) as plot:
        assert plot.info["Source"] == str(committed().path.relative_to(ROOT))


def test_no_path_of_a_machine_in_committed_results():
    for path in report.RESULTS.glob("*/*.json"):
        environment = report.Run.load(path).environment
        assert not re.search(r"(?<![\w.])/\w", json.dumps(environment)), path


def committed_with(quick: bool, ratio: float) -> report.Run:
    """The committed run, if it had gone otherwise."""
    path = committed().path
    data = json.loads(path.read_text())
    data["machine_info"]["quick"] = quick
    for benchmark in data["benchmarks"]:
        for times in benchmark["extra_info"].get("peers", {}).values():
            if "ratio" in times:
                times["ratio"] = ratio
    return report.Run(data, path)


def test_report_shows_losses_and_missed_targets():
    lost, won = committed_with(False, ratio=0.5), committed_with(False, ratio=9.0)
    cells = len(list(lost.rows()))
    assert f"in {cells} of {cells} cells, at worst 0.50×" in report.summary(lost)
    assert f"in 0 of {cells} cells." in report.summary(won)
    assert report.speed_table(lost).count("| **no** |") == 20
    assert report.speed_table(won).count("| yes |") == 20


@pytest.mark.parametrize("quick", [False, True])
def test_report_calls_a_smoke_test_one(quick):
    run = committed_with(quick, ratio=1.0)
    assert (report.SMOKE in report.summary(run)) == quick
    assert (report.SMOKE in report.details(run)) == quick


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(committed(), tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").stat().st_size > 10_000


def test_blocks_are_replaced_between_their_comments():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert replaced(text, "x", "new") == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n"
