"""The doctor's report: what it says, what its self-test sees, and that nothing stops it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import doctor
from mmkernels._core import (
    library,
    registry,
    selftest,
    triton_runtime,
    tuning_choice,
    tuning_entries,
    tuning_store,
)

ROOT = Path(mmkernels.__file__).parent.parent


def run_with_torch(source: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the doctor in a process whose `import torch` executes `source`."""
    (folder / "torch.py").write_text(source)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "mmkernels", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def break_backend(monkeypatch: pytest.MonkeyPatch, op: str, name: str, wrong) -> None:
    """Replaces one backend's function by `wrong(its function)` for one test."""
    changed = tuple(
        backend._replace(fn=wrong(backend.fn)) if backend.name == name else backend
        for backend in registry.backends(op)
    )
    monkeypatch.setitem(registry._table, op, changed)


def test_report_covers_every_operation_and_backend():
    report = doctor.examine()
    assert report.problem is None
    operations = report.samples["float32 on cpu"]
    assert set(operations) == set(registry.operations())
    for op, backends in operations.items():
        assert list(backends) == [backend.name for backend in registry.backends(op)]
        assert [fact.chosen for fact in backends.values()].count(True) == 1
        assert all(fact.available != bool(fact.problem) for fact in backends.values())
        assert all(fact.passed is None for fact in backends.values()), "only --check runs anything"


def test_report_names_versions():
    environment = doctor.examine().environment
    assert torch.__version__ in environment["torch"].value
    assert mmkernels.__version__ in environment["mmkernels"].value
    assert str(Path(mmkernels.__file__).parent) in environment["mmkernels"].value
    assert all(fact.value or fact.problem for fact in environment.values())


def test_declining_backend_is_shown_with_reason_and_remedy(monkeypatch):
    declining = tuple(
        backend._replace(why_not=lambda *_: "it is Tuesday") if backend.name == "cpu" else backend
        for backend in registry.backends("attention_forward")
    )
    monkeypatch.setitem(registry._table, "attention_forward", declining)
    report = doctor.examine()
    fact = report.samples["float32 on cpu"]["attention_forward"]["cpu"]
    assert (fact.available, fact.chosen, fact.problem) == (False, False, "it is Tuesday")
    text = doctor.render(report)
    assert f"it is Tuesday  fix: {selftest.REMEDIES['cpu']}" in text


def test_check_passes_on_every_available_backend(capsys):
    assert doctor.main(["--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    facts = [
        fact
        for operations in report["samples"].values()
        for backends in operations.values()
        for fact in backends.values()
    ]
    assert len(facts) >= 6
    assert all(fact["passed"] is (True if fact["available"] else None) for fact in facts)


def scaled(function):
    return lambda *inputs: tuple(x * 1.001 for x in function(*inputs))


def not_a_number(function):
    return lambda *inputs: tuple(torch.full_like(x, torch.nan) for x in function(*inputs))


def raising(function):
    def run(*inputs):
        raise RuntimeError("no such instruction")

    return run


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "attention_decode"])
@pytest.mark.parametrize("wrong", [scaled, not_a_number, raising])
def test_check_fails_on_a_broken_backend(op, wrong, monkeypatch, capsys):
    break_backend(monkeypatch, op, "cpu", wrong)
    assert doctor.main(["--check", "--json"]) == 1
    operations = json.loads(capsys.readouterr().out)["samples"]["float32 on cpu"]
    assert operations[op]["cpu"]["passed"] is False
    assert operations[op]["reference"]["passed"] is True
    if wrong is raising:
        assert operations[op]["cpu"]["detail"] == "RuntimeError: no such instruction"


