"""What `mmkernels.replace` found in a model."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

__all__ = ["Entry", "Report"]

Kind = Literal["attention", "patch embedding"]


@dataclass(frozen=True)
class Entry:
    """One module that computes attention or cuts patches.

    Attributes:
        name: where it is in the model; "" for the model itself.
        type: name of its class.
        kind: "attention" or "patch embedding".
        swapped: whether mmkernels serves it.
        reason: how it is served, or why it was left.
    """

    name: str
    type: str
    kind: Kind
    swapped: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What of a model runs on mmkernels, what does not, and why; print it for a table.

    Attributes:
        entries: one for each module that computes attention or cuts patches, in the model's order.
    """

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The entries that mmkernels serves."""
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The entries that are as they were."""
        return tuple(entry for entry in self.entries if not entry.swapped)

    def __str__(self) -> str:
        """One line for all modules of a class that fared alike, with the first one's name."""
        if not self.entries:
            return "mmkernels.replace: found neither attention nor patch embedding"
        alike = Counter((e.kind, e.swapped, e.type, e.reason) for e in self.entries)
        first = {(e.kind, e.swapped, e.type, e.reason): e.name for e in reversed(self.entries)}
        lines = [f"mmkernels.replace: {len(self.swapped)} swapped, {len(self.left)} left"]
        for key, count in alike.items():
            kind, swapped, type_, reason = key
            place = first[key] or "the model itself"
            more = f" and {count - 1} more" if count > 1 else ""
            verb = "swapped" if swapped else "left"
            lines.append(f"  {verb}: {kind} {type_} ({place}{more}): {reason}")
        return "\n".join(lines)
