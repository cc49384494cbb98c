"""What a run's JSON says, as text, Markdown, CSV and plots."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkernels._core.markdown import aligned_table, table
from mmkernels.bench import report_about, report_csv, report_plots, report_rows, report_tables, run

NOTES = """\
Times are median ± interquartile range, in turns with the others in one process. “Over” is how often
faster mmkernels is: the ratio of the medians; below 1, in bold, it is the slower one. “Of turns” is
the median of the ratios within a turn. The ceiling is the longer of two times: the products at the
speed of a large matrix product of that dtype, the bytes at the speed of a large copy, both measured
in this run; what fits into a cache may pass it. The rate counts what is asked for: no hidden pair
of a mask, each input and output once. Peak memory is torch's allocator's, results included and
inputs not. The first call includes what is done once, such as compiling. A timer is the host's
clock, events around a call on the device alone, or the wall: what a user
waits for, launches included. Every result obeyed the error rule before it was timed; the largest
error is against the float64 reference."""


def load(path: Path) -> dict[str, Any]:
    """The data of a run, of `python -m mmkernels bench` or pytest-benchmark.

    Args:
        path: of the JSON.

    Raises:
        ValueError: it is no JSON of a run of this version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON of a run: {error}") from error
    if isinstance(data, dict) and "ceilings" in data.get("machine_info", ()):
        data = _of_pytest_benchmark(data)
    if not isinstance(data, dict) or data.get("schema") != run.SCHEMA:
        raise ValueError(
            f"{path} is no JSON of a run of this version (schema {run.SCHEMA}); make one with "
            "`python -m mmkernels bench`"
        )
    return data


def _of_pytest_benchmark(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same data from where pytest-benchmark keeps them."""
    environment = dict(data["machine_info"])
    without_numbers = environment.pop("without_numbers", [])
    return {
        "schema": run.SCHEMA,
        "ceilings": environment.pop("ceilings"),
        "environment": environment,
        "records": [*(one["extra_info"] for one in data["benchmarks"]), *without_numbers],
        "not_reached": [],
        "finished": False,  # it does not say what else was asked for
    }


def text(data: Mapping[str, Any]) -> str:
    """The summary that the terminal shows."""
    facts = report_about.facts(data).items()
    parts = ["\n".join(f"{name}: {fact}" for name, fact in facts), *report_about.labels(data)]
    for suite, rows in report_rows.suites(data).items():
        parts += [suite, aligned_table(*report_tables.short(rows)), report_tables.summary(rows)]
    header, lines = report_tables.left_out(data)
    parts += [aligned_table(header, lines)] if lines else []
    parts += [*filter(None, [report_plots.why_not()]), *failures(data)]
    return "\n\n".join(parts)


def markdown(
    data: Mapping[str, Any], images: Mapping[str, str], *, note: str = "", level: int = 1
) -> str:
    """The page of a run.

    Args:
        data: of `load`.
        images: plot -> where it is, seen from the page; those of a suite come below its heading.
        note: what else to say at the top.
        level: of the page's heading; more, to put it into another page.
    """
    parts = [f"{'#' * level} Benchmarks: {data['environment']['device']}", *filter(None, [note])]
    parts += [f"**{label}**" for label in report_about.labels(data)]
    parts += failures(data)
    parts.append(table(["", ""], [[name, fact] for name, fact in report_about.facts(data).items()]))
    parts += [_shown(name, link) for name, link in images.items() if name == "overview"]
    parts.append(NOTES)
    heading = "#" * (level + 1)
    for suite, rows in report_rows.suites(data).items():
        parts += [f"{heading} {suite.capitalize()}", report_tables.summary(rows)]
        parts += [
            _shown(name, link) for name, link in images.items() if name.partition("-")[0] == suite
        ]
        parts += [
            table(*report_tables.headline(rows)),
            f"<details><summary>Every implementation: {suite}</summary>",
            table(*report_tables.every(rows)),
            "</details>",
        ]
    header, lines = report_tables.left_out(data)
    parts += [f"{heading} Left out", table(header, lines)] if lines else []
    if data["not_reached"]:
        parts += [f"{heading} Not reached", "\n".join(f"- {x}" for x in data["not_reached"])]
    parts += filter(None, [None if images else report_plots.why_not()])
    return "\n\n".join(parts) + "\n"


def write(data: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes a page, a CSV and plots beside a JSON.

    Args:
        data: of a run.
        path: its JSON; the others have its name with another ending.

    Returns:
        What was written.
    """
    plots = report_plots.save(data, path.with_suffix(""), path.name)
    page, csv = path.with_suffix(".md"), path.with_suffix(".csv")
    page.write_text(markdown(data, {n: f.name for n, f in plots.items()}), encoding="utf-8")
    csv.write_text(report_csv.text(data), encoding="utf-8")
    return [path, page, csv, *plots.values()]


def failures(data: Mapping[str, Any]) -> Iterator[str]:
    """A loud line for each case in which an implementation of mmkernels is wrong."""
    for case, reason in report_rows.failed(data).items():
        yield f"**FAILED**: {case}: {reason}"


def _shown(plot: str, link: str) -> str:
    return f"![{plot.replace('-', ': ')}]({link})"
