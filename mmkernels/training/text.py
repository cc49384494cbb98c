"""Text to learn from: English prose that comes with Python, and more where a folder holds it."""

from pathlib import Path


def corpus(data: Path | None = None) -> dict[str, str]:
    """Name -> text.

    Args:
        data: a folder with tinyshakespeare/input.txt, or None.

    Returns:
        "topics", the Python reference as `help()` prints it (about 460 KB), and "tinyshakespeare"
        where data has it.

    Raises:
        ValueError: data is given and is no folder.
    """
    from pydoc_data.topics import topics

    texts = {"topics": "\n\n".join(topics[name].strip() for name in sorted(topics))}
    if data is not None:
        if not Path(data).is_dir():
            raise ValueError(f"data is {data}; it must be a folder that exists, or None")
        verse = Path(data) / "tinyshakespeare" / "input.txt"
        if verse.is_file():
            texts["tinyshakespeare"] = verse.read_text(encoding="utf-8")
    return texts
