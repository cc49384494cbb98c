"""Do README and docs show the newest committed run of each device, and nothing else?"""

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks import publish
from mmkernels.bench import report, report_plots
from tests.bench.fake_run import CEILINGS, GPU, record, run
from tools.generated import ROOT

RUNS = publish.newest(ROOT)
RUN = pytest.mark.parametrize("shown", RUNS, ids=lambda run: run.device)
PAGE = """\
<!-- begin plot -->
<!-- end plot -->
by hand
<!-- begin results -->
old
<!-- end results -->
"""


def block(page: Path, name: str = "results") -> str:
    _, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- begin {name} -->")
    return rest.partition(f"<!-- end {name} -->")[0]


# What is committed.


@pytest.mark.skipif(bool(RUNS), reason="there is a run to show")
@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pages_say_that_there_is_no_run(page):
    assert publish.NO_RUN in block(ROOT / page)
    assert not list((ROOT / publish.PAGES).glob("*"))


@pytest.mark.skipif(not RUNS, reason="no run is committed")
def test_pages_show_the_committed_runs():
    for path, text in publish.texts(ROOT, RUNS).items():
        assert path.read_text(encoding="utf-8") == text, "run python -m benchmarks.publish"


@pytest.mark.skipif(not RUNS, reason="no run is committed")
def test_nothing_older_is_left_beside_the_pages():
    names = {f"{run.device}{ending}" for run in RUNS for ending in (".md", ".csv")}
    assert {path.name for path in (ROOT / publish.PAGES).iterdir()} == names
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    images = (ROOT / publish.IMAGES).glob("*.png")
    assert not [image for image in images if f"images/{image.name})" not in shown]


@RUN
def test_plots_are_of_the_committed_run(shown):
    for file in shown.images.values():
        source = b"Source\x00" + shown.path.as_posix().encode()
        assert source in (ROOT / file).read_bytes(), "run python -m benchmarks.publish"


@RUN
def test_a_committed_run_passed_its_gate(shown):
    for one in shown.data["records"]:
        assert one["failed"] is None or not one["results"], one["name"]
        for name, result in one["results"].items():
            assert math.isfinite(result["max_error"]), (one["name"], name)


@pytest.mark.parametrize(
    "path", sorted((ROOT / publish.RESULTS).glob("*/*.json")), ids=lambda path: path.name
)
def test_no_committed_result_names_a_machine_or_its_folders(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w./)])/\w[^\"]*", text)
    assert not {"node", "hostname"} & set(re.findall(r'"(\w+)":', text))


# How it is chosen and written, in a checkout of its own.


