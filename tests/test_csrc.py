"""The compiled extension: what nvcc makes of csrc, and that it builds, loads and declines."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels.attention import cuda
from tests import cuda_harness

ROOT = Path(mmkernels.__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))

if not SOURCES:
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


def quick(source: Path) -> bool:
    return source.stem.endswith("bf16")


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=() if quick(source) else pytest.mark.slow, id=source.stem)
        for source in SOURCES
    ],
)
def test_kernels_spill_nothing_and_use_no_local_memory(source, arch, tmp_path):
    pytest.importorskip("triton", reason="its package holds cuobjdump")
    found = cuda_harness.resources(source, arch, tmp_path)
    assert found and all(kernel.stack == kernel.local == 0 for kernel in found), found


def test_kernel_sources_hold_no_torch():
    everything = list((ROOT / "csrc").rglob("*.*"))
    kernels = [
        path for path in everything if path.suffix != ".cpp" and path.stem not in ("ops", "check")
    ]
    assert len(kernels) > 8
    assert not [path for path in kernels if "torch" in path.read_text()]
    assert not [path for path in everything if re.search(r"Python\.h|pybind", path.read_text())]


def setup(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What is needed to build, so that nothing is left in the source tree."""
    tree = tmp_path_factory.mktemp("build")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "mmkernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    return tree


@pytest.mark.parametrize(
    ("reason", "variables"),
    [
        ("MMKERNELS_BUILD_CUDA=0", {"MMKERNELS_BUILD_CUDA": "0"}),
        ("ninja is not installed", {"PATH": "/nowhere"}),
        ("nvcc was not found", {"CUDA_HOME": "/nowhere"}),
    ],
)
def test_every_refusal_to_build_is_one_line_with_its_reason(tree, reason, variables):
    if "ninja" in reason and importlib.util.find_spec("ninja"):
        pytest.skip("ninja is installed beside this Python")
    if "nvcc" in reason and not shutil.which("ninja"):
        pytest.skip("without ninja nobody looks for nvcc")
    done = setup(tree, "--version", **variables)
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mmkernels:"))
    assert line.startswith(f"mmkernels: extension not built: {reason}")
    if "MMKERNELS_BUILD_CUDA" not in variables:
        done = setup(tree, "--version", MMKERNELS_BUILD_CUDA="1", **variables)
        assert done.returncode != 0 and reason in done.stderr.splitlines()[-1]


def test_a_wrong_choice_is_refused(tree):
    done = setup(tree, "--version", MMKERNELS_BUILD_CUDA="yes")
    assert done.returncode != 0 and "must be auto, 0 or 1" in done.stderr


LOADED = """
import torch, mmkernels as mm
from mmkernels import doctor
from mmkernels._core import library
print(library.load_error(), doctor.examine().environment["extension"].value)
built = torch.ops.mmkernels_cuda.attention_forward_built
print(*(built(d, bfloat16) for d in (64, 80, 128) for bfloat16 in (True, False)))
q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
print(mm.explain(mm.attention, q, q, q).reasons["cuda"])
"""


@pytest.mark.nvcc
def test_extension_builds_and_loads_without_a_gpu(tree):
    """With the instances that CI builds; it needs neither Python nor a library of CUDA."""
    pytest.importorskip("ninja")
    wanted = {"MMKERNELS_BUILD_CUDA": "1", "MMKERNELS_INSTANCES": "ci"}
    done = setup(tree, "build_ext", "--inplace", **wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    extension = tree / "mmkernels" / "_C.so"
    assert extension.stat().st_size < 20 << 20
    read = ["readelf", "-d", extension]
    text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("python|cuda", name)]

    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded, built, reason = done.stdout.splitlines()
    assert loaded == "None loaded"
    assert built == "True False False False True False"
    assert reason == "q is on cpu; the CUDA kernels run on NVIDIA GPUs"


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_why_not_says_what_is_served():
    def reason(head_dim=64, dtype=torch.bfloat16, softmax_scale=0.1, dropout_p=0.0, **extras):
        with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
            q = torch.empty(1, 8, 2, head_dim, dtype=dtype)
            q = extras.pop("view", lambda x: x)(q)
            names = ("start", "end", "bias", "alibi_slopes", "sinks", "seed")
            given = [torch.empty(2) if name in extras else None for name in names]
            return cuda.why_not(q, q, q, *given, softmax_scale, 0.0, dropout_p) or ""

    assert "float16 and bfloat16" in reason(dtype=torch.float32)
    assert "64, 72, 80, 96, 128" in reason(head_dim=32)
    assert "last stride of 1" in reason(view=lambda x: x.mT.contiguous().mT)
    assert "bias is given" in reason(bias=True)
    assert "sinks is given" in reason(sinks=True)
    assert "dropout_p" in reason(dropout_p=0.5)
    assert "softmax_scale" in reason(softmax_scale=-1.0)
