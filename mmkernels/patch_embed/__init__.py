"""Patch embedding: pixels to tokens. The public names are in `api.py`."""

from mmkernels.patch_embed import (  # noqa: F401 (each registers its backend)
    cpu,
    cuda,
    reference,
    triton_backend,
)
