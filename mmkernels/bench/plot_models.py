"""The plot of whole models: what a call takes before and after."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmkernels.bench import report_cells
from mmkernels.bench.case import OURS
from mmkernels.bench.plot_style import BLUE, GREY, LIGHT, SHORT, bare, figure
from mmkernels.bench.report_rows import Row, is_ours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2


def times(rows: Sequence[Row], place: str) -> "Figure":
    """A panel for each case, a bar for each implementation; each panel has its own axis."""
    lines = -(-len(rows) // COLUMNS)
    most = max(len(row.results) for row in rows)
    title = "Whole models before and after mm.replace: time of a call"
    made = figure(1.2 + lines * (0.55 + 0.24 * most), title, place)
    panels = made.subplots(lines, COLUMNS, squeeze=False).flat
    for axes, row in zip(panels, rows, strict=False):
        unit = report_cells.unit([row])
        values = [unit.per_second * result["median_s"] for result in row.results.values()]
        colours = [
            BLUE if is_ours(name) else GREY if name == row.plain else LIGHT for name in row.results
        ]
        bars = axes.barh(range(len(values)), values, 0.7, color=colours)
        texts = [
            f"{report_cells.number(value)} {unit.name}"
            + ("" if name == OURS else f", {report_cells.ratio(result.get('ratio'))}")
            for value, (name, result) in zip(values, row.results.items(), strict=True)
        ]
        axes.bar_label(bars, texts, fontsize=8, padding=3)
        axes.set_yticks(range(len(values)), row.results, fontsize=8.5)
        axes.set_ylim(most - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * max(values))  # leaves room for the texts
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        record = row.record
        parts = record["name"], *(SHORT.get(record[k], record[k]) for k in ("dtype", "mode"))
        axes.set_title(", ".join(parts), fontsize=9, loc="left")
        bare(axes, "left")
    note = (
        "blue: mmkernels; dark: the model as it was; ×: how often faster mmkernels is than that bar"
    )
    made.supxlabel(note, fontsize=9)
    for axes in list(panels):
        axes.axis("off")
    return made
