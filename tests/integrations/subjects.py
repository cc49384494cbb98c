"""Small models for tests of how `mm.replace` lives with the rest of PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.counting import kernel_calls
from tests.integrations.libraries import numbers


class Attend(nn.Module):
    """Self-attention by torch's function."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return out.transpose(1, 2).flatten(2)


class Mixed(nn.Module):
    """One of each that torch alone can have: a patch embedding and three kinds of attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attend = Attend(16, dropout)
        self.multihead = nn.MultiheadAttention(16, 2, dropout, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = x + self.attend(x)
        x = x + self.multihead(x, x, x, need_weights=False)[0]
        return self.layer(x)


def mixed() -> nn.Module:
    return Mixed().eval()


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **options).eval()


def llama(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="4.57")
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | options)).eval()


def hf_vit(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="4.57")
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = transformers.ViTConfig(**config | options)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def inputs(model: nn.Module, batch: int = 2) -> Tensor:
    """What the model takes."""
    if "Llama" in type(model).__name__:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 64, (batch, 9), generator=generator)
    return numbers(batch, 3, 16, 16)


def output(model: Callable[..., Any], x: Tensor) -> Tensor:
    """The tensor in whatever the model returns."""
    out = model(x)
    return out if isinstance(out, Tensor) else out[0]


# name: makes the model, attentions swapped, patch embeddings swapped
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torch": (mixed, 3, 1),
    "timm ViT": (timm_vit, 2, 1),
    "transformers Llama": (llama, 2, 0),
    "transformers ViT": (hf_vit, 2, 1),
}
EVERY = pytest.mark.parametrize("subject", SUBJECTS)


def make(subject: str) -> nn.Module:
    return SUBJECTS[subject][0]()


def run(model: nn.Module) -> tuple[Tensor, tuple[int, int]]:
    """The output, and how many attentions and patch embeddings ran on kernels."""
    with torch.no_grad(), kernel_calls() as calls:
        out = output(model, inputs(model))
    return out, (calls.attention, calls.patch_embed)


def kernels(subject: str) -> tuple[int, int]:
    """How many attentions and patch embeddings run on kernels in one forward."""
    return SUBJECTS[subject][1:]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def projection(out: Tensor) -> Tensor:
    return (out.float() * numbers(*out.shape, seed=2)).sum()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one, for a fixed projection of the output."""
    projection(output(model, x)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
