"""A Llama-shaped decoder: RMSNorm, rotary positions, grouped heads, SwiGLU, tied head.

Parameters are named as in transformers' LlamaModel, so its checkpoints load. A block does not know
what it attends to: `attend(q, k, v)` comes with the call, and is causal text, images in text, a
tower's patches, or a cache.

Source: Touvron et al., "Llama 2", 2023; for qk_norm, Henry et al., "Query-Key Normalization for
Transformers", 2020.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.config import DecoderConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class AdaptedLinear(nn.Linear):
    """A projection without bias that takes a low-rank correction in the rows that ask for it.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.lora_a = nn.Parameter(torch.randn(rank, in_features) * in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))

    # (B, S, 1) or (B, 1, 1), True where the correction is in force; set for each forward.
    gate: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, S, in_features) -> (B, S, out_features)."""
        out = super().forward(input)
        if self.gate is None:
            return out
        correction = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return out + correction * self.gate.to(correction.dtype)


class Attention(nn.Module):
    """Grouped-query attention.

    Args:
        config: its sizes.
        lora_rank: rank of the adapters of q_proj and v_proj; 0: none.
    """

    def __init__(self, config: DecoderConfig, lora_rank: int = 0) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = projection(width, heads, lora_rank)
        self.k_proj = projection(width, kv_heads)
        self.v_proj = projection(width, kv_heads, lora_rank)
        self.o_proj = projection(heads, width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))  # (B, S, H, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.o_proj(attend(q, k, v).flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = projection(config.hidden_size, config.intermediate_size)
        self.up_proj = projection(config.hidden_size, config.intermediate_size)
        self.down_proj = projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each on the norm of the residual stream.

    Args:
        config: its sizes.
        lora_rank: as of `Attention`.
    """

    def __init__(self, config: DecoderConfig, lora_rank: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, lora_rank)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """x (B, S, E) -> (B, S, E); attend(q, k, v) takes (B, S, H, D) and gives out like q."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and norm; the head is the embedding.

    Args:
        config: its sizes.
        lora_rank: as of `Attention`.
    """

    def __init__(self, config: DecoderConfig, lora_rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config, lora_rank) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin (B, S, 1, D/2) for positions (B, S)."""
        dim = self.config.head_dim
        exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        angle = positions[..., None, None].float() * self.config.rope_theta**-exponent
        return angle.cos(), angle.sin()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., E), normalised -> (..., vocab_size)."""
        return F.linear(hidden, self.embed_tokens.weight)


def projection(in_features: int, out_features: int, lora_rank: int = 0) -> nn.Linear:
    """A linear layer without bias, with an adapter where lora_rank > 0."""
    if lora_rank:
        return AdaptedLinear(in_features, out_features, lora_rank)
    return nn.Linear(in_features, out_features, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of x (B, S, H, D); cos and sin (B, S, 1, D/2).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.no_grad()
def initialise(module: nn.Module, depth: int) -> None:
    """Normal weights; what writes to the residual stream is smaller the deeper the model is.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or "lora" in name:
            continue
        std = parameter[0].numel() ** -0.5
        if "embed_tokens" in name:
            std = 0.02
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * depth) ** -0.5
        parameter.normal_(std=std)
