"""CHANGELOG.md: is it in the form that CONTRIBUTING.md asks for, and does `__version__` agree?"""

import datetime
import re

import pytest

import mmkernels
from tools.generated import ROOT

CHANGELOG = ROOT / "CHANGELOG.md"
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

if not CHANGELOG.exists():
    pytest.skip("mmkernels is not imported from a source tree", allow_module_level=True)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def fault(text: str, version: str) -> str | None:
    """What is wrong with a changelog of a package of that version."""
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    if not titles or titles[0] != "[Unreleased]":
        return "the first section is not [Unreleased]"
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", t) for t in titles[1:]]
    if not all(released):
        return "a released section is not [X.Y.Z] - YYYY-MM-DD"
    versions = [numbers(found[1]) for found in released]
    if versions != sorted(set(versions), reverse=True):
        return "the versions are not in order"
    dates = [datetime.date.fromisoformat(found[2]) for found in released]
    if dates != sorted(dates, reverse=True):
        return "the dates are not in order"
    if unknown := set(re.findall(r"^### (.*)$", text, re.MULTILINE)) - KINDS:
        return f"unknown kinds of changes: {unknown}"
    unreleased = text.partition("## [Unreleased]\n")[2].partition("\n## ")[0]
    if not (coming := re.match(r"\nTo become (\d+\.\d+\.\d+)\.\n", unreleased)):
        newest = released[0][1] if released else None
        return None if version == newest else f"{version} is neither released nor to come"
    if versions and numbers(coming[1]) <= versions[0]:
        return "what is to come is not newer than what is released"
    return None if version == coming[1] else f"{version} is not what is to come"


def test_changelog():
    assert fault(CHANGELOG.read_text(), mmkernels.__version__) is None


RELEASED = "## [0.2.0] - 2030-02-03\n\n### Fixed\n\n- b\n\n## [0.1.10] - 2030-01-02\n\n- a\n"
COMING = f"# Changelog\n\n## [Unreleased]\n\nTo become 0.3.0.\n\n### Added\n\n- c\n\n{RELEASED}"
OPEN = f"# Changelog\n\n## [Unreleased]\n\n{RELEASED}"


@pytest.mark.parametrize(("text", "version"), [(COMING, "0.3.0"), (OPEN, "0.2.0")])
def test_a_right_one_has_no_fault(text, version):
    assert fault(text, version) is None


@pytest.mark.parametrize(
    ("text", "version", "told"),
    [
        (RELEASED, "0.2.0", "first section"),
        (OPEN.replace("2030-02-03", "soon"), "0.2.0", "not [X.Y.Z]"),
        (OPEN.replace("0.1.10", "0.2.1"), "0.2.0", "versions"),
        (OPEN.replace("0.1.10", "0.2.0"), "0.2.0", "versions"),
        (OPEN.replace("2030-01-02", "2030-03-01"), "0.2.0", "dates"),
        (OPEN.replace("### Fixed", "### Mended"), "0.2.0", "Mended"),
        (OPEN, "0.3.0", "neither"),
        (COMING.replace("0.3.0", "0.2.0"), "0.2.0", "newer"),
        (COMING, "0.2.0", "not what is to come"),
        ("## [Unreleased]\n", "0.1.0", "neither"),
    ],
)
def test_each_fault_is_found(text, version, told):
    assert told in (fault(text, version) or "")