@pytest.fixture
def root(tmp_path):
    for page in ("README.md", "docs/performance.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(PAGE)
    return tmp_path


def commit(root: Path, name: str, data: dict) -> Path:
    path = root / publish.RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def cases() -> list[dict]:
    names = {"won": 2.0, "lost": 0.8}
    return [
        record(name, peers={"SDPA": 0.02 * ratio, "eager": 0.01 * ratio}, suite=suite)
        for suite in ("attention", "decode")
        for name, ratio in names.items()
    ]


def test_the_newest_whole_full_run_of_each_device_is_shown(root):
    def dated(day: int, **changes) -> dict:
        return run(cases(), date=f"2026-12-{day:02}", **changes)

    commit(root, "cpu/a.json", dated(1))
    best = commit(root, "cpu/b.json", dated(2))
    commit(root, "cpu/cut-off.json", dated(3) | {"finished": False})
    commit(root, "cpu/smoke.json", dated(4, quick=True))
    commit(root, "cpu/one-suite.json", run(cases()[:2], date="2026-12-05"))
    commit(root, "cpu/old.json", {"machine_info": {}, "benchmarks": []})
    commit(root, "h200/quick.json", dated(5, **GPU, quick=True))
    full = commit(root, "h200/full.json", dated(4, **GPU))
    commit(root, "l4/quick.json", dated(4, **GPU, quick=True))
    commit(root, "l4/bench.json", dated(5, **GPU))
    commit(root, "a-cpu/smoke.json", dated(4, quick=True))
    shown = publish.newest(root)
    assert [run.device for run in shown] == ["h200", "l4", "cpu"], "GPUs first"
    assert [root / run.path for run in shown][::2] == [full, best]
    assert shown[1].path.name == "quick.json", "what make gpu leaves has no name yet"


def test_a_run_of_pytest_benchmark_is_shown(root):
    expected = run(cases())
    data = {
        "machine_info": {**expected["environment"], "ceilings": CEILINGS},
        "benchmarks": [{"extra_info": one} for one in expected["records"]],
    }
    commit(root, "cpu/a.json", data)
    assert publish.newest(root)[0].data == expected | {"finished": False}


def test_readme_is_compact_and_keeps_losses(root):
    commit(root, "cpu/a.json", run(cases()))
    text = publish.texts(root, publish.newest(root))[root / "README.md"]
    assert "by hand" in text and "old" not in text
    assert text.count(publish.NO_GPU) == text.count("says nothing about GPUs") == 1
    assert "| attention | 2 | 1.26× | **0.80×** to 2.00× | 1 | 2.53×, SDPA |" in text
    assert "| won | B1 H12 S197 D64 | full | 2.00×, 4.00× |" in text
    assert "| lost | B1 H12 S197 D64 | full | **0.80×**, 1.60× |" in text
    loss = "Slower than the best peer in 1 of 2 cases; at worst 0.80× (lost,"
    assert f"- attention: {loss}" in text and f"- decode: {loss}" in text
    assert "Decode, over" not in text, "the page has its cases"
    for link in ("docs/results/cpu.md", "benchmarks/results/cpu/a.json"):
        assert f"]({link})" in text
    assert "](docs/images/cpu-overview.png)" in text


def test_readme_says_that_cases_failed(root):
    commit(root, "cpu/a.json", run([*cases(), record("bad", results={}, failed="Error: x")]))
    text = publish.texts(root, publish.newest(root))[root / "README.md"]
    assert "**FAILED**: attention, bad, B1 H12 S197 D64, full, float32, forward: Error: x" in text


def test_a_gpu_ends_the_sentence_that_there_is_none(root):
    commit(root, "cpu/a.json", run(cases()))
    commit(root, "GPU/a.json", run(cases(), **GPU))
    text = publish.texts(root, publish.newest(root))[root / "README.md"]
    assert publish.NO_GPU not in text
    assert text.index("**NVIDIA Fake 200.**") < text.index("**cpu.**")
    assert text.index("**cpu.**") < text.index("says nothing about GPUs")
    assert "](docs/images/GPU-overview.png)" in text
    performance = publish.texts(root, publish.newest(root))[root / "docs/performance.md"]
    assert "- [NVIDIA Fake 200](results/GPU.md): NVIDIA Fake 200, torch" in performance


def test_everything_is_written_and_what_is_stale_goes(root, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report_plots, "MOST_ROWS", 3)
    source = commit(root, "cpu/a.json", run(cases()))
    stale, other = (root / publish.IMAGES / name for name in ("cpu-gone.png", "logo.png"))
    for path in (stale, other):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert publish.main(root) == 0
    (shown,) = publish.newest(root)
    for path, text in publish.texts(root, [shown]).items():
        assert path.read_text() == text, "a second run changes nothing"
    page = root / "docs/results/cpu.md"
    assert report.report_csv.text(shown.data) == page.with_suffix(".csv").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
    assert {f"../images/cpu-{n}.png" for n in ("overview", "attention", "decode")} <= set(
        re.findall(r"\]\(([^)]+)\)", page.read_text())
    )
    for file in shown.images.values():
        relative = source.relative_to(root).as_posix()
        assert f"Source\0{relative}".encode() in (root / file).read_bytes()
    assert other.exists() and not stale.exists()


def test_nothing_is_written_without_a_run_or_without_matplotlib(root, monkeypatch, capsys):
    assert publish.main(root) == 1
    assert "no run to publish below benchmarks/results" in capsys.readouterr().err
    commit(root, "cpu/a.json", run(cases()))
    monkeypatch.setattr(report_plots, "why_not", lambda: "no matplotlib")
    assert publish.main(root) == 1
    assert "no matplotlib" in capsys.readouterr().err
    assert (root / "README.md").read_text() == PAGE
