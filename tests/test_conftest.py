"""The safeguards of conftest.py: NaN in fresh memory, fixed seeds, skips that give a reason."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fresh_memory_is_nan(dtype):
    x = torch.zeros(3, dtype=dtype)
    for fresh in (torch.empty(3, dtype=dtype), torch.empty_like(x), x.new_empty(3)):
        assert fresh.isnan().all()


@pytest.mark.parametrize("again", [0, 1])
def test_every_test_draws_the_same_numbers(again):
    torch_first = torch.randn((), generator=torch.Generator().manual_seed(0))
    assert torch.randn(()) == torch_first
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()


def test_marked_tests_skip_with_the_reason(tmp_path):
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_marked.py").write_text("""
import pytest

@pytest.mark.ptxsim
def test_ptxsim():
    raise AssertionError

@pytest.mark.nvcc
def test_nvcc():
    raise AssertionError

def test_unmarked():
    pass
""")
    environment = {**os.environ, "MMKERNELS_PTXSIM": str(tmp_path / "absent"), "PATH": ""}
    options = [
        "-c",
        HERE.parent / "pyproject.toml",
        "--rootdir",
        tmp_path,
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert f"ptxsim: MMKERNELS_PTXSIM={tmp_path / 'absent'} is not a folder" in done.stdout
    assert "nvcc: nvcc is not on PATH" in done.stdout
