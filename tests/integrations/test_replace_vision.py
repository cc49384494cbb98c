"""`mm.replace` on timm, torchvision, open_clip and diffusers: true reports, the same numbers."""

import copy
from collections import Counter

import pytest
import torch

import mmkernels as mm
from tests.integrations.counting import kernel_calls
from tests.integrations.libraries import (
    EVERY,
    assert_parity,
    claimed,
    kernels_of,
    measure,
    unfused,
)

every = pytest.mark.parametrize("row", EVERY, ids=lambda row: f"{row.library}: {row.name}")


@pytest.fixture
def model(row):
    pytest.importorskip(row.library)
    return row.build()


@every
def test_parity(row, model):
    """Against the float64 run of a model that calls no attention function, where timm has one."""
    eager = unfused(copy.deepcopy(model))
    exact = measure(copy.deepcopy(eager).double(), lambda m: row.run(m, torch.float64))
    mm.replace(model)
    got, wanted = (measure(m, lambda m: row.run(m, torch.float32)) for m in (model, eager))
    assert_parity(got, exact, wanted)


@every
def test_the_report_is_true(row, model):
    """Of each module: one kernel a call if it was swapped, else none."""
    report = mm.replace(model)
    swapped, left = (Counter(e.kind for e in part) for part in (report.swapped, report.left))
    assert (swapped["attention"], left["attention"]) == (row.attention, row.left)
    assert (swapped["patch embedding"], left["patch embedding"]) == (row.patches, row.patches_left)
    assert all(any(why in entry.reason for why in row.why) for entry in report.left)
    assert all(any(why in entry.reason for entry in report.left) for why in row.why)
    with torch.no_grad(), kernels_of(model, report) as ran:
        row.run(model, torch.float32)
    assert ran == claimed(report)


@every
def test_restore(row, model):
    with torch.no_grad():
        before = row.run(model, torch.float32)
        keys = list(model.state_dict())
        with mm.replaced(model):
            row.run(model, torch.float32)
            assert list(model.state_dict()) == keys
        with kernel_calls() as calls:
            assert torch.equal(row.run(model, torch.float32), before)
    assert calls.by_op == {}
