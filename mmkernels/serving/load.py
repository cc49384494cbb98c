"""Models by name or folder, and what they need."""

from pathlib import Path

from mmkernels.models.checkpoint import MANIFEST, where
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.trained import TINY

# What a model needs: what to import -> what to install.
NEEDS = {"tokenizers": "tokenizers", "safetensors": "safetensors", "PIL": "pillow"}
CHECKPOINTS, DEFAULT = TINY.parent, TINY.name


def open_model(model: str | Path | None = None) -> tuple[str, MultimodalModel]:
    """Loads a model.

    Args:
        model: the name of a checkpoint of the package, or a folder that `save_pretrained` wrote;
            None: the package's `DEFAULT`.

    Returns:
        Its name, which is the folder's, and the model, in evaluation mode.

    Raises:
        ValueError: there is no such model, or its files are not whole.
    """
    name = str(model or DEFAULT)
    shipped = CHECKPOINTS / name
    folder = shipped if (shipped / MANIFEST).is_file() else Path(name)
    if not where(folder).is_dir():
        raise ValueError(
            f"there is no model {name!r}: neither a folder nor one of the package's checkpoints "
            f"({', '.join(known()) or 'it has none'}). Train one: python -m mmkernels train"
        )
    return folder.resolve().name, MultimodalModel.from_pretrained(folder)


def known() -> list[str]:
    """Names of the package's checkpoints."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{MANIFEST}"))
