"""`make gpu` where there is no GPU: what it refuses, keeps, and installs."""

import json
import os
import sys
import zipfile

import pytest
import torch

from tools import gpu


@pytest.fixture
def report(tmp_path, monkeypatch) -> gpu.Report:
    monkeypatch.setattr(gpu, "environment", lambda: {"gpu": "none"})
    return gpu.Report(tmp_path / "out")


def test_every_file_of_tests_is_there_and_needs_a_gpu():
    for path in gpu.TESTS:
        assert "mark.gpu" in (gpu.ROOT / path).read_text()


def test_it_refuses_without_a_gpu_and_unknown_steps(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["tests"]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err
    assert gpu.main(["test"]) == 2
    assert "no step test; there are tests, sanitize" in capsys.readouterr().err


def test_a_part_that_fails_or_hangs_is_kept(report):
    report.add("good", [sys.executable, "-c", "print('fine')"])
    report.add("bad", [sys.executable, "-c", "raise SystemExit(3)"])
    report.add("long", [sys.executable, "-c", "import time; time.sleep(60)"], seconds=1)
    kept = json.loads((report.folder / "gpu.json").read_text())
    assert [kept[name]["status"] for name in ("good", "bad", "long")] == [0, 3, 124]
    assert (report.folder / "good.txt").read_text() == "fine\n"


def test_pytest_is_counted(report, tmp_path):
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): assert 0\n")
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    report.add("tests", [sys.executable, "-m", "pytest", *options, str(tests)])
    part = report.parts["tests"]
    assert (part["status"], part["passed"], part["failed"]) == (1, 2, 1)
    assert gpu.counts("") == {}


def test_the_extension_comes_from_the_newest_wheel_that_has_one(report, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.cpp").touch()
    for name, files in (("old", ["mmkernels/_C.so"]), ("pure", ["mmkernels/__init__.py"])):
        with zipfile.ZipFile(tmp_path / "dist" / f"{name}.whl", "w") as archive:
            for file in files:
                archive.writestr(file, name)
    gpu.install(report)
    assert report.parts["extension"] == "old.whl"
    os.utime(tmp_path / "dist" / "old.whl", (1, 1))
    gpu.install(report)
    assert report.parts["extension"] == "old.whl, OLDER THAN THE SOURCES"
    assert (tmp_path / "mmkernels" / "_C.so").read_text() == "old"
    assert not (tmp_path / "mmkernels" / "__init__.py").exists()
