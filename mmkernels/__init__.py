"""Fused attention and patch embedding for multimodal transformers.

`mm.attention`, `mm.patch_embed` and their relatives run on the fastest backend that can serve a
call, are checked against one plain PyTorch reference, and work on any CPU. Importing the package
touches no driver; triton and the compiled extension are optional.

    import torch
    import mmkernels as mm

    q, k, v = (torch.randn(1, 256, 8, 64) for _ in "qkv")  # (B, S, H, D)
    out = mm.attention(q, k, v, mask=mm.masks.prefix_lm(64, seqlen_q=256))
"""

__version__ = "0.1.0"

try:
    import torch
except Exception as error:  # `python -m mmkernels` must still be able to say why
    torch_error: Exception | None = error
else:
    del torch
    torch_error = None

if torch_error is None:
    from mmkernels._core.registry import explain, use_backend
    from mmkernels.attention import masks
    from mmkernels.attention.api import (
        attention,
        attention_varlen,
        attention_with_kvcache,
        scaled_dot_product_attention,
    )
    from mmkernels.errors import BackendUnavailable
    from mmkernels.integrations.replace import replace, replaced, restore
    from mmkernels.patch_embed.api import patch_embed, patch_embed_varlen

__all__ = [
    "BackendUnavailable",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "masks",
    "patch_embed",
    "patch_embed_varlen",
    "replace",
    "replaced",
    "restore",
    "scaled_dot_product_attention",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name == "modules" and torch_error is None:
        import importlib

        return importlib.import_module("mmkernels.modules")
    if torch_error is not None and (name in __all__ or name == "modules"):
        raise ImportError(
            f"mmkernels.{name} needs torch, and `import torch` failed: {torch_error}. "
            "Run `python -m mmkernels doctor` for a report."
        ) from torch_error
    raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
