"""What the plots share: colours that the colour-blind can tell apart, short names, titles."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmkernels.bench.case import OURS
from mmkernels.bench.report_rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY, LIGHT = "#0072b2", "#d55e00", "#6f6f6f", "#c9c9c9"
# For implementations, in this order (Okabe and Ito); ours is blue.
OTHERS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#d55e00")
SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "forward": "fwd",
    "backward": "bwd",
    "forward + backward": "fwd + bwd",
}
WIDTH = 10.5  # inches


def figure(height: float, title: str, place: str) -> "Figure":
    """An empty figure that says what it shows and where that was measured."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height), layout="constrained")
    made.suptitle(f"{title}\n", fontsize=12, fontweight="bold", x=0.01, ha="left")
    made.text(
        0.01, 1 - 0.36 / height, place, fontsize=8.5, color=GREY, ha="left", va="top"
    )  # below the title
    return made


def bare(axes: Any, *sides: str) -> None:
    """Takes the frame away, but for some sides."""
    for side in {"left", "right", "top", "bottom"} - set(sides):
        axes.spines[side].set_visible(False)


def powers_of_two(low: float, high: float) -> list[float]:
    """Ticks between two numbers, 1 among them if it is; so few that their texts have room."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 5))
    return [2.0**exponent for exponent in range(first, last + 1) if exponent % step == 0]


def labels(rows: Sequence[Row]) -> tuple[list[str], str]:
    """What tells the rows apart, one text each, and what they have in common."""
    columns = ("mask", "dtype", "mode")
    varying = [c for c in columns if len({row.record[c] for row in rows}) > 1]
    common = [str(rows[0].record[c]) for c in columns if c not in varying]
    texts = []
    for row in rows:
        record = row.record
        parts = record["name"], _own_sizes(row, rows), *(record[column] for column in varying)
        texts.append(", ".join(SHORT.get(part, part) for part in parts if part))
    return texts, ", ".join(filter(None, common))


def _own_sizes(row: Row, rows: Sequence[Row]) -> str:
    """What of a row's shape is not the same in all rows of that name."""
    name, shape = row.record["name"], row.record["shape"].split()
    others = [other.record["shape"].split() for other in rows if other.record["name"] == name]
    return " ".join(size for size in shape if not all(size in other for other in others))


def colour(name: str, names: Sequence[str]) -> str:
    """Of an implementation among all that a plot shows; the same whatever its brackets say."""
    plain = name.partition(" (")[0]
    others = dict.fromkeys(other.partition(" (")[0] for other in names if other != OURS)
    return BLUE if name == OURS else OTHERS[list(others).index(plain) % len(OTHERS)]
