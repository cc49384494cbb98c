"""Attention over interval masks. The public names are in `api.py` and `masks.py`."""

from mmkernels.attention import cpu, decode, reference  # noqa: F401 (each registers its backend)
