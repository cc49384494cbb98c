"""gpu.md: what gpu.json says, for people."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

COUNTS = ("passed", "failed", "error", "died", "skipped", "cut off")


def render(data: Mapping[str, Any]) -> str:
    """The page.

    Args:
        data: of gpu.json.
    """
    dry = " — DRY RUN: the CPU stood in for the GPU, nothing here is a result" * data["dry_run"]
    lines = [f"# make gpu, {data['environment']['device']}{dry}", ""]
    if not data["finished"]:
        lines += ["Not finished: this page is as far as the run has come.", ""]
    for title, section in SECTIONS.items():
        try:
            body = section(data)
        except Exception as error:  # a page must not end the run that it is about
            body = [f"This part of gpu.json could not be read: {type(error).__name__}: {error}"]
        if body:
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines)


def table(parts: Sequence[Mapping[str, Any]]) -> str:
    """The parts in columns, for the terminal."""
    rows = [(f"{part['step']}: {part['name']}", *_row(part)) for part in parts]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(part: Mapping[str, Any]) -> tuple[str, str, str]:
    """Status, seconds, and counts or the reason."""
    seconds = f"{part['seconds']:.0f} s" if "seconds" in part else ""
    said = ", ".join(f"{part[name]} {name}" for name in COUNTS if name in part)
    if part["status"] == "failed" and not part.get("failures") and "exit_code" in part:
        said = f"exit code {part['exit_code']}" + f", {said}" * bool(said)
    return part["status"], seconds, part.get("reason", said)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(_cell(word) for word in line) + " |" for line in lines]


def _cell(word: object) -> str:
    return " ".join(str(word).split()).replace("|", "\\|")


def _environment(data: Mapping[str, Any]) -> list[str]:
    rows = [(name, _flat(fact)) for name, fact in data["environment"].items() if fact]
    return _markdown(("", ""), [*rows, ("extension", data.get("extension", "not looked for"))])


def _flat(fact: object) -> object:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return fact


def _parts(data: Mapping[str, Any]) -> list[str]:
    rows = [(part["step"], part["name"], *_row(part)) for part in data["parts"]]
    note = f"Of {data['total_seconds']} seconds. All output is in gpu.log."
    return [*_markdown(("step", "part", "status", "time", "tests, or the reason"), rows), "", note]


def _failures(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for part in data["parts"]:
        for failure in part.get("failures", []):
            lines += [f"`{failure['test']}`", "", "```text", failure["message"], "```", ""]
    return lines


def _skips(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (part["name"], count, reason)
        for part in data["parts"]
        for reason, count in part.get("skips", {}).items()
    ]
    return _markdown(("part", "tests", "reason"), rows) if rows else []


def _doctor(data: Mapping[str, Any]) -> list[str]:
    if "doctor" not in data:
        return []
    if "samples" not in data["doctor"]:
        return [str(data["doctor"])]
    rows = [
        (sample, op, name, {True: "right", False: "WRONG", None: "not run"}[fact["passed"]],
         fact["detail"] or fact["problem"])
        for sample, ops in data["doctor"]["samples"].items()
        for op, backends in ops.items()
        for name, fact in backends.items()
    ]  # fmt: skip
    return _markdown(("inputs", "operation", "backend", "result", "errors, or why not"), rows)


def _tune(data: Mapping[str, Any]) -> list[str]:
    if "tune" not in data:
        return []
    if "problems" not in data["tune"]:
        return [str(data["tune"])]
    rows = []
    for name, problem in data["tune"]["problems"].items():
        table, best = problem["trials"][0], problem["best"]
        row = [name, _flat(table["config"]), _milliseconds(table["milliseconds"])]
        row += (
            [_flat(best["config"]), _milliseconds(best["milliseconds"])] if best else ["none", ""]
        )
        wrong = sum(bool(trial["problem"]) for trial in problem["trials"])
        rows.append((*row, len(problem["trials"]), wrong))
    header = ("problem", "table's", "time", "best", "time", "tried", "of them failed")
    return _markdown(header, rows)


def _milliseconds(time: float | None) -> str:
    return "failed" if time is None else f"{time:.3f} ms"


def _bench(data: Mapping[str, Any]) -> list[str]:
    if "bench" not in data:
        return []
    if "records" not in data["bench"]:
        return [str(data["bench"])]
    from mmkernels.bench import report

    return [report.markdown(data["bench"], {}, level=3)]


def limiters(data: Mapping[str, Any]) -> list[str]:
    """What limits each kernel, by backend; nothing if that was not asked."""
    lines = []
    for backend, found in data.get("profile", {}).items():
        why = f": {found['why_not_ncu']}" if "why_not_ncu" in found else ""
        lines += [f"{backend}, by {found['source']}{why}.", ""]
        if rows := found.get("rows"):
            names = [name for name in rows[0] if name != "backend"]
            lines += _markdown(names, [[_figure(row[name]) for name in names] for row in rows])
        elif "problem" in found:
            lines.append(found["problem"])
        left_out = found.get("left_out", {})
        for why in dict.fromkeys(left_out.values()):
            names = [name for name in left_out if left_out[name] == why]
            lines += ["", f"{len(names)} left out ({'; '.join(names)}): {why}"]
        lines.append("")
    return lines


def _figure(x: object) -> object:
    return f"{x:.1f}" if isinstance(x, float) else "" if x is None else x


Section = Callable[[Mapping[str, Any]], list[str]]
SECTIONS: dict[str, Section] = {
    "Environment": _environment,
    "Parts": _parts,
    "Failed tests": _failures,
    "Doctor": _doctor,
    "Tuned configurations beside the table's": _tune,
    "Benchmarks": _bench,
    "What limits each kernel": limiters,
    "Skipped tests": _skips,
}
