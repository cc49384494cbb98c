"""The C++ ops of csrc, for CPU tensors and over launchers that record what they are given."""

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mmkernels.attention import cuda_backward
from mmkernels.patch_embed import cuda as patch_cuda
from tests.attention.cuda_backward import AttentionBackward, AttentionDelta
from tests.cuda_harness import CSRC, AttentionForward
from tests.patch_embed.cuda_harness import PatchForward, PatchWeight

STRUCTS = {
    "attention_forward": AttentionForward,
    "attention_backward": AttentionBackward,
    "attention_delta": AttentionDelta,
    "patch_forward": PatchForward,
    "patch_weight": PatchWeight,
}
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
MARKS = [  # of the tests that compile the ops
    pytest.mark.nvcc,
    pytest.mark.skipif(not CSRC.exists(), reason="mmkernels is not imported from a source tree"),
    pytest.mark.skipif(TORCH < (2, 11), reason="the extension needs torch 2.11"),
]
RECORD = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Recorder:
    """The compiled ops; `launches` are names and parameters since `gpu` was entered last."""

    def __init__(self, file: Path) -> None:
        torch.ops.load_library(file)
        self.library = ctypes.CDLL(str(file))
        self.launches: list[tuple[str, dict[str, Any]]] = []
        self._callback = RECORD(self._record)  # held here: C++ keeps no reference
        address = ctypes.cast(self._callback, ctypes.c_void_p)
        ctypes.c_void_p.in_dll(self.library, "record").value = address.value

    def _record(self, launcher: bytes, parameters: int, size: int, stream: int) -> None:
        name = launcher.decode().removeprefix("mmkernels_")
        struct = next(STRUCTS[kind] for kind in STRUCTS if name.startswith(kind))
        if size != ctypes.sizeof(struct) or stream != ctypes.addressof(self._int("capability")):
            name = f"{name} with {size} bytes of parameters on stream {stream}"
        made = ctypes.cast(parameters, ctypes.POINTER(struct)).contents
        self.launches.append((name, fields(made)))

    def _int(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, name)

    @contextlib.contextmanager
    def gpu(self, capability: int = 80, launch_error: int = 0) -> Iterator[Any]:
        """These ops are `mmkernels_cuda`, on a GPU of compute capability 8.0 or 9.0."""
        self._int("capability").value, self._int("launch_error").value = capability, launch_error
        self.launches.clear()
        ops = torch.ops.mmkernels_recorded
        with (
            mock.patch.object(torch.ops, "mmkernels_cuda", ops, create=True),
            mock.patch.object(cuda_backward, "kernels_why_not", lambda *_: None),
            mock.patch.object(cuda_backward, "is_hopper", lambda _: capability == 90),
            mock.patch.object(patch_cuda, "_reads_by_tma", lambda _: capability == 90),
            mock.patch.object(patch_cuda, "_processors", lambda _: 4),
        ):
            yield ops


def fields(p: ctypes.Structure) -> dict[str, Any]:
    return {name: getattr(p, name) for name, *_ in p._fields_}


@functools.cache  # a process can register the ops once
def compiled() -> Recorder:
    """The ops, from the sources as they are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = (CSRC / "ops.cpp").read_text()  # for CPU tensors, and beside the extension
        text = text.replace("mmkernels_cuda", "mmkernels_recorded").replace(", CUDA,", ", CPU,")
        (folder / "ops.cpp").write_text(text)
        sources = [folder / "ops.cpp", Path(__file__).parent / "recording.cpp"]
        installed = Path(torch.__file__).parent
        nvcc = ["nvcc", "-shared", "-cudart=none", "-O0", "-std=c++17"]
        # Symbolic: what recording.cpp stands in for is found there, not in torch.
        nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=-Bsymbolic"]
        nvcc += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-I{installed}/include"]
        nvcc += [f"-L{installed}/lib", "-ltorch_cpu", "-o", str(folder / "ops.so")]
        done = subprocess.run(
            [*nvcc, *sources, *CSRC.rglob("*_op.cpp")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Recorder(folder / "ops.so")
