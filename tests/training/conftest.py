"""For all tests of training: determinism as in a run, and no waiting for the disk."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As `run.train` trains."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(autouse=True)
def nothing_is_forced_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long where others write, and no test outlives its machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
