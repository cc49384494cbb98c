"""`python -m benchmarks.report [JSON]`: the published tables and plot, from what a benchmark wrote.

Rewrites the generated blocks of README.md and docs/performance.md, one of attention and one of the
patch embedding, and docs/images/speedup.png. Without an argument each takes the newest JSON below
benchmarks/results/ that has it, a smoke test only if there is nothing else.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report_patches
from benchmarks.cells import met, milliseconds, ratio
from tools.generated import ROOT, replaced, table

RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "images" / "speedup.png"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
SMOKE = "Smoke test, not a result"
ATTENTION = "speed-up"
# Name of a generated block -> the kind of benchmarks that it shows.
BLOCKS = {"results": ATTENTION, "patch results": report_patches.KIND}


class Row(NamedTuple):
    """One implementation beside one peer.

    Attributes:
        info: the benchmark's extra_info.
        peer: name of the peer and what it is given.
        times: the peer's, with its ratios.
        target: the ratio to reach, if there is one.
    """

    info: dict[str, Any]
    peer: str
    times: dict[str, Any]
    target: float | None

    @property
    def column(self) -> str:
        return f"{self.info['dtype']}, {self.info['mode']}"


class Run:
    """One run of the benchmarks.

    Attributes:
        path: where its JSON is, once it is written.
        environment: what the numbers depend on.
    """

    def __init__(self, data: dict[str, Any], path: Path = RESULTS) -> None:
        self._data, self.path = data, path.resolve()
        self.environment: dict[str, Any] = data["machine_info"]

    @classmethod
    def load(cls, path: Path) -> "Run":
        return cls(json.loads(path.read_text()), path)

    @property
    def quick(self) -> bool:
        return self.environment["quick"]

    @property
    def when(self) -> str:
        return self._data["datetime"]

    def infos(self, kind: str) -> list[dict[str, Any]]:
        """The extra_info of all benchmarks of a kind."""
        infos = (benchmark["extra_info"] for benchmark in self._data["benchmarks"])
        return [info for info in infos if info["kind"] == kind]

    def rows(self, kind: str = "speed-up") -> Iterator[Row]:
        """All comparisons of a kind, those with SDPA first."""
        infos = self.infos(kind)
        for info in infos:
            yield Row(info, f"SDPA, {info['sdpa_given']}", info["peers"]["SDPA"], info["target"])
        for info in infos:
            for name, times in info["peers"].items():
                if name != "SDPA":
                    yield Row(info, name, times, None)

    def about(self, link_from: Path) -> str:
        """Markdown: what was measured where; links to the JSON from the folder `link_from`."""
        env, commit = self.environment, self._data["commit_info"]
        changed = ", with uncommitted changes" if commit["dirty"] else ""
        variables = "".join(f", {name}={value}" for name, value in env["variables"].items())
        link = os.path.relpath(self.path, link_from)
        shapes = ", ".join(dict.fromkeys(info["shape"] for info in self.infos(ATTENTION)))
        facts = [
            *filter(None, [shapes]),
            f"{env['cpu']} ({env['cpu_capability']}), {env['threads']} threads{variables}",
            env["os"],
            f"Python {env['python']}",
            f"torch {env['torch']}",
            f"mmkernels {env['mmkernels']} at {commit['id'][:7]}{changed}",
            f"{self.when[:10]}, load before the run {env['load_average']:.1f}",
            f"seed {env['seed']}",
            f"[all times]({link}) of `{env['command']}`",
        ]
        label = f"**{SMOKE}**: its sizes say nothing about speed. " if self.quick else ""
        return f"{label}{'; '.join(facts)}."


def summary(run: Run) -> str:
    """README's table: the speed-up of each mask, and the losses in words."""
    rows = list(run.rows())
    columns = list(dict.fromkeys(row.column for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.info["mask"], row.peer), {})[row.column] = times_text(row)
    lines = [[*key, *(line.get(column, "") for column in columns)] for key, line in cells.items()]
    slower = [row for row in rows if row.times["ratio"] < 1]
    text = f"Below 1, mmkernels is the slower one: in {len(slower)} of {len(rows)} cells"
    if slower:
        worst = min(slower, key=lambda row: row.times["ratio"])
        where = f"{worst.info['mask']}, {worst.column}, beside {worst.peer}"
        text += f", at worst {times_text(worst)} ({where})"
    short = [row.times["ratio"] for row in run.rows("short")]
    if short:
        shape = run.infos("short")[0]["shape"]
        text += (
            f". At {shape}, float32, forward, the masks get {min(short):.2f}× to {max(short):.2f}×"
        )
    return "\n\n".join(
        (run.about(README.parent), table(["mask", "beside", *columns], lines), f"{text}.")
    )


