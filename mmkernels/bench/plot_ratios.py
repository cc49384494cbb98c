"""Plots of ratios: all cases of a run at a glance, and the cases of a suite one by one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmkernels.bench import report_cells, report_rows
from mmkernels.bench.case import OURS
from mmkernels.bench.plot_style import (
    BLUE,
    GREY,
    LIGHT,
    VERMILION,
    bare,
    figure,
    labels,
    powers_of_two,
)
from mmkernels.bench.report_rows import Row, is_ours
from mmkernels.bench.report_tables import plain_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where the ratios are too close to each other for powers of two.
CLOSE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5)
LOSS, GAIN = f"{OURS} is slower", f"{OURS} is faster"


def overview(suites: Mapping[str, Sequence[Row]], place: str) -> "Figure":
    """A line for each suite, a dot for each case."""
    made = figure(1.5 + 0.62 * len(suites), "Speed-up over the best peer of each case", place)
    axes = made.subplots()
    for y, rows in enumerate(suites.values()):
        ratios = [ratio for ratio, _ in report_rows.ranked(rows)]
        # Neighbours go up and down in turns, so that they do not hide each other.
        heights = [y + 0.11 * (i % 5 - 2) for i in range(len(ratios))]
        colours = [VERMILION if ratio < 1 else BLUE for ratio in ratios]
        axes.scatter(ratios, heights, s=34, c=colours, alpha=0.75, linewidths=0, zorder=3)
        mean = report_rows.geomean(ratios)
        axes.plot([mean, mean], [y - 0.38, y + 0.38], color="black", linewidth=2, zorder=4)
        slower = sum(ratio < 1 for ratio in ratios)
        text = f"mean {report_cells.ratio(mean)}, slower in {slower} of {len(ratios)}"
        _beside(axes, y, text, VERMILION if slower else BLUE)
    _ratio_axis(axes, [ratio for rows in suites.values() for ratio, _ in report_rows.ranked(rows)])
    axes.set_yticks(range(len(suites)), suites, fontsize=11)
    axes.set_ylim(len(suites) - 0.5, -0.5)
    axes.set_xlabel("a dot is a case; the line is their geometric mean", fontsize=9)
    return made


def cases(suite: str, rows: Sequence[Row], place: str) -> "Figure":
    """A bar for each case: its ratio to the best peer; beside it the shares of the ceiling."""
    rows = [row for row in rows if row.best_peer is not None]
    texts, common = labels(rows)
    title = f"{suite}: speed-up over the best peer"
    made = figure(1.75 + 0.27 * len(rows), f"{title} ({common})" if common else title, place)
    with_shares = any(row.share(OURS) is not None for row in rows)
    widths = [5, 3] if with_shares else [1]
    panels: list[Any] = list(
        made.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths).flat
    )
    _ratios(panels[0], rows)
    if with_shares:
        _shares(panels[1], rows)
    _legend(made, panels)
    panels[0].set_yticks(range(len(rows)), texts, fontsize=8.5)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return made


def _ratios(axes: Any, rows: Sequence[Row]) -> None:
    ratios = [row.best_ratio or 1.0 for row in rows]
    plain = [row.ratio(row.plain) for row in rows]
    for y, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        colour = VERMILION if ratio < 1 else BLUE
        # Bars grow from 1, so that a loss points the other way.
        axes.barh(y, ratio - 1, 0.62, left=1, color=colour, label=LOSS if ratio < 1 else GAIN)
        _beside(axes, y, f"{report_cells.ratio(ratio)} {row.best_peer}", colour)
    # What lies far beyond all bars would press them together: it is shown as a number.
    edge = 4 * max(1.0, *ratios)
    known = [(x, y) for y, x in enumerate(plain) if x is not None and x <= edge]
    if known:
        axes.scatter(
            *zip(*known, strict=True), s=26, marker="D", facecolors="white", edgecolors="black",
            linewidths=0.9, zorder=4, label=f"over {plain_name(rows)}",
        )  # fmt: skip
    _ratio_axis(axes, ratios + [x for x, _ in known])
    for y, x in enumerate(plain):
        if x is not None and x > edge:
            axes.text(0.99, y, f"{report_cells.ratio(x)} ◇ →", fontsize=8.5, ha="right",
                      va="center", transform=axes.get_yaxis_transform())  # fmt: skip


def _shares(axes: Any, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        shares = {name: 100 * (row.share(name) or 0.0) for name in row.results}
        peers = [share for name, share in shares.items() if not is_ours(name)]
        axes.plot([min(shares.values()), max(shares.values())], [y, y], color=LIGHT, zorder=1)
        axes.plot(peers, [y] * len(peers), "o", color=GREY, markersize=4, label="a peer", zorder=2)
        axes.plot(shares[OURS], y, "o", color=BLUE, markersize=7, label=OURS, zorder=3)
    axes.set_xlim(left=0, right=max(100.0, axes.get_xlim()[1]))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(axis="x", color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title("share of the ceiling", fontsize=9, loc="left")
    bare(axes, "bottom")


def _beside(axes: Any, y: float, text: str, colour: str) -> None:
    """Text at the right edge, in line with a case."""
    axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), fontsize=8.5, color=colour,
              ha="left", va="center")  # fmt: skip


def _ratio_axis(axes: Any, ratios: Sequence[float]) -> None:
    low, high = min(0.8, 0.92 * min(ratios)), max(1.25, 1.15 * max(ratios))
    close = [tick for tick in CLOSE_TICKS if low <= tick <= high]
    ticks = close if high / low < 3.5 else powers_of_two(low, high)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}×" if tick >= 1 else f"{tick:.2g}×" for tick in ticks])
    axes.axvline(1, color="black", linewidth=0.8, zorder=2)
    axes.grid(axis="x", color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8.5)
    bare(axes, "bottom")
    axes.tick_params(axis="y", length=0)


def _legend(figure: "Figure", panels: Sequence[Any]) -> None:
    """Below all panels, each name once."""
    named: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=len(named), fontsize=8.5,
        frameon=False,
    )  # fmt: skip
