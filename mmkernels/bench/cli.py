"""The command line of `python -m mmkernels bench`."""

import argparse
import datetime
import itertools
import sys
from pathlib import Path

import torch

from mmkernels._core.progress import progress
from mmkernels.bench import environment, report, run, suites


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes the JSON with its tables and plots beside it.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        The exit code: 0; 1 if a result of mmkernels is wrong or a case of it fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels bench",
        description="Time mmkernels beside its best peers, after checking the results of all.",
        epilog="Suites: " + "; ".join(f"{name}: {text}" for name, text in suites.SUITES.items()),
    )
    parser.add_argument("--suite", nargs="+", choices=suites.SUITES, default=list(suites.SUITES))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="on a GPU a few telling cases; on a CPU tiny sizes: a smoke test, not a result",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: mmkernels-bench-<device>-<date>.json"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin no case after so many seconds",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="measure nothing: make the tables and plots of this JSON again",
    )
    arguments = parser.parse_args(argv)
    if not arguments.limit >= 0:
        parser.error(f"--limit is {arguments.limit}; it must be a number of seconds, 0 or more")
    if arguments.report is not None:
        return _render(arguments.report)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slug = environment.device_name(device).replace(" ", "-")
    path = arguments.json or _unused(f"mmkernels-bench-{slug}-{datetime.date.today()}")
    if path.suffix != ".json":  # the page and the CSV have its name with another ending
        parser.error(f"--json is {path}; it must end in .json, so name it {path}.json")
    if path.exists():
        parser.error(f"--json is {path}, which is there already; move it away or name another file")
    try:  # before anything is measured
        path.parent.mkdir(parents=True, exist_ok=True)
        run.part(path).touch()
    except OSError as error:
        parser.error(f"--json is {path}, which cannot be written: {error}; name another file")
    cases = suites.cases(arguments.suite, device, arguments.quick)
    command = " ".join(("python -m mmkernels bench", *(argv if argv is not None else sys.argv[2:])))
    with progress(len(cases), "case") as step:
        data = run.measured(
            cases,
            device,
            quick=arguments.quick,
            command=command,
            limit=arguments.limit,
            save=lambda data: run.write(path, data),
            step=step,
        )
    return _render(path) or int(any(record["failed"] for record in data["records"]))


def _unused(stem: str) -> Path:
    """A name in this folder: the stem's own, else with the first number that is free."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := Path(f"{name}.json")).exists())


def _render(path: Path) -> int:
    try:
        data = report.load(path)
    except ValueError as error:
        print(f"mmkernels bench: {error}", file=sys.stderr)
        return 2
    print(report.text(data))
    print("written:", *(str(written) for written in report.write(data, path)))
    return 0
