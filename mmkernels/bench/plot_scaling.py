"""The plot of a scaling: time and memory over the sequence, with their slopes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mmkernels.bench.plot_style import LIGHT, bare, colour, figure
from mmkernels.bench.report_rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a result -> how the axis calls it, and how many of its unit are one of the axis'.
QUANTITIES = {"median_s": ("ms", 1e-3), "peak_bytes": ("peak MiB", 2**20)}

Points = Mapping[str, Sequence[tuple[float, float]]]


def growth(rows: Sequence[Row], place: str) -> "Figure":
    """A panel for each mask and quantity, a line for each implementation."""
    scaled = [row for row in rows if row.record["scale"]]
    masks = list(dict.fromkeys(row.record["mask"] for row in scaled))
    names = list(dict.fromkeys(name for row in scaled for name in row.results))
    record = scaled[0].record
    title = f"Growth with the sequence: {record['name']}, {record['dtype']}, {record['mode']}"
    made = figure(7.2, title, place)
    panels = made.subplots(2, len(masks), sharex=True, sharey="row", squeeze=False)
    for line, (quantity, (unit, size)) in zip(panels, QUANTITIES.items(), strict=True):
        for axes, mask in zip(line, masks, strict=True):
            some = [row for row in scaled if row.record["mask"] == mask]
            for name, found in points(some, quantity, size).items():
                exponent = slope(found)
                text = name if exponent is None else f"{name}, slope {exponent:.2f}"
                xs, ys = zip(*found, strict=True)
                axes.plot(xs, ys, "o-", color=colour(name, names), markersize=4, label=text)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            low, high = axes.get_ylim()
            if high / low < 20:  # too few powers of ten to read it by
                axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(color=LIGHT, linewidth=0.5)
            axes.tick_params(labelsize=8.5)
            axes.legend(fontsize=8, frameon=False, loc="upper left")
            bare(axes, "left", "bottom")
        line[0].set_ylabel(unit)
    for top, bottom, mask in zip(*panels, masks, strict=True):
        top.set_title(mask or "no mask", fontsize=10)
        bottom.set_xlabel("S", fontsize=9)
    return made


def points(rows: Sequence[Row], quantity: str, size: float) -> Points:
    """By implementation the sizes and what was measured at each; 0 has no place on a log axis."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row.record["scale"])):
        for name, result in row.results.items():
            if result[quantity] > 0:
                pair = row.record["scale"], result[quantity] / size
                found.setdefault(name, []).append(pair)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent of the power law nearest to the points, by least squares of their logarithms.

    None: they are fewer than two.
    """
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    if spread == 0:
        return None
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread
