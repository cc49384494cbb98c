"""The originals of our modules: as model code writes them, and as libraries have them.

Model code's are plain torch, and name their parameters as ours and timm do.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.bench import calls
from mmkernels.bench.module_problem import Peer
from mmkernels.bench.patch_problem import Shape

PROJ = {"proj.weight": "projection.weight", "proj.bias": "projection.bias"}


class Patches(nn.Module):
    """A convolution and its tokens: (B, C, *size) -> (B, N, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kind: Any = nn.Conv3d if len(shape.kernel) == 3 else nn.Conv2d
        self.proj = kind(
            shape.channels, shape.dim, shape.kernel, shape.stride or shape.kernel, bias=shape.bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images or videos."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Spectrogram(Patches):
    """Patches of spectrograms: (B, time, mel) -> (B, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Embeds spectrograms."""
        return super().forward(x.transpose(1, 2)[:, None])


class Front(nn.Module):
    """Patches, class token and positions: (B, C, H, W) -> (B, P + N, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embed = Patches(shape)
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.dim)) if shape.prefix else None
        self.pos_embed = nn.Parameter(torch.empty(1, shape.prefix + shape.tokens, shape.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embeds images."""
        tokens = self.patch_embed(x)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), 1)
        return tokens + self.pos_embed


def timm(shape: Shape) -> Peer:
    """timm's PatchEmbed."""
    module = calls.imported("timm.layers").PatchEmbed(
        shape.size, shape.kernel[0], shape.channels, shape.dim, bias=shape.bias
    )
    return Peer(module, {name: name for name in PROJ})


def clip(shape: Shape) -> Peer:
    """CLIPVisionEmbeddings of transformers."""
    made = _transformers("clip", "CLIPVisionConfig", "CLIPVisionEmbeddings", shape)
    return Peer(made, {
        "cls_token": "class_embedding",
        "pos_embed": "position_embedding.weight",
        "patch_embed.proj.weight": "patch_embedding.weight",
    })  # fmt: skip


def siglip(shape: Shape) -> Peer:
    """SiglipVisionEmbeddings of transformers."""
    made = _transformers("siglip", "SiglipVisionConfig", "SiglipVisionEmbeddings", shape)
    return Peer(made, {
        "pos_embed": "position_embedding.weight",
        "patch_embed.proj.weight": "patch_embedding.weight",
        "patch_embed.proj.bias": "patch_embedding.bias",
    })  # fmt: skip


def dinov2(shape: Shape) -> Peer:
    """Dinov2Embeddings of transformers."""
    made = _transformers("dinov2", "Dinov2Config", "Dinov2Embeddings", shape)
    names = {f"patch_embed.{name}": f"patch_embeddings.{theirs}" for name, theirs in PROJ.items()}
    return Peer(made, names | {"cls_token": "cls_token", "pos_embed": "position_embeddings"})


def videomae(shape: Shape) -> Peer:
    """VideoMAEPatchEmbeddings of transformers, which takes frames before channels."""
    frames = {"num_frames": shape.size[0], "tubelet_size": shape.kernel[0]}
    made = _transformers("videomae", "VideoMAEConfig", "VideoMAEPatchEmbeddings", shape, **frames)
    return Peer(made, PROJ, lambda module, x: module(x.transpose(1, 2)))


def ast(shape: Shape) -> Peer:
    """ASTPatchEmbeddings of transformers."""
    frequency, time = shape.stride or shape.kernel
    strides = {"frequency_stride": frequency, "time_stride": time}
    name = "audio_spectrogram_transformer"
    return Peer(_transformers(name, "ASTConfig", "ASTPatchEmbeddings", shape, **strides), PROJ)


def _transformers(model: str, config: str, module: str, shape: Shape, **options: int) -> nn.Module:
    name = f"transformers.models.{model}"
    settings = getattr(calls.imported(name), config)(
        hidden_size=shape.dim, num_attention_heads=1, image_size=shape.size[-1],
        patch_size=shape.kernel[-1], **options,
    )  # fmt: skip
    return getattr(calls.imported(f"{name}.modeling_{model}"), module)(settings)
