"""Loads the compiled extension `mmkernels/_C*.so` if there is one, and keeps the reason if not.

The extension only adds CUDA kernels to operations whose schemas `ops.py` defines, so everything
else works without it. Nothing is loaded until something asks.
"""

import functools
from pathlib import Path


@functools.cache
def load_error() -> str | None:
    """Loads the extension once. Returns None if it is loaded, else why it is not and the fix."""
    import torch

    package = Path(__file__).parent.parent
    candidates = sorted(package.glob("_C*.so"))
    if not candidates:
        return (
            f"the compiled extension is not built (no _C*.so in {package}); the other backends "
            "serve every call without it. With nvcc: pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(str(candidates[0]))
    except OSError as error:
        why = error.__cause__ or error  # torch's own names the file alone
        return f"{candidates[0].name} does not load: {why}; reinstall mmkernels for this torch"
    return None
