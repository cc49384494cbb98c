"""For every test: markers that skip themselves, fixed seeds, visible uninitialised memory."""

import importlib.util
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

# cuBLAS is deterministic only if this is set before its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton reads this when it is first imported, which `import torch` does. Without a GPU its kernels
# run in the interpreter; TRITON_INTERPRET=0 makes a process that compiles them instead.
os.environ.setdefault(
    "TRITON_INTERPRET",
    "0" if any(Path(gpu).exists() for gpu in ("/dev/nvidia0", "/dev/kfd")) else "1",
)

import numpy as np
import pytest
import torch

from mmkernels._core import triton_runtime

if importlib.util.find_spec("hypothesis"):  # `make gpu` does without
    from hypothesis import settings

    settings.register_profile("default", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure() -> None:
    """One thread a process: on tensors of a test's size more of them only wait for each other."""
    torch.set_num_threads(1)


def why_skip(marker: str) -> str | None:
    """Why a test with this marker cannot run here; None if it can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if marker in ("interpreter", "compiled"):
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if (marker == "interpreter") != triton_runtime.interpreted():
            return f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} in this process"
    if marker == "nvcc" and shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if marker == "ptxsim":
        folder = os.environ.get("MMKERNELS_PTXSIM")
        if not folder:
            return "MMKERNELS_PTXSIM is not set"
        if not Path(folder).is_dir():
            return f"MMKERNELS_PTXSIM={folder} is not a folder"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("interpreter"):
            # It computes in numpy, which warns where a GPU makes NaN or Inf in silence.
            quiet = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
            item.add_marker(quiet)
        for marker in {marker.name for marker in item.iter_markers()}:
            if reason := why_skip(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, integers their maximum: reading what nothing wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
