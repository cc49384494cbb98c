"""How numbers look in a report."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from mmkernels.bench.report_rows import Row


class Unit(NamedTuple):
    """Of the times in a table.

    Attributes:
        name: such as "ms".
        per_second: how many make a second.
    """

    name: str
    per_second: float


MILLISECONDS, MICROSECONDS = Unit("ms", 1e3), Unit("µs", 1e6)


def unit(rows: Iterable[Row]) -> Unit:
    """The one in which a table's numbers are short."""
    longest = max(result["median_s"] for row in rows for result in row.results.values())
    return MICROSECONDS if longest < 1e-3 else MILLISECONDS


def decimals(value: float, significant: int) -> int:
    """How many digits behind the point show so many significant ones."""
    return max(0, significant - 1 - math.floor(math.log10(abs(value)))) if value else 0


def number(value: float, significant: int = 3) -> str:
    """At least so many significant digits, never an exponent."""
    return f"{value:.{decimals(value, significant)}f}"


def time(result: Any, unit: Unit) -> str:
    """Median ± interquartile range, to the same place."""
    median, iqr = (unit.per_second * result[name] for name in ("median_s", "iqr_s"))
    places = decimals(median, 4)
    return f"{median:.{places}f} ± {iqr:.{places}f}"


def ratio(value: float | None, marked: bool = False) -> str:
    """A ratio; a loss is never rounded to 1, and bold where losses are to be marked."""
    if value is None:
        return ""
    shown = f"{value:.2f}×"
    if value < 1 and shown == "1.00×":
        shown = f"{math.floor(1e3 * value) / 1e3:.3f}×"
    return f"**{shown}**" if marked and value < 1 else shown


def percent(share: float | None) -> str:
    """A share of a ceiling."""
    return "" if share is None else f"{number(100 * share, 2)} %"


def rate(row: Row, name: str) -> str:
    """TFLOP/s where the products decide, GB/s where the bytes do."""
    value = row.rate(name)
    if value is None:
        return ""
    return f"{number(value / 1e12)} TFLOP/s" if row.by_flops else f"{number(value / 1e9)} GB/s"


def mebibytes(result: Any) -> str:
    """Peak memory."""
    return number(result["peak_bytes"] / 2**20)