def test_without_check_a_broken_backend_is_not_run(monkeypatch, capsys):
    break_backend(monkeypatch, "attention_forward", "cpu", raising)
    assert doctor.main([]) == 0
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "No module named"),
        ("raise ImportError('libtorch_cpu.so: undefined symbol')", "undefined symbol"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
        ("raise AttributeError('numpy has no attribute core')", "numpy has no attribute"),
    ],
)
def test_report_prints_where_torch_is_broken(source, text, tmp_path):
    done = run_with_torch(source, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert text in done.stdout
    assert "python" in done.stdout
    assert "mmkernels cannot run" in done.stdout


def test_check_fails_where_torch_is_absent(tmp_path):
    done = run_with_torch(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        tmp_path,
        "--check",
        "--json",
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["environment"]["torch"]["remedy"] == 'pip install "torch>=2.11"'
    assert "No module named 'torch'" in report["problem"]


def test_a_failing_probe_keeps_its_exception(monkeypatch):
    def probe():
        raise PermissionError("nvidia-smi: permission denied")

    monkeypatch.setitem(doctor.PROBES, "driver", probe)
    assert (
        doctor.examine().environment["driver"].problem
        == "PermissionError: nvidia-smi: permission denied"
    )


def test_variables_are_listed(monkeypatch):
    monkeypatch.setenv("MMKERNELS_CHECK", "1")
    report = doctor.examine()
    assert report.variables["MMKERNELS_CHECK"] == "1"
    assert "  MMKERNELS_CHECK=1\n" in doctor.render(report)


def test_color_is_for_terminals_without_no_color(monkeypatch, capsys):
    def printed() -> str:
        doctor.main([])
        return capsys.readouterr().out

    assert "\033" not in printed()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32mchosen" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in printed()


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_the_self_test_asks_for_backends_that_are_served_by_name_alone(monkeypatch):
    """The CUDA kernels, if they are there; not Triton's interpreter."""
    from mmkernels.attention import cuda as attention
    from mmkernels.attention import cuda_backward
    from mmkernels.patch_embed import cuda as patches

    monkeypatch.setattr(attention.library, "load_error", lambda: None)
    monkeypatch.setattr(attention, "_instance_why_not", lambda *_: None)
    monkeypatch.setattr(patches, "_instance_why_not", lambda *_: None)
    monkeypatch.setattr(cuda_backward, "_built_why_not", lambda *_: None)
    declined = selftest.BackendFact(available=False, chosen=False)
    calls = {call.function.__name__: call for call in selftest.sample_calls()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for name in ("attention", "patch_embed"):
            call = calls[name].to(torch.float32, "cpu", False)
            assert not selftest._serves(declined, call, "triton")
            fakes = [torch.empty(x.shape, device="cuda").bfloat16() for x in call.tensors]
            assert selftest._serves(declined, call._replace(tensors=fakes), "cuda")


def test_why_an_extension_does_not_load_is_said(monkeypatch, tmp_path):
    package = tmp_path / "mmkernels"
    (package / "_core").mkdir(parents=True)
    (package / "_C.so").write_text("no library")
    monkeypatch.setattr(library, "__file__", str(package / "_core" / "library.py"))
    reason = library.load_error.__wrapped__()
    assert "invalid ELF header" in reason or "file too short" in reason


@pytest.fixture
def on_an_h100(tmp_path, monkeypatch):
    """As if torch saw two of them, and the user had measured nothing."""
    gpu = triton_runtime.KNOWN_GPUS["sm_90"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning_store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    monkeypatch.setattr(triton_runtime, "gpu_of", lambda x: gpu)
    tuning_choice.forget()
    yield gpu
    tuning_choice.forget()


def test_it_says_which_tile_sizes_serve_a_gpu(on_an_h100):
    fact = doctor.PROBES["tile sizes"]()
    assert fact.value == "NVIDIA H100: the built-in table of sm_90, never measured"
    assert fact.remedy == "python -m mmkernels tune"


def test_it_says_how_many_were_measured_here_and_what_is_not_used(on_an_h100):
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    entry = {"problem": "forward D64 Dv64 float16", "config": config}
    old = {"problem": "forward D64 Dv64 float32", "config": config}
    file = tuning_store.merge(on_an_h100.name, [entry | tuning_entries.made_with(), old])
    fact = doctor.PROBES["tile sizes"]()
    assert fact.value.startswith(f"NVIDIA H100: 1 measured here, in {file}; the built-in table of")
    assert f"1 tuned configurations in {file} were measured with another triton" in fact.value
    assert fact.remedy is None


def test_a_broken_file_of_tile_sizes_is_shown(on_an_h100):
    file = tuning_store.path(on_an_h100.name)
    file.parent.mkdir()
    file.write_text("{")
    fact = doctor.PROBES["tile sizes"]()
    assert f"{file} is not a file of tuned configurations" in fact.value
