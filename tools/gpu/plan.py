"""The steps in their order, and how they share the time of a run."""

import time
from collections.abc import Callable, Sequence

# Step -> its seconds on a GPU, and in a dry run. What a step leaves passes on to the next, and what
# all of them leave is the last one's.
SHARES = {
    "install": (60, 10),
    "doctor": (25, 25),
    "tests": (165, 105),
    "tune": (60, 65),
    "bench": (150, 60),
    "profile": (60, 35),
    "sanitize": (0, 0),
}
TOTAL = sum(seconds for seconds, _ in SHARES.values())
DRY_TOTAL = sum(seconds for _, seconds in SHARES.values())
# A process that imports torch does nothing in less.
LEAST = 5.0


def chosen(words: Sequence[str]) -> list[str]:
    """The steps that were asked for, in their order; `install` goes before any of them.

    Args:
        words: names of steps, also several in a word with commas between; none: all.

    Raises:
        ValueError: there is no such step.
    """
    names = {name for word in words for name in word.split(",") if name}
    if unknown := names - set(SHARES):
        raise ValueError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    return [step for step in SHARES if not names or step in names or step == "install"]


class Budget:
    """Shares the time out.

    Attributes:
        total: seconds of all steps together.
    """

    def __init__(
        self, steps: Sequence[str], dry: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = DRY_TOTAL if dry else TOTAL
        self._shares = {step: SHARES[step][dry] for step in steps}
        self._clock = clock
        self._deadline = clock() + self.total

    def allowed(self, step: str) -> float:
        """Seconds that a step which begins now may take; 0 if it is too late for it to begin."""
        later = list(self._shares)[list(self._shares).index(step) + 1 :]
        left = self._deadline - self._clock() - sum(self._shares[name] for name in later)
        return left if left >= LEAST else 0.0
