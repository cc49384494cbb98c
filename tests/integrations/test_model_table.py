"""Is the table in docs/models.md what `mm.replace` says in the running version?"""

import pytest

pytest.importorskip("transformers", minversion="4.57")

from tests.integrations.families import FAMILIES
from tests.integrations.family import MAJOR
from tools import model_table


def rows() -> dict[str, list[str]]:
    """Of the running version's table on the page: family -> the other cells."""
    version = model_table.VERSIONS[MAJOR]
    _, _, rest = model_table.PAGE.read_text().partition(f"<!-- begin {version} -->")
    lines = rest.partition(f"<!-- end {version} -->")[0].strip().splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {family: others for family, *others in cells}


def test_page_shows_it():
    page = model_table.PAGE.read_text()
    assert page == model_table.page(), "run python -m tools.model_table in each installation"


def test_page_shows_both_versions():
    page = model_table.PAGE.read_text()
    for version in model_table.VERSIONS.values():
        assert page.count(f"<!-- begin {version} -->\n\n| family |") == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_row_is_what_the_kernels_are_counted_by(family):
    """The families' tests count kernels against `expected`; the page may claim nothing else."""
    expected = family.expected
    attention, patches, why = rows()[family.name]
    assert ("left" in attention) == bool(expected.left)
    assert ("left: " in why) == bool(expected.left or expected.patches_left)
    for count, where in [
        (expected.attention, attention),
        (expected.patches, patches),
    ]:
        assert (f"{count} swapped" in where) if count else ("swapped" not in where)
