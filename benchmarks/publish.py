"""`python -m benchmarks.publish`: README's results and a page for each device, from committed runs.

Of every folder below benchmarks/results/ it takes the newest JSON of the present schema that is no
smoke test, a whole and full run before any other. It rewrites the blocks of README.md and
docs/performance.md, and writes docs/results/<device>.md and .csv and docs/images/<device>-*.png.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmkernels.bench import (
    report,
    report_about,
    report_cells,
    report_csv,
    report_plots,
    report_rows,
)
from mmkernels.bench.report_rows import Row
from mmkernels.bench.report_tables import losses, plain_name, without_empty
from tools.generated import ROOT, replaced, table

RESULTS, PAGES, IMAGES = "benchmarks/results", "docs/results", "docs/images"
# Of the last run of `make gpu`; renamed, its bench.json is a result.
OF_MAKE_GPU = ("gpu.json", "bench.json")
BEGIN, END = "<!-- begin run: written by `make bench-report` -->", "<!-- end run -->"
# What the blocks say, beside older results, until there is a run to publish.
NO_RUN = "No run of the present suite is published yet; these are of the one before it."
NO_GPU = "Not yet measured on a GPU."
# Suites that README shows case by case.
SHOWN = ("attention", "patches", "models")


class Run(NamedTuple):
    """A run to publish: where its JSON is, below the root, and what `report.load` gives of it."""

    path: Path
    data: dict[str, Any]

    @property
    def device(self) -> str:
        """The name of its folder."""
        return self.path.parent.name

    @property
    def on_a_gpu(self) -> bool:
        return self.data["environment"]["device_type"] == "cuda"

    @property
    def rank(self) -> tuple[bool, bool, int, str]:
        environment = self.data["environment"]
        suites = len({record["suite"] for record in self.data["records"]})
        return self.data["finished"], not environment["quick"], suites, environment["date"]

    @property
    def images(self) -> dict[str, str]:
        """Plot -> its file below the root."""
        return {
            name: f"{IMAGES}/{self.device}-{name}.png" for name in report_plots.plots(self.data)
        }


def newest(root: Path) -> list[Run]:
    """One run for each device, GPUs first."""
    found: dict[str, Run] = {}
    for path in sorted((root / RESULTS).glob("*/*.json")):
        if path.name in OF_MAKE_GPU:
            continue
        try:
            run = Run(path.relative_to(root), report.load(path))
        except ValueError:  # of another schema: kept, because pages link to it, and not shown
            continue
        best = found.get(run.device)
        if not report_about.is_smoke(run.data) and (best is None or run.rank > best.rank):
            found[run.device] = run
    return sorted(found.values(), key=lambda run: (not run.on_a_gpu, run.device))


def texts(root: Path, runs: Sequence[Run]) -> dict[Path, str]:
    """Every generated file that is text -> what it has to say."""
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    plot = f"![Speed-up over the best peer, case by case]({runs[0].images['overview']})"
    text = replaced(readme.read_text(encoding="utf-8"), "plot", plot)
    found = {readme: replaced(text, "results", "\n\n".join(_results(runs)))}
    pages = "\n".join(
        f"- [{run.data['environment']['device']}](results/{run.device}.md): "
        f"{report_about.place(run.data)}"
        for run in runs
    )
    found[performance] = replaced(performance.read_text(encoding="utf-8"), "results", pages)
    for run in runs:
        note = f"[All times](../../{run.path.as_posix()}), [the numbers as CSV]({run.device}.csv)."
        images = {name: f"../{file.removeprefix('docs/')}" for name, file in run.images.items()}
        page = root / PAGES / f"{run.device}.md"
        found[page] = f"{BEGIN}\n\n{report.markdown(run.data, images, note=note)}\n{END}\n"
        found[page.with_suffix(".csv")] = report_csv.text(run.data)
    return found


def _results(runs: Sequence[Run]) -> Iterator[str]:
    """README's: for each device a line for each suite, some suites' cases, and the losses."""
    if not any(run.on_a_gpu for run in runs):
        yield NO_GPU
    for run in runs:
        facts = report_about.facts(run.data)
        yield (
            f"**{run.data['environment']['device']}.** {report_about.place(run.data)}; mmkernels "
            f"{facts['mmkernels']}; load before the run {facts['load before the run']}; "
            f"[every number]({PAGES}/{run.device}.md), [all times]({run.path.as_posix()}) of "
            f"{facts['command']}."
        )
        yield from report_about.labels(run.data)
        yield from report.failures(run.data)
        suites = report_rows.suites(run.data)
        compared = {name: rows for name, rows in suites.items() if report_rows.ranked(rows)}
        header = ["suite", "cases", "over the best peer", "worst to best", "slower in"]
        header.append("over the plain call")
        yield table(header, [[name, *_line(rows)] for name, rows in compared.items()])
        for name in filter(compared.get, SHOWN):
            rows = compared[name]
            yield f"{name.capitalize()}, over the best peer and over {plain_name(rows)}:"
            yield table(*_cases(rows))
        yield "\n".join(f"- {name}: {losses(rows)}" for name, rows in compared.items())


def _line(rows: Sequence[Row]) -> list[str]:
    """A suite in numbers: geometric means, the range, the losses."""
    ratios = [ratio for ratio, _ in report_rows.ranked(rows)]
    ends = [report_cells.ratio(ratio, marked=True) for ratio in (ratios[0], ratios[-1])]
    plain = report_rows.geomean(row.ratio(row.plain) for row in rows)
    return [
        str(len(ratios)),
        report_cells.ratio(report_rows.geomean(ratios), marked=True),
        " to ".join(ends),
        str(sum(ratio < 1 for ratio in ratios)),
        f"{report_cells.ratio(plain, marked=True)}, {plain_name(rows)}" if plain else "",
    ]


def _cases(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line for each problem, a column for each dtype and mode."""
    columns = list(dict.fromkeys((row.record["dtype"], row.record["mode"]) for row in rows))
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        record = row.record
        ratios = (row.best_ratio, row.ratio(row.plain))
        cell = ", ".join(report_cells.ratio(ratio, marked=True) for ratio in ratios)
        line = lines.setdefault((record["name"], record["shape"], record["mask"]), {})
        line[record["dtype"], record["mode"]] = cell
    header = ["model", "shape", "mask", *(", ".join(column) for column in columns)]
    return without_empty(
        header, [[*key, *(line.get(c, "") for c in columns)] for key, line in lines.items()]
    )


def main(root: Path = ROOT) -> int:
    """Writes all that is generated; returns the exit code."""
    runs = newest(root)
    if not runs:
        print(f"no run to publish below {RESULTS}; make one with `make bench`", file=sys.stderr)
        return 1
    if missing := report_plots.why_not():
        print(f"nothing is published: {missing}", file=sys.stderr)
        return 1
    for run in runs:
        for old in (root / IMAGES).glob(f"{run.device}-*.png"):
            old.unlink()
    for run in runs:
        report_plots.save(run.data, root / IMAGES / run.device, run.path.as_posix())
    for path, text in texts(root, runs).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("README.md and docs/ now show", *(str(run.path) for run in runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
