"""A progress bar: tqdm's where it is installed, else a line that is written over."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Gives `step(name)`, to be called when one of `total` is done; `name` says what was done."""
    try:
        from tqdm import tqdm
    except ImportError:
        began, done = time.monotonic(), 0

        def step(name: str) -> None:
            nonlocal done
            done += 1
            seconds = time.monotonic() - began
            line = f"{done}/{total} {unit}, {seconds:.0f} s, {name}"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

        yield step
        print(file=sys.stderr)
        return
    with tqdm(total=total, unit=unit) as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        yield advance
