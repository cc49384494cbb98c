"""Does `python -m mmkernels bench` measure, write, refuse and report as it says?"""

import importlib
import json
import re
import sys

import pytest

from mmkernels import __main__ as command_line
from mmkernels.bench import cli, report_plots, roofline, suites
from tests.bench.fake import case


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "QUICK_SIZES", {"cpu": (32, 2**12)})
    monkeypatch.setattr(roofline.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report_plots, "why_not", lambda: "no plots")  # test_report_plots draws
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def one_case(monkeypatch):
    asked = []

    def cases(names, device, quick):
        asked.append((list(names), str(device), quick))
        return [case()]

    monkeypatch.setattr(suites, "cases", cases)
    return asked


def test_it_measures_and_writes(one_case, tmp_path, capsys):
    path = tmp_path / "out" / "run.json"
    assert command_line.main(["bench", "--quick", "--suite", "decode", "--json", str(path)]) == 0
    assert one_case == [(["decode"], "cpu", True)]
    data = json.loads(path.read_text())
    assert data["finished"] and len(data["records"]) == 1
    command = f"python -m mmkernels bench --quick --suite decode --json {path}"
    assert data["environment"]["command"] == command
    out, err = capsys.readouterr()
    assert str(path) in out and "1/1" in err


def test_progress_needs_no_tqdm(one_case, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["--quick"]) == 0
    assert re.search(r"1/1 case, \d+ s, attention, a product", capsys.readouterr().err)


def test_a_wrong_result_makes_the_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "cases", lambda *_: [case("wrong"), case(name="another")])
    path = tmp_path / "run.json"
    assert cli.main(["--quick", "--json", str(path)]) == 1
    assert len(json.loads(path.read_text())["records"]) == 2


def test_what_was_saved_is_not_overwritten(one_case, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text("kept")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--quick", "--json", str(path)])
    assert exit_.value.code == 2
    assert "which is there already; move it away" in capsys.readouterr().err
    assert path.read_text() == "kept"
    assert cli.main(["--quick"]) == cli.main(["--quick"]) == 0
    assert len(list(tmp_path.glob("mmkernels-bench-cpu-*.json"))) == 2


@pytest.mark.parametrize("name", ["run", "run.md", "run.csv"])
def test_a_page_would_not_overwrite_the_json(one_case, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--quick", "--json", str(tmp_path / name)])
    assert exit_.value.code == 2
    assert f"{name}; it must end in .json" in capsys.readouterr().err
    assert not one_case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "nan"], "--limit is nan; it must be a number of seconds, 0 or more"),
        (["--limit", "-3"], "--limit is -3.0; it must be a number"),
        (["--json", "file/run.json"], "--json is file/run.json, which cannot be written: "),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    one_case, tmp_path, capsys, arguments, message
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--quick", *arguments])
    assert exit_.value.code == 2 and one_case == []
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 99}'])
def test_a_file_that_is_no_run_is_refused(tmp_path, capsys, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    assert cli.main(["--report", str(path)]) == 2
    assert f"{path} is no JSON of a run" in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert cli.main(["--report", str(tmp_path / "none.json")]) == 2
    assert "none.json is no JSON of a run" in capsys.readouterr().err


def test_a_report_is_made_again(one_case, tmp_path, capsys):
    path = tmp_path / "run.json"
    cli.main(["--quick", "--json", str(path)])
    first = capsys.readouterr().out
    assert cli.main(["--report", str(path)]) == 0
    assert capsys.readouterr().out == first


def test_every_suite_has_its_module():
    for name in suites.SUITES:
        module = importlib.import_module(f"mmkernels.bench.suite_{name}")
        assert callable(module.cases)
