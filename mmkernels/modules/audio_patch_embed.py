"""Patch embedding of audio: patches of a spectrogram, which may overlap, or frames of samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.modules.patch_embed import Size
from mmkernels.modules.projection import as_tuple, check_pixels, embed
from mmkernels.patch_embed.api import Numbers
from mmkernels.patch_embed.checks import statistics


class AudioPatchEmbed(nn.Module):
    """Patches of a spectrogram, or frames of samples, times a weight.

    Parameters are `proj.weight`, (embed_dim, 1, frequencies, times) as of Conv2d or, for frames,
    (embed_dim, in_chans, samples) as of Conv1d; `proj.bias` (embed_dim,) and those of `norm`. Where
    proj has hooks, or is no plain convolution any more, proj itself is called.

    Args:
        patch_size: frequencies and times of a patch, or samples of a frame.
        stride: from patch to patch, in the same order; where it is less than patch_size, they
            overlap, as AST's with 16 and 10. None: patch_size.
        in_chans: channels of the samples; a spectrogram has 1.
        embed_dim: width D of the tokens.
        frames: whether the input is samples (B, C, L) rather than spectrograms (B, time, mel).
        norm_layer: called with embed_dim, device and dtype, makes the norm of the tokens.
        bias: whether proj has a bias.
        device: where the parameters lie.
        dtype: dtype of the parameters, in which tokens are returned.
        pixel_mean: a number or one for each channel; the input becomes
            (input - pixel_mean) / pixel_std. uint8 is divided by 255 first, also without either.
        pixel_std: likewise.
        backend: backend of `mm.patch_embed`.

    Raises:
        ValueError: a size, in_chans, pixel_mean or pixel_std is none of these.

    Source: Gong et al., "AST: Audio Spectrogram Transformer", Interspeech 2021.
    """

    def __init__(
        self,
        patch_size: Size = 16,
        stride: Size | None = None,
        in_chans: int = 1,
        embed_dim: int = 768,
        *,
        frames: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pixel_mean: Numbers | None = None,
        pixel_std: Numbers | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if in_chans != 1 and not frames:
            raise ValueError(
                f"in_chans is {in_chans}; a spectrogram (B, time, mel) has 1 channel. For samples "
                "(B, C, L) give frames=True, for images of several channels use PatchEmbed"
            )
        dims = 1 if frames else 2
        self.frames = frames
        self.patch_size = as_tuple("patch_size", patch_size, dims)
        self.stride = self.patch_size if stride is None else as_tuple("stride", stride, dims)
        self.pixel_mean, self.pixel_std = statistics(
            "AudioPatchEmbed", pixel_mean, pixel_std, in_chans
        )
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        kind: Any = nn.Conv1d if frames else nn.Conv2d
        self.proj: nn.Module = kind(
            in_chans, embed_dim, self.patch_size, self.stride, bias=bias, **factory
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()

    def extra_repr(self) -> str:
        """What the representations of proj and norm do not show."""
        return (
            f"frames={self.frames}, pixel_mean={self.pixel_mean or None}, "
            f"pixel_std={self.pixel_std or None}, backend={self.backend!r}"
        )

    def grid_size(self, *size: int) -> tuple[int, ...]:
        """Patches along (mel, time) for an input of size (time, mel), or along L for (L,)."""
        counts = zip(reversed(size), self.patch_size, self.stride, strict=True)
        return tuple((n - k) // s + 1 for n, k, s in counts)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds spectrograms or samples.

        Args:
            x: (B, time, mel), or with frames (B, C, L); floating point or uint8, in any strides.

        Returns:
            (B, N, D); of a spectrogram in the order (mel, time), as in AST.

        Raises:
            ValueError: x has a wrong shape, or is smaller than one patch.
            TypeError: x is no tensor or has a wrong dtype.
        """
        check_pixels("AudioPatchEmbed", x, ("B", "C", "L") if self.frames else ("B", "time", "mel"))
        tokens, _ = embed(
            self.proj, x if self.frames else x.transpose(1, 2)[:, None],
            pixel_mean=self.pixel_mean, pixel_std=self.pixel_std, backend=self.backend,
        )  # fmt: skip
        return self.norm(tokens)
