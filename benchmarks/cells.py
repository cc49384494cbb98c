"""How numbers look in the published tables."""

from typing import Any


def milliseconds(times: dict[str, Any]) -> str:
    """Median ± interquartile range."""
    return f"{1e3 * times['median_s']:.4g} ± {1e3 * times['iqr_s']:.2g}"


def ratio(value: float) -> str:
    return f"{value:.2f}×"


def met(reached: bool) -> str:
    return "yes" if reached else "**no**"
