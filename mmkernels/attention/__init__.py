"""Attention over interval masks. The public names are in `api.py` and `masks.py`."""

from mmkernels.attention import (  # noqa: F401 (each registers its backend)
    cpu,
    cuda,
    cuda_backward,
    decode,
    reference,
    triton_backend,
)
