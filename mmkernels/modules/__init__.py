"""Drop-in `torch.nn` modules that run on the kernels of this package."""

from mmkernels.modules.attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
