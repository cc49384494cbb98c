"""Images and sounds as discrete codes, and back: small autoencoders with scalar quantisation.

A patch becomes a few numbers, each rounded to one of a few levels; together they are its code.
Nothing is looked up, so no code goes unused for want of a neighbour. Layers on both sides let a
patch see its neighbours, and norms see one patch alone: what comes after a sound, or beside it in
a batch, changes no code beyond the reach of the convolutions.

Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels as mm
from mmkernels.models.audio import silence
from mmkernels.models.config import CodecConfig

__all__ = ["FSQ", "AudioCodec", "ImageCodec"]


class FSQ(nn.Module):
    """Rounds each dimension to one of its levels, which lie evenly from -1 to 1.

    Args:
        levels: of each dimension, at least 2; even ones have no level at 0.

    Raises:
        ValueError: there are no levels, or one is less than 2.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise ValueError(
                f"FSQ: levels are {tuple(levels)}; there must be at least one, each at least 2"
            )
        sizes = torch.tensor(levels)
        self.register_buffer("levels", sizes, persistent=False)
        self.register_buffer("strides", sizes.cumprod(0) // sizes, persistent=False)
        self.levels: Tensor
        self.strides: Tensor
        self.num_codes = int(sizes.prod())

    def forward(self, x: Tensor) -> Tensor:
        """Bounds and rounds; the gradient is that of the bound alone.

        Args:
            x: (..., dimensions) of any size.

        Returns:
            (..., dimensions), the nearest levels.
        """
        bounded = torch.tanh(x)
        return bounded + (self.values(self.codes(bounded)).to(x.dtype) - bounded).detach()

    def codes(self, bounded: Tensor) -> Tensor:
        """bounded (..., dimensions) in [-1, 1] -> nearest codes (...) int64, below num_codes."""
        digits = ((bounded.float() + 1) / 2 * (self.levels - 1)).round().long()
        return (digits * self.strides).sum(-1)

    def values(self, codes: Tensor) -> Tensor:
        """codes (...) -> the levels (..., dimensions) float32 that they stand for."""
        digits = codes[..., None] // self.strides % self.levels
        return digits / (self.levels - 1) * 2 - 1


class _Mix(nn.Module):
    """A residual layer in which patches see their neighbours, `kernel` patches wide."""

    def __init__(self, width: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, columns, E) -> the same."""
        mixed = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.proj(F.silu(mixed))


class Codec(nn.Module):
    """An autoencoder of patches, one code for each.

    Args:
        config: its sizes.
        kernel: (rows, columns) of patches that a layer mixes, odd.
    """

    def __init__(self, config: CodecConfig, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        width, (height, breadth) = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(
            config.in_chans, width, config.patch_size, stride=config.patch_size
        )
        self.encoder = nn.Sequential(*(_Mix(width, kernel) for _ in range(config.num_layers)))
        self.to_code = nn.Linear(width, len(config.levels))
        self.quantise = FSQ(config.levels)
        self.from_code = nn.Linear(len(config.levels), width)
        self.decoder = nn.Sequential(*(_Mix(width, kernel) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(width)
        self.to_patch = nn.Linear(width, config.in_chans * height * breadth)

    def latent(self, x: Tensor) -> Tensor:
        """What is rounded.

        Args:
            x: (B, C, H, W), uint8 or floating point; H and W multiples of a patch's.

        Returns:
            (B, rows, columns, dimensions) of any size, in the weights' dtype.
        """
        rows, columns = (n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        tokens = mm.patch_embed(x, self.patch_embed.weight, self.patch_embed.bias)
        return self.to_code(self.encoder(tokens.unflatten(1, (rows, columns))))

    def reconstruct(self, values: Tensor) -> Tensor:
        """Values (B, rows, columns, dimensions) in [-1, 1] -> (B, C, H, W)."""
        grid = self.decoder(self.from_code(values.to(self.from_code.weight.dtype)))
        patches = self.to_patch(self.norm(grid)).unflatten(-1, (-1, *self.config.patch_size))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> its reconstruction, through codes."""
        return self.reconstruct(self.quantise(self.latent(x)))

    def _check_codes(self, codes: Tensor) -> None:
        where = f"{type(self).__name__}.decode"
        if codes.dtype not in (torch.int64, torch.int32) or codes.ndim != 2 or not codes.shape[1]:
            raise ValueError(
                f"{where}: codes are {codes.dtype} of shape {tuple(codes.shape)}; they must be "
                "int64 (B, N) with N at least 1"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.num_codes:
            raise ValueError(
                f"{where}: codes are from {int(codes.min())} to {int(codes.max())}; this codec's "
                f"are from 0 to {self.config.num_codes - 1}"
            )


class ImageCodec(Codec):
    """Codes of images: one for each patch, in rows.

    Args:
        config: its sizes.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config, (3, 3))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images.

        Args:
            images: (B, C, H, W) uint8, H and W multiples of a patch's.

        Returns:
            (B, patches) int64.

        Raises:
            ValueError: images are not uint8 of that shape.
        """
        height, breadth = self.config.patch_size
        whole = images.ndim == 4 and all(
            n > 0 and n % p == 0 for n, p in zip(images.shape[2:], (height, breadth), strict=True)
        )
        if not whole or images.dtype != torch.uint8 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"ImageCodec.encode: images are {images.dtype} of shape {tuple(images.shape)}; "
                f"they must be uint8 (B, {self.config.in_chans}, H, W) with H a multiple of "
                f"{height} and W of {breadth}: pad or resize them"
            )
        return self.quantise.codes(torch.tanh(self.latent(images))).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, columns: int = 4) -> Tensor:
        """Images of codes.

        Args:
            codes: (B, patches) int64.
            columns: patches in a row.

        Returns:
            (B, C, H, W) uint8.

        Raises:
            ValueError: codes are of another form or too large, or make no whole rows.
        """
        self._check_codes(codes)
        if columns < 1 or codes.shape[1] % columns:
            raise ValueError(
                f"ImageCodec.decode: columns is {columns}; it must divide the "
                f"{codes.shape[1]} codes of an image"
            )
        pixels = self.reconstruct(self.quantise.values(codes.unflatten(1, (-1, columns))))
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


class AudioCodec(Codec):
    """Codes of log-mels, one for a few frames.

    Args:
        config: its sizes.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config, (1, 3))

    @torch.no_grad()
    def encode(self, mels: Tensor) -> Tensor:
        """Codes of log-mels.

        Args:
            mels: (B, T, bands) floating point, T a multiple of a patch's frames.

        Returns:
            (B, T / frames) int64.

        Raises:
            ValueError: mels are not of that form.
        """
        bands, frames = self.config.patch_size
        whole = mels.ndim == 3 and mels.shape[1] > 0 and mels.shape[1] % frames == 0
        if not whole or mels.shape[2] != bands or not mels.is_floating_point():
            raise ValueError(
                f"AudioCodec.encode: mels are {mels.dtype} of shape {tuple(mels.shape)}; they must "
                f"be floating point (B, T, {bands}) with T a multiple of {frames}: fill the end "
                "with audio.silence"
            )
        x = mels.transpose(1, 2)[:, None]
        return self.quantise.codes(torch.tanh(self.latent(x))).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Log-mels of codes.

        Args:
            codes: (B, N) int64.

        Returns:
            (B, N * frames, bands), nothing below silence.

        Raises:
            ValueError: codes are of another form or too large.
        """
        self._check_codes(codes)
        mels = self.reconstruct(self.quantise.values(codes[:, None]))[:, 0].transpose(1, 2)
        return mels.clamp(min=float(silence(1).min()))
