"""`python -m tools.tuning_table RUN.json`: puts what a run of `tune` measured into the package.

RUN.json is the output of `python -m mmkernels tune --json`, or a report that holds it under "tune",
as that of `make gpu`. It goes to `mmkernels/_core/tuned/`, one file a GPU model; what is there of
other problems stays. Nothing is written unless all of the run is right.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mmkernels._core import tuning_entries, tuning_store
from mmkernels._core.tuning_choice import ALL_KERNELS
from mmkernels._core.tuning_entries import Entry

WANTED = "the output of python -m mmkernels tune --json, or a report that has it as 'tune'"
VERSIONS = ("triton", "torch", "mmkernels", "kernels")


def _entry(name: str, problem: Any) -> Entry | None:
    """The best of a problem, or None if none was right."""
    if not isinstance(problem, dict) or "best" not in problem:
        raise ValueError(f"the problem {name!r} has no 'best'; wanted: {WANTED}")
    if (best := problem["best"]) is None:
        return None
    if flaw := tuning_entries.flaw(best):
        raise ValueError(f"{flaw}; wanted: an entry as `tune` writes it")
    if best["problem"] != name:
        raise ValueError(f"the problem {name!r} has an entry of {best['problem']!r}")
    if name.split()[0] not in ALL_KERNELS:
        raise ValueError(
            f"the problem {name!r} is of no kernel; there are {', '.join(ALL_KERNELS)}"
        )
    if "milliseconds" not in best:
        raise ValueError(f"the entry of {name!r} has no milliseconds")
    if missing := [x for x in VERSIONS if not isinstance(best.get(x), str)]:
        raise ValueError(
            f"the entry of {name!r} lacks {', '.join(missing)}; wanted: what it was measured with"
        )
    return best


def entries(run: Any) -> tuple[str, list[Entry]]:
    """The GPU's name, and an entry for each problem that has a right configuration.

    Raises:
        ValueError: it is no run of `tune` on a GPU; says what is wrong, and what it wants.
    """
    run = run["tune"] if isinstance(run, dict) and "tune" in run else run
    if not isinstance(run, dict):
        raise ValueError(f"it is of type {type(run).__name__}; wanted: {WANTED}")
    if run.get("dry_run") is not False:
        raise ValueError("it does not say 'dry_run': false; wanted: a run on a GPU")
    gpu, problems = run.get("gpu"), run.get("problems")
    if not isinstance(gpu, str) or not tuning_entries.slug(gpu):
        raise ValueError(f"'gpu' is {gpu!r}; wanted: the name of a GPU")
    if not isinstance(problems, dict):
        raise ValueError(f"'problems' is of type {type(problems).__name__}; wanted: {WANTED}")
    found = [_entry(name, problem) for name, problem in problems.items()]
    if not any(found):
        raise ValueError("none of its problems has a right configuration")
    return gpu, [entry for entry in found if entry is not None]


def update(run: Any) -> Path:
    """Writes the GPU's file; returns where it is.

    Raises:
        ValueError: the run, or the file that is there, is not as it should be.
    """
    gpu, new = entries(run)
    file = tuning_store.shipped_path(gpu)
    merged = {entry["problem"]: entry for entry in [*tuning_entries.read(file), *new]}
    file.parent.mkdir(exist_ok=True)
    table = {"gpu": gpu, "entries": [merged[name] for name in sorted(merged)]}
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def main(argv: list[str]) -> int:
    """The command line: 0; 2 and one line if nothing was written."""
    if len(argv) != 1:
        print(f"usage: python -m tools.tuning_table RUN.json, {WANTED}", file=sys.stderr)
        return 2
    try:
        print(update(json.loads(Path(argv[0]).read_text(encoding="utf-8"))))
    except (ValueError, OSError) as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
