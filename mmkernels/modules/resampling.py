"""Position embeddings for another grid, kept while their parameter stays, and kernels resampled."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


def resampled_positions(
    pos_embed: Tensor, old: Pair, new: Pair, prefix: int, mode: str, antialias: bool
) -> Tensor:
    """pos_embed (1, prefix + old patches, D) for a grid of `new`, in its own dtype.

    Interpolated in float32 at least: in half precision bicubic weights lose their last digits, and
    CPUs have no kernel with antialiasing.

    Args:
        pos_embed: (1, prefix + old[0] * old[1], D).
        old: its grid.
        new: the wanted grid.
        prefix: rows before the patches, which stay as they are.
        mode: "bicubic" or "bilinear".
        antialias: whether to smooth where the new grid is coarser.

    Returns:
        (1, prefix + new[0] * new[1], D).
    """
    if old == new:
        return pos_embed
    first, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    maps = patches.to(dtype).unflatten(1, old).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, new, mode=mode, antialias=antialias, align_corners=False)
    patches = maps.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat((first, patches), 1)


def resampled_kernels(weight: Tensor, size: Pair) -> Tensor:
    """weight (D, C, h, w) as (D, C, *size): on an image resized alike, it gives the same products.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023, section 3.4: the
    pseudoinverse of bicubic resizing with antialiasing.
    """
    area, old = weight.shape[2] * weight.shape[3], weight.shape[2:]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    basis = torch.eye(area, dtype=dtype, device=weight.device).view(area, 1, *old)
    resize = F.interpolate(basis, size, mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resize.flatten(1).T)  # (area, new area)
    return (weight.to(dtype).flatten(2) @ inverse).unflatten(2, size).to(weight.dtype)


class PositionCache:
    """Resampled position embeddings, one for each grid and device.

    An entry serves as long as the parameter that it came from is the same object, of the same
    memory, dtype and version: optimizers, `load_state_dict`, `copy_` and moves to a device or a
    dtype all change one of these. Writing through `.data` changes none; `clear` then.

    Nothing is kept that carries a graph, was made by a tracer or a transform, or lies in the
    memory of a CUDA graph. Copies and pickles begin empty.
    """

    LIMIT = 32  # images of every size must not fill the memory

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[Any, tuple, Tensor]] = {}

    def __reduce__(self) -> tuple:
        return PositionCache, ()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def get(self, pos_embed: Tensor, old: Pair, new: Pair, *how: Any) -> Tensor:
        """`resampled_positions(pos_embed, old, new, *how)`."""
        if old == new or not _keepable(pos_embed):
            return resampled_positions(pos_embed, old, new, *how)
        key = (pos_embed.device, old, new, *how)
        state = (pos_embed._version, pos_embed.data_ptr(), pos_embed.dtype, pos_embed.shape)
        source, known, kept = self._entries.get(key, (None, None, None))
        if source is not None and source() is pos_embed and known == state and kept is not None:
            return kept
        # An inference tensor could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            kept = resampled_positions(pos_embed, old, new, *how)
        self._entries.pop(key, None)
        while len(self._entries) >= self.LIMIT:
            self._entries.pop(next(iter(self._entries), None), None)
        self._entries[key] = (weakref.ref(pos_embed), state, kept)
        return kept


def _keepable(pos_embed: Tensor) -> bool:
    """Whether what is made of pos_embed here and now may serve another call."""
    return not (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and pos_embed.requires_grad)
        or type(pos_embed) not in (Tensor, nn.Parameter)
        or pos_embed.is_inference()  # has no version
        or pos_embed.is_meta
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or (pos_embed.is_cuda and torch.cuda.is_current_stream_capturing())
    )
