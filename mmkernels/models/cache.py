"""The keys and values that decoding has computed."""

import torch
from torch import Tensor

from mmkernels.models.config import DecoderConfig


class KVCache:
    """Room for the keys and values of every layer.

    Args:
        config: the decoder's sizes.
        batch: number of sequences.
        capacity: longest sequence.
        dtype: dtype of keys and values.
        device: where they lie.

    Attributes:
        k: (layers, batch, capacity, Hkv, D).
        v: likewise.
        lengths: (batch,) int32, tokens that each sequence has so far.
        adapted: (batch,) bool, whether the decoder's adapters are in force in each sequence.

    Raises:
        ValueError: capacity is beyond the decoder's longest sequence.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if capacity > config.max_position_embeddings:
            raise ValueError(
                f"KVCache: capacity is {capacity}; the model was made for sequences of at most "
                f"{config.max_position_embeddings} tokens"
            )
        shape = (
            config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.adapted = torch.zeros(batch, dtype=torch.bool, device=device)

    @property
    def capacity(self) -> int:
        """Longest sequence."""
        return self.k.shape[2]

    def take(self, rows: Tensor, other: "KVCache") -> None:
        """Puts the sequences of `other` into `rows` (its batch,) of this cache."""
        filled = min(self.capacity, other.capacity)
        self.k[:, rows, :filled] = other.k[:, :, :filled]
        self.v[:, rows, :filled] = other.v[:, :, :filled]
        self.lengths[rows] = other.lengths
        self.adapted[rows] = other.adapted
