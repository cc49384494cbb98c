"""Is the table of each pipe's load in docs/performance.md what the tool would write?"""

import pytest

from mmkernels._core import triton_runtime
from tools import pipes
from tools.generated import replaced


def committed() -> list[list[str]]:
    """The table's rows as they stand in the docs."""
    _, _, rest = pipes.PAGE.read_text().partition(f"<!-- begin {pipes.BLOCK} -->")
    lines = [line for line in rest.partition("<!-- end")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == pipes.HEADER, "run TRITON_INTERPRET=0 python -m tools.pipes"
    return rows


def test_every_case_has_its_rows():
    names = [name for name, _ in pipes.KERNELS.values() if name.startswith("backward")]
    expected = [
        [name, case.mask, str(case.head_dim)]
        for case in pipes.CASES
        for name in ([*names, pipes.BOTH] if case.backward else ["forward"])
    ]
    assert [row[:3] for row in committed()] == expected, (
        "run TRITON_INTERPRET=0 python -m tools.pipes"
    )


def test_rates_stay_below_those_of_the_chip():
    for _, _, _, share, _, ceiling, serial in committed():
        assert not share or 0 < float(share) <= 1
        assert 0 < int(serial) < int(ceiling) <= 990


@pytest.mark.compiled
@pytest.mark.ptxsim
@pytest.mark.parametrize("case", [pipes.CASES[5], pipes.Case(True, "causal", 64)], ids=str)
def test_a_case_counted_again_gives_the_same_rows(case):
    pytest.importorskip("triton")
    if f", {pipes.triton_version()};" not in pipes.PAGE.read_text():
        pytest.skip(f"the table was made with another version than {pipes.triton_version()}")
    again = pipes.rows(case)
    assert all(row in committed() for row in again), (
        f"now {again}; run TRITON_INTERPRET=0 python -m tools.pipes"
    )


def test_it_refuses_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=0"):
        pipes.counted.__wrapped__(pipes.CASES[0])


def test_only_the_block_is_rewritten():
    page = pipes.PAGE.read_text()
    head, _, tail = page.partition(f"<!-- begin {pipes.BLOCK} -->")
    rewritten = replaced(page, pipes.BLOCK, "new")
    assert rewritten.startswith(head) and rewritten.endswith(tail.partition("<!-- end")[2])
