"""Modules of ours, their originals, and the input of both."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmkernels import modules
from mmkernels.bench import module_peers
from mmkernels.bench.case import SEED
from mmkernels.bench.module_problem import Peer, Setting
from mmkernels.bench.patch_problem import Shape

CAUSAL, PADDING = "causal", "padding"


@dataclass(frozen=True)
class Attention:
    """Self-attention of a model.

    Attributes:
        seqlen: tokens of a sequence.
        dim: of a token.
        heads: of the attention.
        mask: "", CAUSAL or PADDING.
        batch: sequences.
    """

    seqlen: int
    dim: int
    heads: int
    mask: str = ""
    batch: int = 1
    module: ClassVar[str] = "MultiheadAttention"

    def text(self) -> str:
        """In the field's letters."""
        return f"B{self.batch} S{self.seqlen} E{self.dim} H{self.heads}"

    def lengths(self) -> Tensor:
        """Of the sequences: a quarter to all of seqlen, where there is padding."""
        if self.mask != PADDING:
            return torch.full((self.batch,), self.seqlen)
        return torch.linspace(self.seqlen / 4, self.seqlen, self.batch).long()

    def flops(self) -> tuple[float, float]:
        """Of the forward pass, and of both."""
        pairs = self.batch * self.seqlen * (self.seqlen + 1) / 2
        if self.mask != CAUSAL:
            pairs = float(self.seqlen * self.lengths().sum())
        projections = 8.0 * self.batch * self.seqlen * self.dim**2
        scores = 4.0 * self.dim * pairs
        return projections + scores, 3 * projections + 3.5 * scores

    def sized(self, batch: int) -> "Attention":
        """With that batch."""
        return replace(self, batch=batch)

    def quick(self) -> "Attention":
        """The same with little to compute."""
        return replace(self, seqlen=9, dim=32, heads=2, batch=2)

    def setting(self, device: torch.device) -> Setting:
        """torch's module and ours, as a transformer's block calls them."""
        options: dict[str, Any] = {}
        if self.mask == CAUSAL:
            hidden = torch.ones(self.seqlen, self.seqlen, dtype=torch.bool, device=device).triu(1)
            options = {"attn_mask": hidden, "is_causal": True}
        if self.mask == PADDING:
            hidden = torch.arange(self.seqlen) >= self.lengths()[:, None]
            options = {"key_padding_mask": hidden.to(device)}

        def run(module: Any, x: Tensor) -> Tensor:
            return module(x, x, x, need_weights=False, **options)[0]

        x = _normal(self.batch, self.seqlen, self.dim).requires_grad_()
        sizes: dict[str, Any] = {"embed_dim": self.dim, "num_heads": self.heads}
        return Setting(
            "nn.MultiheadAttention", nn.MultiheadAttention(**sizes, batch_first=True),
            lambda name: modules.MultiheadAttention(**sizes, batch_first=True, backend=name),
            x, self.flops(), {}, run,
        )  # fmt: skip


@dataclass(frozen=True)
class Embedding:
    """An embedding of a model.

    Attributes:
        module: of ours, one of EMBEDDINGS.
        shape: of it.
        peers: library -> makes its module.
    """

    module: str
    shape: Shape
    peers: Mapping[str, Callable[[Shape], Peer]]
    mask: ClassVar[str] = ""

    def text(self) -> str:
        """In the field's letters."""
        return self.shape.text("")

    def sized(self, batch: int) -> "Embedding":
        """With that batch."""
        return replace(self, shape=self.shape._replace(batch=batch))

    def quick(self) -> "Embedding":
        """The same with little to compute."""
        return replace(self, shape=self.shape.quick())

    def setting(self, device: torch.device) -> Setting:
        """All of them, made; a library that fails here does so later, alone."""
        shape, (original, ours) = self.shape, EMBEDDINGS[self.module]
        size = shape.size[::-1] if shape.transposed else (shape.channels, *shape.size)
        peers: dict[str, Peer | Exception] = {}
        for name, make in self.peers.items():
            try:
                peers[name] = make(shape)
            except Exception as error:
                peers[name] = error
        product = 2.0 * shape.patches * shape.values * shape.dim
        return Setting(
            f"nn.Conv{len(shape.kernel)}d", original(shape), functools.partial(ours, shape),
            _normal(shape.batch, *size), (product, 2 * product), peers,
        )  # fmt: skip


def _patch_embed(shape: Shape, backend: str) -> nn.Module:
    return modules.PatchEmbed(
        shape.size, shape.kernel, shape.channels, shape.dim, bias=shape.bias, backend=backend
    )


def _vision_embeddings(shape: Shape, backend: str) -> nn.Module:
    return modules.VisionEmbeddings(
        shape.size, shape.kernel, shape.channels, shape.dim, class_token=shape.prefix > 0,
        bias=shape.bias, backend=backend,
    )  # fmt: skip


def _tubelet_embed(shape: Shape, backend: str) -> nn.Module:
    return modules.TubeletEmbed(
        shape.size[1:], shape.kernel[1:], shape.size[0], shape.kernel[0], shape.channels,
        shape.dim, bias=shape.bias, backend=backend,
    )  # fmt: skip


def _audio_patch_embed(shape: Shape, backend: str) -> nn.Module:
    return modules.AudioPatchEmbed(
        shape.kernel, shape.stride, embed_dim=shape.dim, bias=shape.bias, backend=backend
    )


# Ours -> the original as model code writes it, and what makes ours.
EMBEDDINGS: dict[str, tuple[Any, Any]] = {
    "PatchEmbed": (module_peers.Patches, _patch_embed),
    "VisionEmbeddings": (module_peers.Front, _vision_embeddings),
    "TubeletEmbed": (module_peers.Patches, _tubelet_embed),
    "AudioPatchEmbed": (module_peers.Spectrogram, _audio_patch_embed),
}


def _normal(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(SEED))
