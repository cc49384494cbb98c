"""The plots of a run, as PNGs; none where matplotlib is missing."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkernels.bench import plot_models, plot_ratios, plot_scaling, report_about, report_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the suite's own plot; one with more cases than this is split by mode.
MOST_ROWS = 36


def why_not() -> str | None:
    """Why there are no plots; None where there are."""
    if importlib.util.find_spec("matplotlib") is None:
        return "Plots are left out: matplotlib is not installed (pip install matplotlib)."
    return None


def save(data: Mapping[str, Any], stem: Path, source: str) -> dict[str, Path]:
    """Draws all plots.

    Args:
        data: of a run.
        stem: what the files' names begin with; each ends with "-<plot>.png".
        source: kept in the metadata of every PNG: where the JSON is.

    Returns:
        Plot -> file.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, draw in plots(data).items() if why_not() is None else ():
        files[name] = stem.with_name(f"{stem.name}-{name}.png")
        draw().savefig(files[name], dpi=150, metadata={"Software": None, "Source": source})
    return files


def plots(data: Mapping[str, Any]) -> dict[str, Callable[[], "Figure"]]:
    """Every plot that has something to show, by name, and what draws it.

    A plot is called "overview" or after its suite: "scaling", "scaling-growth".
    """
    place, suites = report_about.place(data), report_rows.suites(data)
    compared = {name: rows for name, rows in suites.items() if report_rows.ranked(rows)}
    found: dict[str, Callable[[], Figure]] = {}
    if compared:
        found["overview"] = partial(plot_ratios.overview, compared, place)
    for suite, rows in suites.items():
        modes = list(dict.fromkeys(row.record["mode"] for row in rows))
        parts = [[row for row in rows if row.record["mode"] == mode] for mode in modes]
        for index, part in enumerate([rows] if len(rows) <= MOST_ROWS else parts):
            if report_rows.ranked(part):
                name = f"{suite}-{index + 1}" if index else suite
                found[name] = partial(plot_ratios.cases, suite, part, place)
        if suite == "models":
            found["models-times"] = partial(plot_models.times, rows, place)
        if any(row.record["scale"] for row in rows):
            found[f"{suite}-growth"] = partial(plot_scaling.growth, rows, place)
    return found