def details(run: Run) -> str:
    """The results in docs/performance.md."""
    return f"{run.about(PERFORMANCE.parent)}\n\n{attention_tables(run)}"


def tables(run: Run) -> str:
    """All numbers of the kinds of benchmarks that ran."""
    parts = [attention_tables(run)] if run.infos(ATTENTION) else []
    if patches := run.infos(report_patches.KIND):
        parts += [f"### {report_patches.TITLE}", report_patches.details(patches)]
    return "\n\n".join(parts)


def attention_tables(run: Run) -> str:
    """Attention's numbers."""
    parts = []
    for title, kind, render in (
        ("### Speed", "speed-up", speed_table),
        ("### Short sequences", "short", short_table),
        ("### Growth with the sequence", "growth", growth_table),
        ("### Overhead of a call", "overhead", overhead_table),
    ):
        if run.infos(kind):
            parts += [title, render(run)]
    return "\n\n".join(parts)


def times_text(row: Row) -> str:
    return ratio(row.times["ratio"])


def speed_table(run: Run) -> str:
    note = "Milliseconds are median ± interquartile range. Speed-up is the ratio of the medians; "
    note += "“of pairs” the median of the ratios of neighbouring runs."
    return f"{comparison(run.rows())}\n\n{note}"


def short_table(run: Run) -> str:
    text = "where cutting up a mask may cost more than it saves; no target."
    return f"{run.infos('short')[0]['shape']}, {text}\n\n{comparison(run.rows('short'))}"


def comparison(compared: Iterable[Row]) -> str:
    header = ["mask", "dtype", "mode", "beside", "mmkernels ms", "peer ms", "speed-up", "of pairs"]
    header += ["target", "met"]
    rows = []
    for row in compared:
        info, target = row.info, row.target
        rows.append([
            info["mask"], info["dtype"], info["mode"], row.peer,
            milliseconds(info["ours"]), milliseconds(row.times),
            times_text(row), f"{row.times['pairwise_ratio']:.2f}×",
            f"{target:.2f}×" if target else "",
            met(row.times["ratio"] >= target) if target else "",
        ])  # fmt: skip
    return table(header, rows)


def growth_table(run: Run) -> str:
    (info,) = run.infos("growth")
    rows = []
    for shape, times in info["times"].items():
        memory = info["memory_bytes"][shape]
        sizes = (memory["after"], memory["after"] - memory["before"], memory["tensors"])
        cells = [f"{size / 2**20:.0f}" for size in (*sizes, info["dense_mask_bytes"][shape])]
        rows.append([shape, milliseconds(times), *cells])
    ratios = [f"{info[name]:.2f}" for name in ("time_ratio", "memory_ratio")]
    target = info["target"]
    reached = met(max(info["time_ratio"], info["memory_ratio"]) <= target)
    rows.append(["ratio", ratios[0], "", ratios[1], "", "4.00"])
    header = [f"{info['mask']}, {info['dtype']}, {info['mode']}", "ms", "peak MiB"]
    header += ["of which the call", "of which q, k, v, out", "a dense bool mask alone"]
    note = (
        "Memory is in MiB; the peak is VmHWM of a fresh process. Twice the sequence is to take at "
        f"most {target} times the time and the call's memory; met: {reached}."
    )
    return f"{table(header, rows)}\n\n{note}"


