"""`python -m tools.model_table`: rewrites the tables of docs/models.md.

Those of transformers are of the running version, in which each row is a family of models, a tiny
one of which `mmkernels.replace` is asked about; nothing runs. The tests run the same models and
count kernels, as they do for the other libraries, whose rows say what they expect.
"""

from mmkernels import replace
from mmkernels.integrations.report import Report
from tests.integrations.families import FAMILIES
from tests.integrations.family import MAJOR
from tests.integrations.libraries import rows as library_rows
from tools.generated import ROOT, replaced, table

PAGE = ROOT / "docs" / "models.md"
# By major version: the versions that the table speaks of, as its block is called.
VERSIONS = {4: "transformers 4.57", 5: "transformers 5"}
HEADER = ["family", "attention", "patch embedding", "how it is served, or why it is left"]

LIBRARIES = ["library", "model", "attention swapped", "patch embeddings swapped", "why not all"]


def cell(report: Report, kind: str) -> str:
    """How many modules of that kind were swapped and left."""
    swapped = sum(entry.kind == kind for entry in report.swapped)
    left = sum(entry.kind == kind for entry in report.left)
    counts = [f"{swapped} swapped"] if swapped else []
    counts += [f"{left} left"] if left else []
    return ", ".join(counts) or "none"


def reasons(report: Report) -> str:
    """The reasons, once each; those of modules that were left say so."""
    swapped = dict.fromkeys(entry.reason for entry in report.swapped)
    left = dict.fromkeys(f"left: {entry.reason}" for entry in report.left)
    return "; ".join([*swapped, *left])


def block() -> str:
    """The table of the running version."""
    rows = []
    for family in FAMILIES:
        report = replace(family.build())
        kinds = [cell(report, kind) for kind in ("attention", "patch embedding")]
        rows.append([family.name, *kinds, reasons(report)])
    return table(HEADER, rows)


def page() -> str:
    """What docs/models.md should be."""
    text = replaced(PAGE.read_text(), VERSIONS[MAJOR], block())
    return replaced(text, "libraries", table(LIBRARIES, [list(row) for row in library_rows()]))


def main() -> None:
    """Rewrites the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
