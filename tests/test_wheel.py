"""The compiled wheel: built from the sdist, audited, and loaded by every Python and torch at hand.

It takes as long as nvcc does, so `make test-wheel` runs this, once a change.
MMKERNELS_OTHER_PYTHONS names the interpreters of other environments that have a torch.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from tests.distributions import DESCRIPTION, PIP, ROOT, build_sdist, contents, run, sources

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

if not (ROOT / "setup.py").exists():
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """With the instances that CI builds; as a GPU's owner would, who has torch, ninja and nvcc."""
    pytest.importorskip("ninja")
    folder = tmp_path_factory.mktemp("wheel")
    sdist = build_sdist(tmp_path_factory.mktemp("sdist"))
    wanted = {"MMKERNELS_BUILD_CUDA": "1", "MMKERNELS_INSTANCES": "ci", "TORCH_CUDA_ARCH_LIST": ""}
    pip = (*PIP, "wheel", "--no-cache-dir", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder, **wanted)  # five minutes at most
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_is_for_any_python_3_and_holds_the_package_and_the_extension(wheel):
    machine = platform.machine()
    assert wheel.name == f"mmkernels-{mmkernels.__version__}-py3-none-linux_{machine}.whl"
    assert wheel.stat().st_size < 20 << 20
    assert contents(wheel) == sources() | {"mmkernels/_C.so"} | DESCRIPTION


def test_audit_finds_no_fault_and_names_the_oldest_linux(wheel, tmp_path):
    for name in ("auditwheel", "torch_abi_audit", "wheel"):
        pytest.importorskip(name)
    copy = shutil.copy(wheel, tmp_path)
    run(sys.executable, "-m", "tools.abi_audit", copy, cwd=ROOT)
    (tagged,) = tmp_path.iterdir()
    found = re.fullmatch(r"mmkernels-.*-py3-none-manylinux_2_(\d+)_(\w+)\.whl", tagged.name)
    assert found and found[2] == platform.machine()
    # A glibc newer than 2.36 puts newer functions in place of some that CUDA's runtime calls.
    here = int(platform.libc_ver()[1].split(".")[1])
    assert int(found[1]) == 34 or here > 36
    run(*PIP, "install", "--dry-run", "--no-deps", "--no-index", tagged, cwd=tmp_path)


LOADED = """
import json, torch, mmkernels as mm
from mmkernels import doctor
from mmkernels._core import library
error = library.load_error()
built = torch.ops.mmkernels_cuda.attention_forward_built
q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
print(json.dumps({
    "file": mm.__file__,
    "error": error,
    "doctor": doctor.examine().environment["extension"].value,
    "built": [[built(d, bfloat16) for d in (64, 80, 128)] for bfloat16 in (True, False)],
    "reason": mm.explain(mm.attention, q, q, q).reasons["cuda"],
}))
"""


every_torch = pytest.mark.parametrize(
    "python", [sys.executable, *os.environ.get("MMKERNELS_OTHER_PYTHONS", "").split()]
)


@every_torch
def test_package_loads_the_extension_without_a_gpu(python, installed):
    said = json.loads(run(python, "-c", LOADED, cwd=installed, PYTHONPATH=str(installed)))
    assert said == {
        "file": str(installed / "mmkernels" / "__init__.py"),
        "error": None,
        "doctor": "loaded",
        "built": [[True, False, True], [False] * 3],
        "reason": "q is on cpu; the CUDA kernels run on NVIDIA GPUs",
    }


STREAM = "aoti_torch_get_current_cuda_stream"


@every_torch
def test_extension_finds_the_current_stream_where_torch_is_built_for_cuda(
    python, installed, tmp_path
):
    """The symbol is weak, so that nothing else would tell before the first launch on a GPU."""
    extension = installed / "mmkernels" / "_C.so"
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.version.cuda)"
    loader = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "loader")}
    cuda = run(python, "-c", code, extension, cwd=tmp_path, **loader).strip()
    said = "".join(path.read_text(errors="replace") for path in tmp_path.glob("loader*"))
    assert f"binding file {extension}" in said
    bound = rf"binding file {re.escape(str(extension))} \[0\] to (\S+) .* symbol `{STREAM}'"
    found = [Path(library).name for library in re.findall(bound, said)]
    assert found == ([] if cuda == "None" else ["libtorch_cuda.so"])


# torch.ops.mmkernels_cuda.attention_forward_built(64, True) through torch's stable C ABI.
CALLED = """
import ctypes, sys
torch = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2])
stack = (ctypes.c_uint64 * 2)(64, 1)
version = ctypes.c_uint64(0x020B000000000000)
op = b"mmkernels_cuda::attention_forward_built"
print(torch.torch_call_dispatcher(op, b"", stack, version), stack[0] & 0xFF)
"""


def pythons() -> dict[str, str]:
    """Interpreters on PATH or of pyenv, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = [shutil.which(f"python3.{minor}") for minor in range(10, 20)]
    found = {}
    for python in [*filter(None, named), *pyenv.glob("versions/3.*/bin/python3")]:
        version = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", version], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() >= "3.10":
            found[done.stdout.strip()] = str(python)
    return found


def test_extension_loads_in_every_python_without_the_torch_package(installed):
    """What remains of torch then is a library without Python; the extension needs no more."""
    if len(others := pythons()) < 2:
        pytest.skip("no second Python from 3.10 on was found")
    library = Path(torch.__file__).parent / "lib" / "libtorch.so"
    extension = installed / "mmkernels" / "_C.so"
    for version, python in others.items():
        said = run(python, "-c", CALLED, library, extension, cwd=installed)
        assert said.split() == ["0", "1"], version