def overhead_table(run: Run) -> str:
    rows = []
    for info in run.infos("overhead"):
        best, limit = info["best_us"], info["target"]
        numbers = [f"{best['mmkernels']:.1f}", f"{best['SDPA']:.1f}", f"{info['added_us']:.1f}"]
        verdict = ["", ""] if limit is None else [str(limit), met(info["added_us"] <= limit)]
        rows.append([info["mode"], *numbers, *verdict])
    info = run.infos("overhead")[0]
    header = [
        f"{info['shape']}, {info['dtype']}",
        "mmkernels µs",
        "SDPA µs",
        "added µs",
        "limit",
        "met",
    ]
    loops = f"Best of {len(info['ours']['times_s'])} loops of {info['calls']} calls, in turns."
    return f"{table(header, rows)}\n\n{loops}"


def plot(run: Run, path: Path) -> None:
    """Bars of the speed-up over SDPA, on a logarithmic axis."""
    from matplotlib.figure import Figure

    rows = [row for row in run.rows() if row.target]
    masks = list(dict.fromkeys(row.info["mask"] for row in rows))
    columns = list(dict.fromkeys(row.column for row in rows))
    colors = ["#08519c", "#6baed6", "#a63603", "#fdae6b"]
    width = 0.8 / len(columns)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (column, color) in enumerate(zip(columns, colors, strict=True)):
        speedups = {row.info["mask"]: row.times["ratio"] for row in rows if row.column == column}
        places = [masks.index(mask) + (index - (len(columns) - 1) / 2) * width for mask in speedups]
        # Bars grow from 1, so that a loss hangs below the line.
        heights = [speedup - 1 for speedup in speedups.values()]
        bars = axes.bar(places, heights, width, bottom=1, color=color, label=column)
        labels = [f"{speedup:.2g}" for speedup in speedups.values()]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}×")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(masks)), masks, fontsize=9)
    axes.set_ylabel("speed-up over SDPA")
    shape = rows[0].info["shape"]
    title = f"mm.attention beside F.scaled_dot_product_attention, {shape}"
    subtitle = SMOKE if run.quick else run.environment["cpu"]
    axes.set_title(f"{title}\n{subtitle}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(columns), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, "Source": str(run.path.relative_to(ROOT))}
    figure.savefig(path, dpi=150, metadata=metadata)


def patch_summary(run: Run) -> str:
    """README's table of the patch embedding."""
    patches = report_patches.summary(run.infos(report_patches.KIND))
    return f"{patches}\n\n{run.about(README.parent)}"


def patch_details(run: Run) -> str:
    """The patch embedding in docs/performance.md."""
    patches = report_patches.details(run.infos(report_patches.KIND))
    return f"{run.about(PERFORMANCE.parent)}\n\n{patches}"


RENDER = {"results": (summary, details), "patch results": (patch_summary, patch_details)}


def pages(runs: dict[str, Run]) -> dict[Path, str]:
    """Every page with generated results -> its text; `runs` by block, others stay as they are."""
    texts = {path: path.read_text() for path in (README, PERFORMANCE)}
    for block, run in runs.items():
        for path, render in zip(texts, RENDER[block], strict=True):
            texts[path] = replaced(texts[path], block, render(run))
    return texts


def newest() -> dict[str, Run]:
    """By block the newest committed run that has it and is no smoke test, else one that is."""
    runs = [Run.load(path) for path in RESULTS.glob("*/*.json")]
    if not runs:
        raise FileNotFoundError(f"no JSON below {RESULTS.relative_to(ROOT)}; run `make bench`")
    return having(runs)


def having(runs: list[Run]) -> dict[str, Run]:
    """By block the newest of these runs that has it."""
    found = {block: [run for run in runs if run.infos(kind)] for block, kind in BLOCKS.items()}
    return {
        block: max(some, key=lambda run: (not run.quick, run.when))
        for block, some in found.items()
        if some
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", nargs="?", type=Path, help="what a benchmark wrote")
    arguments = parser.parse_args(argv)
    runs = having([Run.load(arguments.json)]) if arguments.json else newest()
    for path, text in pages(runs).items():
        path.write_text(text)
    if "results" in runs:
        plot(runs["results"], PLOT)
    shown = ", ".join(f"{block}: {run.path.name}" for block, run in runs.items())
    print(f"README.md, docs/performance.md and docs/images/speedup.png now show {shown}")


if __name__ == "__main__":
    main()
