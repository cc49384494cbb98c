"""The CUDA sources: what nvcc makes of them, and which calls their op declines."""

import re
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels.attention import cuda, cuda_backward
from tests import machine_code

ROOT = Path(mmkernels.__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
HOPPER = [source for source in SOURCES if source.stem.startswith("hopper_")]
QUICK = r"_(64|128|14|16|delta)_bf16$"  # most others differ in a type or a width alone

if not SOURCES:
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


def parameters(sources: list[Path]) -> list:
    """Those that are not quick are marked slow."""
    return [
        pytest.param(
            source,
            marks=() if re.search(QUICK, source.stem) else pytest.mark.slow,
            id=f"{source.parent.name}-{source.stem}",
        )
        for source in sources
    ]


@pytest.fixture
def compiled(tmp_path):
    """Compiles a source for an architecture."""
    pytest.importorskip("triton", reason="its package holds cuobjdump")
    return lambda source, arch: machine_code.compiled(source, arch, tmp_path)


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["80", "90a", pytest.param("100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", parameters([s for s in SOURCES if s not in HOPPER]))
def test_portable_kernels_spill_nothing_and_use_no_local_memory(source, arch, compiled):
    assert machine_code.faults(compiled(source, arch)) == []


@pytest.mark.nvcc
@pytest.mark.parametrize("source", parameters(HOPPER))
def test_hopper_kernels_spill_nothing_and_are_what_they_are_written_as(source, compiled):
    code = compiled(source, "90a")
    assert machine_code.faults(code) + machine_code.hopper_faults(code) == []


@pytest.mark.nvcc
@pytest.mark.parametrize("source", parameters(HOPPER))
def test_hopper_kernels_in_code_for_other_gpus_stop_the_launch(source, tmp_path):
    """Or they would leave their outputs as they were."""
    kernels = machine_code.portable_ptx(source, tmp_path)
    assert kernels and all("trap;" in kernel for kernel in kernels)


def test_kernel_sources_hold_no_torch():
    everything = list((ROOT / "csrc").rglob("*.*"))
    kernels = [
        path for path in everything if path.suffix != ".cpp" and path.stem not in ("ops", "check")
    ]
    assert len(kernels) > 8
    assert not [path for path in kernels if "torch" in path.read_text()]
    assert not [path for path in everything if re.search(r"Python\.h|pybind", path.read_text())]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_auto_passes_over_attention_in_both_passes(monkeypatch):
    """Though it could serve the call."""
    monkeypatch.setattr(cuda.library, "load_error", lambda: None)
    monkeypatch.setattr(cuda, "_instance_why_not", lambda *_: None)
    monkeypatch.setattr(cuda_backward, "_built_why_not", lambda *_: None)
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        explained = mmkernels.explain(mmkernels.attention, q, q, q)
        named = mmkernels.explain(mmkernels.attention, q, q, q, backend="cuda")
    assert explained.backward is not None and named.backend == "cuda"
    for one in (explained, explained.backward):
        assert one.backend != "cuda" and "not yet measured" in (one.reasons["cuda"] or "")


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
