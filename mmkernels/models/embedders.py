"""Images and spectrograms as embeddings for the decoder.

Both go the same way: patches through `mm.patch_embed_varlen`, whatever sizes come together; their
place in the grid; a tower of bidirectional blocks in which each input attends to itself alone; a
projection to the decoder's width. With no layers it is the encoder-free form: patches, projected.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Dehghani et al., "Patch n'
Pack: NaViT", NeurIPS 2023; Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mmkernels as mm
from mmkernels.models.config import DecoderConfig, EmbedderConfig
from mmkernels.models.decoder import Block, RMSNorm
from mmkernels.models.kernels import MMKERNELS, Kernels

# How large places are beside patches, which are about 1.
_PLACE = 0.3


class Embedder(nn.Module):
    """Patches of one modality, embedded.

    Args:
        config: its sizes.
        out_features: width of the decoder.
    """

    def __init__(self, config: EmbedderConfig, out_features: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = nn.Conv2d(
            config.in_chans, width, config.patch_size, stride=config.patch_size
        )
        sizes = DecoderConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=max(config.num_layers, 1),
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=width // config.num_heads,
        )
        self.layers = nn.ModuleList(Block(sizes) for _ in range(config.num_layers))
        self.norm = RMSNorm(width, sizes.rms_norm_eps)
        self.proj = nn.Linear(width, out_features)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an input of that size."""
        patch_height, patch_width = self.config.patch_size
        return (height // patch_height) * (width // patch_width)

    def forward(self, inputs: Sequence[Tensor], kernels: Kernels = MMKERNELS) -> Tensor:
        """Embeds inputs of any sizes.

        Args:
            inputs: (C, H, W) each, at least one; uint8 or floating point, of one dtype.
            kernels: what to run on.

        Returns:
            (tokens of all inputs, out_features), one input after the other, rows of patches first.
        """
        tokens, cu_seqlens = kernels.patch_embed_varlen(
            inputs,
            self.patch_embed.weight,
            self.patch_embed.bias,
            pixel_mean=self.config.mean,
            pixel_std=self.config.std,
        )
        places = (self._places(x.shape[1], x.shape[2], tokens.device) for x in inputs)
        x = (tokens + torch.cat(list(places)).to(tokens.dtype))[None]
        if self.layers:
            mask = mm.masks.packed(cu_seqlens, total_q=x.shape[1], total_k=x.shape[1])
            for layer in self.layers:
                x = layer(x, None, lambda q, k, v: kernels.attention(q, k, v, mask))
        return self.proj(self.norm(x))[0]

    def _places(self, height: int, width: int, device: torch.device) -> Tensor:
        rows, columns = (
            n // p for n, p in zip((height, width), self.config.patch_size, strict=True)
        )
        return grid_positions(rows, columns, self.config.hidden_size, device)


def grid_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of a patch's row and column: (rows * columns, width), float32.

    They need no table, so a grid of any size has them.
    """
    quarter = width // 4
    frequency = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    row, column = (
        torch.arange(n, device=device)[:, None] * frequency for n in (rows, columns)
    )  # (n, quarter)
    row = torch.cat((row.sin(), row.cos()), 1)[:, None].expand(-1, columns, -1)
    column = torch.cat((column.sin(), column.cos()), 1)[None].expand(rows, -1, -1)
    return torch.cat((row, column), 2).flatten(0, 1) * _PLACE
