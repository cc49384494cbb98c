"""Patch embedding of video: tubelets of a few frames and a patch of pixels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.modules.patch_embed import Size
from mmkernels.modules.projection import as_tuple, check_pixels, embed
from mmkernels.patch_embed.api import Numbers
from mmkernels.patch_embed.checks import statistics


class TubeletEmbed(nn.Module):
    """Tubelets of a video times a weight, as VideoMAE, ViViT and V-JEPA begin.

    Parameters are `proj.weight` (embed_dim, in_chans, tubelet_size, *patch_size), as of Conv3d,
    `proj.bias` (embed_dim,) and those of `norm`. Where proj has hooks, or is no plain `nn.Conv3d`
    any more, proj itself is called.

    Args:
        img_size: height and width of the frames; None: neither they nor their number are checked,
            nor are grid_size and num_patches known.
        patch_size: height and width of a tubelet.
        num_frames: frames of a video; None: as img_size None.
        tubelet_size: frames of a tubelet.
        in_chans: channels of the frames.
        embed_dim: width D of the tokens.
        norm_layer: called with embed_dim, device and dtype, makes the norm of the tokens.
        bias: whether proj has a bias.
        device: where the parameters lie.
        dtype: dtype of the parameters, in which tokens are returned.
        pixel_mean: a number or one for each channel, in units of 0 to 1; pixels become
            (pixels - pixel_mean) / pixel_std. uint8 is divided by 255 first, also without either.
        pixel_std: likewise.
        backend: backend of `mm.patch_embed`.

    Raises:
        ValueError: a size, pixel_mean or pixel_std is none of these.

    Source: Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        num_frames: int | None = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pixel_mean: Numbers | None = None,
        pixel_std: Numbers | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        height, width = self.patch_size = as_tuple("patch_size", patch_size, 2)
        (self.tubelet_size,) = as_tuple("tubelet_size", tubelet_size, 1)
        self.img_size: tuple[int, ...] | None = None
        self.num_frames: int | None = None
        self.grid_size: tuple[int, ...] | None = None
        self.num_patches: int | None = None
        kernel = (self.tubelet_size, height, width)
        if img_size is not None and num_frames is not None:
            self.img_size = as_tuple("img_size", img_size, 2)
            (self.num_frames,) = as_tuple("num_frames", num_frames, 1)
            t, h, w = (
                n // k for n, k in zip((self.num_frames, *self.img_size), kernel, strict=True)
            )
            self.grid_size, self.num_patches = (t, h, w), t * h * w
        self.pixel_mean, self.pixel_std = statistics(
            "TubeletEmbed", pixel_mean, pixel_std, in_chans
        )
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel, bias=bias, **factory)
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()

    def extra_repr(self) -> str:
        """What the representations of proj and norm do not show."""
        return (
            f"img_size={self.img_size}, num_frames={self.num_frames}, "
            f"pixel_mean={self.pixel_mean or None}, pixel_std={self.pixel_std or None}, "
            f"backend={self.backend!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embeds videos.

        Args:
            x: (B, C, T, H, W), floating point or uint8, in any strides: frames first, (B, T, C, H,
                W), are `x.transpose(1, 2)`, and decoded (B, T, H, W, C) are `x.movedim(-1, 1)`,
                without a copy.

        Returns:
            (B, N, D), in the order (t, y, x).

        Raises:
            ValueError: x has a wrong shape.
            TypeError: x is no tensor or has a wrong dtype.
        """
        check_pixels("TubeletEmbed", x, ("B", "C", "T", "H", "W"))
        if self.img_size is not None and tuple(x.shape[2:]) != (self.num_frames, *self.img_size):
            raise ValueError(
                f"TubeletEmbed: the input has {x.shape[2]} frames of {tuple(x.shape[3:])} and the "
                f"module num_frames={self.num_frames} and img_size={self.img_size}; make it with "
                "img_size=None for videos of any size"
            )
        tokens, _ = embed(
            self.proj, x, pixel_mean=self.pixel_mean, pixel_std=self.pixel_std,
            backend=self.backend,
        )  # fmt: skip
        return self.norm(tokens)
