"""Generated blocks inside handwritten Markdown, between two comments."""

from pathlib import Path

from mmkernels._core.markdown import table

__all__ = ["ROOT", "replaced", "table"]

ROOT = Path(__file__).resolve().parents[1]


def replaced(text: str, name: str, block: str) -> str:
    """`text` with the block `name` replaced.

    Args:
        text: Markdown with one pair of comments, begin and end, of that name.
        name: of the block.
        block: what to put between the comments.

    Raises:
        ValueError: the text has no such pair.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the text has no block between {begin!r} and {end!r}; add the comments")
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{after}"
