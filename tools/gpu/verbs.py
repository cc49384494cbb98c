"""The steps that are verbs of the command line: doctor, tune, bench."""

from mmkernels.bench.run import write
from tools.gpu.run import Run, limit, parsed


def doctor(run: Run, seconds: float) -> None:
    """What is there, and whether every backend gives the reference's results on tiny inputs."""
    _verb(run, ("doctor", "--check", "--json"), seconds)


def tune(run: Run, seconds: float) -> None:
    """Measures tile sizes; what it keeps in the user's cache folder serves the steps behind it."""
    how = "--dry-run" if run.dry else "--quick"
    _verb(run, ("tune", how, "--json", "--limit", limit(seconds)), seconds)


def bench(run: Run, seconds: float) -> None:
    """The quick benchmarks; their JSON grows case by case beside gpu.json, which then holds it."""
    path = run.record.folder / "bench.json"
    words = ("bench", "--quick", "--json", str(path), "--limit", limit(seconds))
    run.python("bench", "bench", ("-m", "mmkernels", *words), seconds)
    for made in run.record.folder.glob("bench[.-]*"):  # tables and plots are made of it again
        if made != path:
            made.unlink()
    found = parsed(path.read_text(encoding="utf-8") if path.exists() else "")
    if "problem" not in found:  # it may be committed as it is
        found = run.record.anonymous(found)
        write(path, found)
    run.record.put(bench=found)


def _verb(run: Run, words: tuple[str, ...], seconds: float) -> None:
    """Runs a verb that prints JSON, and keeps that under its name."""
    verb = words[0]
    done = run.python(verb, verb, ("-m", "mmkernels", *words), seconds)
    run.record.put(**{verb: parsed(done.stdout)})
