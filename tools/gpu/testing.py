"""The steps that are tests: those that need a GPU, and the same under compute-sanitizer."""

import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu import outcomes
from tools.gpu.plan import LEAST
from tools.gpu.process import ROOT
from tools.gpu.run import Run, tool


class Job(NamedTuple):
    """Tests that one process runs.

    Attributes:
        name: of the part.
        path: the file of the tests.
        keywords: pytest's -k.
        marks: pytest's -m.
        launcher: what pytest runs under.
    """

    name: str
    path: str
    keywords: str = ""
    marks: str = "gpu"
    launcher: tuple[str, ...] = ()


ATTENTION, PATCHES = "tests/attention/test_gpu.py", "tests/patch_embed/test_gpu.py"
# What was never run before goes first. The longest file is shared out.
JOBS = (
    Job("attention, CUDA", ATTENTION, "real_tiles and cuda-cuda"),
    Job("patch embedding", PATCHES),
    Job("attention, Triton, bfloat16", ATTENTION, "triton-triton and torch.bfloat16"),
    Job("attention, other questions", ATTENTION, "not real_tiles"),
    Job("decode", "tests/attention/test_triton_decode.py"),
    Job("attention, CUDA then Triton", ATTENTION, "real_tiles and cuda-triton"),
    Job("attention, Triton, float16", ATTENTION, "triton-triton and torch.float16"),
    Job("torch's flash op", "tests/integrations/test_torch_flash.py"),
)
# The tests that every backend has to pass, as far as they ask Triton, which is then on the GPU.
# They are not marked "gpu": they run everywhere.
SHARED = tuple(
    Job(path, f"tests/{path}.py", "triton", "not (slow or gpu or compiled or interpreter)")
    for path in (
        "attention/test_numerics",
        "patch_embed/test_numerics",
        "attention/test_tile_edges",
        "attention/test_scores",
        "attention/test_nonfinite",
        "attention/test_extreme_scores",
        "attention/test_odd_inputs",
        "patch_embed/test_edges",
    )
)
# A few of them in Triton's interpreter, for a dry run.
INTERPRETED = tuple(
    Job(f"{path}, interpreted", f"tests/{path}.py", keywords, "interpreter and not slow")
    for path, keywords in (
        ("attention/test_tile_edges", "triton"),
        ("attention/test_triton_decode", "number_of_splits and 8"),
        ("patch_embed/test_edges", "triton and (odd or dout)"),
    )
)
# A test of a kernel that hangs ends after so long; the longest ones compile for half of it.
TEST_SECONDS = 75.0
# A process needs so much memory of the GPU at most, and two cores, since it compiles.
GIB_A_PROCESS, MOST_PROCESSES = 24, 6

# compute-sanitizer slows a kernel down a hundredfold. Its tools, and the tests of each file.
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = {
    ATTENTION: "real_tiles and none and bfloat16 and (64 or 128) or same_bits and documents and 80",
    PATCHES: "same_bits",
}


def tests(run: Run, seconds: float) -> None:
    """The tests that need a GPU, then those that every backend passes, in several processes.

    In a dry run the former skip themselves, and a few of the latter are interpreted.
    """
    jobs = [*INTERPRETED, *JOBS] if run.dry else [*JOBS, *SHARED]
    _at_once(run, "tests", jobs, seconds, TEST_SECONDS)


def sanitize(run: Run, seconds: float) -> None:
    """compute-sanitizer's checks of some tests."""
    program = tool("compute-sanitizer")
    if run.dry or program is None:
        why = "there is no GPU" if run.dry else "compute-sanitizer is not on PATH"
        run.instead("sanitize", "not possible", why)
        return
    jobs = [
        Job(
            f"{check}, {path.split('/')[1]}, {kernels}",
            path,
            f"({keywords}) and {kernels}",
            launcher=(program, "--tool", check, "--error-exitcode", "9"),
        )
        for check, kernels, (path, keywords) in itertools.product(
            TOOLS, ("cuda", "triton"), SANITIZED.items()
        )
    ]
    _at_once(run, "sanitize", jobs, seconds, None)


def processes(environment: Mapping[str, Any]) -> int:
    """How many test processes this machine bears at once."""
    by_memory = environment.get("gpu_memory_gib", GIB_A_PROCESS * 2) // GIB_A_PROCESS
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2, by_memory))


def _at_once(
    run: Run, step: str, jobs: Sequence[Job], seconds: float, test_seconds: float | None
) -> None:
    """Runs jobs side by side, the first ones first; nothing is begun or goes on after `seconds`."""
    deadline = time.monotonic() + seconds
    workers = 2 if run.dry else processes(run.record.data["environment"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        paths = [Path(folder) / f"{index}.jsonl" for index in range(len(jobs))]
        waited = [
            pool.submit(_job, run, step, job, path, deadline, test_seconds)
            for job, path in zip(jobs, paths, strict=True)
        ]
        for one in waited:
            one.result()


def _job(
    run: Run, step: str, job: Job, path: Path, deadline: float, test_seconds: float | None
) -> None:
    """One job; where a test has killed its process, or its GPU context, those behind it as well."""
    # Else pytest may take another folder once the file of outcomes is there, and rename the tests.
    pytest = ("-m", "pytest", "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider")
    pytest += ("-m", job.marks, "-k", job.keywords, job.path)
    words = (*pytest, "-p", "tools.gpu.outcomes", "--outcomes", str(path))
    if test_seconds is not None:
        words += ("--test-seconds", str(test_seconds))
    if run.runner.stopped or deadline - time.monotonic() < LEAST:
        run.record.end(run.begin(step, job.name, pytest), "not reached")
        return
    part, seconds, known = run.begin(step, job.name, pytest, job.launcher), 0.0, 0
    while True:
        done = run.again(part, words, deadline - time.monotonic(), job.launcher)
        seconds += done.seconds
        lines = outcomes.read(path)
        if done.timed_out or run.runner.stopped or len(lines) == known:
            break
        known, last = len(lines), lines[-1]
        if last["outcome"] == "begun":
            message = f"the process ended in it, with exit status {done.code}"
            outcomes.add(path, test=last["test"], outcome="died", message=message)
        elif "lost" not in last:
            break
        if deadline - time.monotonic() < LEAST:
            break
    facts = summary(outcomes.read(path))
    status = "passed" if facts.get("passed") else "skipped"
    # 5 is "no tests": all were done before the process was run again.
    if facts["failures"] or not (done.timed_out or done.code in (0, 5)):
        status = "failed"
    elif done.timed_out:  # no fault of theirs
        status = "cut off"
    run.end(part, done._replace(seconds=seconds, timed_out=False), status=status, **facts)


def summary(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the last line of every test comes to.

    Args:
        lines: of a file of outcomes.

    Returns:
        {"passed": 3, "failed": 1, ..., "failures": [{"test", "message"}], "skips": {reason: 2}}; a
        test that has begun and not ended is "cut off".
    """
    counts: Counter[str] = Counter()
    failures, skips = [], Counter[str]()
    for line in {line["test"]: line for line in lines}.values():
        outcome = "cut off" if line["outcome"] == "begun" else line["outcome"]
        counts[outcome] += 1
        if outcome in ("failed", "error", "died"):
            failures.append({"test": line["test"], "message": line["message"]})
        elif outcome == "skipped":
            skips[line.get("message", "expected to fail")] += 1
    return {**counts, "failures": failures, "skips": dict(skips.most_common())}
