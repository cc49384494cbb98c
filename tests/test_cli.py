"""`python -m mmkernels`: verbs, their arguments, exit codes, and errors of one line."""

import subprocess
import sys

import pytest

import mmkernels
from mmkernels import __main__ as cli
from mmkernels import demo, doctor


@pytest.fixture
def calls(monkeypatch):
    """What the verbs were called with, instead of running them; they return 0 and 7."""
    seen = []
    monkeypatch.setattr(doctor, "main", lambda argv: seen.append(("doctor", argv)) or 0)
    monkeypatch.setattr(demo, "main", lambda argv: seen.append(("demo", argv)) or 7)
    return seen


@pytest.mark.parametrize(
    ("argv", "call", "code"),
    [
        ([], ("doctor", []), 0),
        (["--json", "--check"], ("doctor", ["--json", "--check"]), 0),
        (["doctor", "--json"], ("doctor", ["--json"]), 0),
        (["demo"], ("demo", []), 7),
        (["demo", "--out", "folder", "--quick"], ("demo", ["--out", "folder", "--quick"]), 7),
        (["demo", "--help"], ("demo", ["--help"]), 7),
        (["demo", "--version"], ("demo", ["--version"]), 7),
    ],
)
def test_a_verb_gets_its_arguments_and_gives_the_exit_code(argv, call, code, calls):
    assert cli.main(argv) == code
    assert calls == [call]


def test_unknown_verb_names_the_known_ones(calls, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["teach"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "teach" in message
    assert all(verb in message for verb in cli.VERBS)
    assert calls == []


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in cli.VERBS)


def fail_with(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ModuleNotFoundError("it needs timm: pip install timm"),
            "mmkernels demo: it needs timm: pip install timm\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            'mmkernels demo: torch is not installed: pip install "torch>=2.11"\n',
        ),
    ],
)
def test_missing_library_is_one_line_and_exit_code_2(error, line, monkeypatch, capsys):
    monkeypatch.setattr(demo, "main", fail_with(error))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr() == ("", line)


def test_a_missing_module_that_no_verb_asked_for_is_a_bug_and_shown(monkeypatch):
    error = ModuleNotFoundError("No module named 'mmkernels.typo'", name="mmkernels.typo")
    monkeypatch.setattr(demo, "main", fail_with(error))
    with pytest.raises(ModuleNotFoundError, match=r"mmkernels\.typo"):
        cli.main(["demo"])


def test_interrupt_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(demo, "main", fail_with(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_process_exits_with_the_code():
    version = [sys.executable, "-m", "mmkernels", "--version"]
    done = subprocess.run(version, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"mmkernels {mmkernels.__version__}\n")
    unknown = [sys.executable, "-m", "mmkernels", "teach"]
    assert subprocess.run(unknown, capture_output=True, timeout=120).returncode == 2
