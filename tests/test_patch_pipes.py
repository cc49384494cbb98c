"""Is the table of the patch embedding's pipes in docs/performance.md what the tool would write?"""

import pytest

from mmkernels._core import triton_runtime
from tools import patch_pipes, pipes

AGAIN = "run TRITON_INTERPRET=0 python -m tools.patch_pipes"


def committed() -> list[list[str]]:
    """The table's rows as they stand in the docs."""
    _, _, rest = pipes.PAGE.read_text().partition(f"<!-- begin {patch_pipes.BLOCK} -->")
    lines = [line for line in rest.partition("<!-- end")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == patch_pipes.HEADER, AGAIN
    return rows


def test_every_case_has_its_rows():
    expected = [
        [kernel, case.name, str(case.pixels).removeprefix("torch.")]
        for case in patch_pipes.CASES
        for kernel in patch_pipes.KERNELS.values()
    ]
    assert [row[:3] for row in committed()] == expected, AGAIN


def test_rates_stay_below_those_of_the_chip():
    for *_, share, _, ceiling, serial in committed():
        assert 0 < float(share) <= 1
        assert 0 < int(ceiling) <= int(serial) <= 990  # nothing here takes turns with products


@pytest.mark.compiled
@pytest.mark.ptxsim
def test_a_case_counted_again_gives_the_same_rows():
    pytest.importorskip("triton")
    if f", {pipes.triton_version()};" not in pipes.PAGE.read_text():
        pytest.skip(f"the table was made with another version than {pipes.triton_version()}")
    again = patch_pipes.rows(patch_pipes.CASES[1])
    assert all(row in committed() for row in again), f"now {again}; {AGAIN}"


def test_it_refuses_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        patch_pipes.rows.__wrapped__(patch_pipes.CASES[0])
