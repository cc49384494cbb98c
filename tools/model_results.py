"""`python -m tools.model_results`: what README and docs say of the trained model, from run.json."""

import json

from mmkernels.models.trained import TINY
from mmkernels.training import report
from tools.generated import ROOT, replaced, table

README, PAGE = ROOT / "README.md", ROOT / "docs" / "multimodal.md"
NAME = "model results"


def readme() -> str:
    """What README.md should be."""
    record = json.loads((TINY / report.RUN).read_text())
    block = table(report.HEADER, report.rows(record))
    return replaced(README.read_text(), NAME, f"{report.origin(record)}\n\n{block}")


def page() -> str:
    """What docs/multimodal.md should be."""
    record = json.loads((TINY / report.RUN).read_text())
    parts = [
        report.origin(record),
        table(report.HEADER, report.rows(record)),
        report.judged(record),
        report.harder(record),
        "Is it fair to each?",
        *report.fairness(record),
    ]
    block = "\n\n".join(part for part in parts if part)
    return replaced(PAGE.read_text(), NAME, block)


def main() -> None:
    """Rewrites both."""
    README.write_text(readme())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
