"""The tables of a suite, and what is said below them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmkernels.bench import report_cells as cells
from mmkernels.bench import report_rows
from mmkernels.bench.case import OURS
from mmkernels.bench.report_rows import Row

Table = tuple[list[str], list[list[str]]]


def headline(rows: Sequence[Row]) -> Table:
    """One line a case: mmkernels, the best peer, and what a model calls without mmkernels."""
    unit = cells.unit(rows)
    header, lines = _cases(rows)
    header += [f"{OURS} {unit.name}", "rate", "of the ceiling", "best peer", f"its {unit.name}"]
    header += ["over it", f"over {plain_name(rows)}", "peak MiB", "best peer's"]
    for row, line in zip(rows, lines, strict=True):
        best = row.best_peer
        peer = ["", "", "", ""]
        if best is not None:
            result = row.results[best]
            ratio = cells.ratio(row.best_ratio, marked=True)
            peer = [best, cells.time(result, unit), ratio, cells.mebibytes(result)]
        line += [cells.time(row.ours, unit), cells.rate(row, OURS), cells.percent(row.share(OURS))]
        line += [*peer[:3], cells.ratio(row.ratio(row.plain), marked=True)]
        line += [cells.mebibytes(row.ours), peer[3]]
    return without_empty(header, lines)


def every(rows: Sequence[Row]) -> Table:
    """One line for each implementation of each case."""
    unit = cells.unit(rows)
    case_header, case_lines = _cases(rows)
    header = [*case_header, "implementation", unit.name, "rate", "of the ceiling"]
    header += [f"{OURS} is faster", "of turns", "peak MiB", "first call s", "launch µs", "timer"]
    header += ["largest error"]
    lines = []
    for row, case in zip(rows, case_lines, strict=True):
        for name, result in row.results.items():
            launch = result["launch_s"]
            lines.append([
                *case, name, cells.time(result, unit), cells.rate(row, name),
                cells.percent(row.share(name)), cells.ratio(result.get("ratio"), marked=True),
                cells.ratio(result.get("pairwise_ratio")), cells.mebibytes(result),
                cells.number(result["first_call_s"]),
                "" if launch is None else cells.number(1e6 * launch),
                result["timer"], f"{result['max_error']:.1e}",
            ])  # fmt: skip
    return without_empty(header, lines)


def short(rows: Sequence[Row]) -> Table:
    """The ratios alone, for a terminal."""
    unit = cells.unit(rows)
    header = ["case", f"{OURS} {unit.name}", "best peer", "over it", f"over {plain_name(rows)}"]
    lines = [
        [
            str(row), cells.time(row.ours, unit), row.best_peer or "",
            cells.ratio(row.best_ratio), cells.ratio(row.ratio(row.plain)),
        ]
        for row in rows
    ]  # fmt: skip
    return header, lines


def summary(rows: Sequence[Row]) -> str:
    """The mean, the losses and the worst case, in words."""
    ranked = report_rows.ranked(rows)
    if not ranked:
        return "No case has a peer here."
    mean = report_rows.geomean(ratio for ratio, _ in ranked)
    plain = report_rows.geomean(row.ratio(row.plain) for row in rows)
    text = f"Over the best peer of each case {cells.ratio(mean)}"
    if plain is not None:
        text += f", over {plain_name(rows)} {cells.ratio(plain)} (geometric means)"
    text += f". {losses(rows)}"
    if alone := len(rows) - len(ranked):
        text += f" {alone} of {len(rows)} cases have no peer here."
    return text


def losses(rows: Sequence[Row]) -> str:
    """In how many cases mmkernels is the slower one, and the worst of all."""
    ranked = report_rows.ranked(rows)
    ratio, worst = ranked[0]
    slower = sum(ratio < 1 for ratio, _ in ranked)
    where = f"{cells.ratio(ratio)} ({worst}, beside {worst.best_peer})"
    return f"Slower than the best peer in {slower} of {len(ranked)} cases; at worst {where}."


def plain_name(rows: Sequence[Row]) -> str:
    """What the rows' plain peer is called."""
    names = dict.fromkeys(row.plain.partition(" (")[0] for row in rows if row.plain)
    return " or ".join(names) if 0 < len(names) <= 2 else "plain torch"


def left_out(data: Mapping[str, Any]) -> Table:
    """What did not take part, and why."""
    groups = report_rows.left_out(data)
    lines = [[group.reason, "; ".join(group.names), str(group.cases)] for group in groups]
    return ["why", "left out", "cases"], lines


def _cases(rows: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.record["name"],
        "shape": lambda row: row.record["shape"],
        "mask": lambda row: row.record["mask"],
        "dtype": lambda row: row.record["dtype"],
        "mode": lambda row: row.record["mode"],
    }
    return list(columns), [[column(row) for column in columns.values()] for row in rows]


def without_empty(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """The table without the columns that have nothing in any line."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
