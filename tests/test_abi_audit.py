"""tools/abi_audit.py on small wheels made here: it tags what is right and sees what is wrong."""

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("auditwheel")
pytest.importorskip("wheel")
torch_versions = pytest.importorskip("torch_abi_audit.torch_versions")
abi_audit = pytest.importorskip("tools.abi_audit", reason="mmkernels is not in a source tree")

if not (sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("gcc")):
    pytest.skip("gcc makes the libraries, for Linux on x86_64", allow_module_level=True)

MACHINE = {"x86_64": 62, "aarch64": 183}  # by the ELF header
SINCE_2_11 = """
int aoti_torch_abi_version(void), torch_dtype_float4_e2m1fn_x2(void);
int f(void) { return aoti_torch_abi_version() + torch_dtype_float4_e2m1fn_x2(); }
"""


def library(folder: Path, name: str, code: str, *flags: str) -> Path:
    """A shared library, which may leave functions to others."""
    source, file = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(code)
    gcc = ["gcc", "-shared", "-fPIC", source, "-o", file, f"-Wl,-soname,{file.name}", *flags]
    subprocess.run(gcc, check=True)
    return file


def wheel(folder: Path, file: Path | None, tag: str = "linux_x86_64") -> Path:
    """A wheel of one library at most, for torch 2.11 and newer."""
    tree = folder / f"tree_{tag}"
    info = tree / "some-1.dist-info"
    info.mkdir(parents=True)
    required = "".join(f"Requires-Dist: {r}\n" for r in ("numpy", "torch>=2.11"))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some\nVersion: 1\n{required}")
    text = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{tag}\n"
    (info / "WHEEL").write_text(text)
    if file:
        shutil.copy(file, tree / "_C.so")
    pack = [sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", folder]
    subprocess.run(pack, check=True, capture_output=True)
    return folder / f"some-1-py3-none-{tag}.whl"


def audit(wheel: Path, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["abi_audit", str(wheel)])
    return abi_audit.main()


def test_a_wheel_without_a_fault_is_tagged_by_its_glibc(tmp_path, monkeypatch):
    stub = library(tmp_path, "libtorch_cpu", "int aoti_torch_abi_version(void) { return 0; }")
    code = SINCE_2_11 + "#include <math.h>\ndouble g(double x) { return exp(x); }"
    plain = wheel(tmp_path, library(tmp_path, "_C", code, str(stub), "-Wl,--no-as-needed", "-lm"))
    assert audit(plain, monkeypatch) == 0
    (tagged,) = tmp_path.glob("*.whl")  # exp became another function in glibc 2.29
    assert tagged.name == "some-1-py3-none-manylinux_2_31_x86_64.whl"
    with zipfile.ZipFile(tagged) as archive:
        assert b"Tag: py3-none-manylinux_2_31_x86_64" in archive.read("some-1.dist-info/WHEEL")
    assert audit(tagged, monkeypatch) == 0 and tagged.exists()


NEWER = {
    name: version
    for name, version in torch_versions.stable_shim_versions().items()
    if version > (2, 11, 0)
}
CALLS = {
    "Py_IncRef": "_C.so: Py_IncRef is Python's",
    "_PyObject_New": "_C.so: _PyObject_New is Python's",
    "_ZN2at5emptyEv": "_C.so: at::empty() is not in torch's stable ABI",
    "aoti_torch_tomorrow": "_C.so: aoti_torch_tomorrow is in no release that is known",
    min(NEWER, key=NEWER.get): "after 2.11",
}


@pytest.mark.parametrize("function", CALLS)
def test_what_not_every_python_and_torch_has_is_a_fault(function, tmp_path, monkeypatch, capsys):
    code = f"void {function}(void); void f(void) {{ {function}(); }}"
    plain = wheel(tmp_path, library(tmp_path, "_C", code))
    assert audit(plain, monkeypatch) == 1 and plain.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(plain.name) and CALLS[function] in line


def test_a_library_that_not_every_linux_has_is_a_fault(tmp_path):
    other = library(tmp_path, "libother", "void other(void) {}")
    code = "void other(void); void f(void) { other(); }"
    _, faults = abi_audit.audited(wheel(tmp_path, library(tmp_path, "_C", code, str(other))))
    assert faults == ["libother.so is neither the system's nor torch's"]


def test_another_machine_is_not_mislabelled(tmp_path):
    file = library(tmp_path, "_C", "void f(void) {}")
    data = bytearray(file.read_bytes())
    assert data[18] == MACHINE["x86_64"]
    data[18] = MACHINE["aarch64"]
    file.write_bytes(data)
    _, faults = abi_audit.audited(wheel(tmp_path, file))
    assert faults
    tag, faults = abi_audit.audited(wheel(tmp_path, file, "linux_aarch64"))
    assert tag.endswith("_aarch64") and not faults


def test_a_pure_wheel_has_nothing_to_audit(tmp_path):
    tag, faults = abi_audit.audited(wheel(tmp_path, None, "any"))
    assert not tag and len(faults) == 1
