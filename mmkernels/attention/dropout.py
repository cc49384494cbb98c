"""The dropout keep bit of attention: the same in every backend, whatever its tiles.

keep(b, h, i, j) compares word j % 4 of Philox4x32-10 with counter (j // 4, i, h, b) and a 64-bit
key, the seed, with dropout_p scaled to 32 bits. Source: Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A (1,) int64 seed on `device`, from `generator` or torch's default one."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def keep_threshold(dropout_p: float) -> int:
    """A 32-bit word keeps its element if it is not below this."""
    return min(round(dropout_p * 2**32), 2**32)


def philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four 32-bit words of Philox4x32-10 for counters of four words, as int64 in [0, 2**32)."""
    words = list(counter)
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        # A 64-bit product of 32-bit words wraps int64 but keeps all its bits.
        left, right = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((right >> 32) & _WORD) ^ words[1] ^ keys[0],
            right & _WORD,
            ((left >> 32) & _WORD) ^ words[3] ^ keys[1],
            left & _WORD,
        ]
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    return tuple(words)


def keep_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """(B, H, Sq, Sk) bool, True where dropout keeps the probability.

    Args:
        seed: (1,) int64.
        dropout_p: probability of dropping, in [0, 1].
        batch: B.
        heads: H, query heads.
        seqlen_q: Sq.
        seqlen_k: Sk.
    """
    arange = [
        torch.arange(n, device=seed.device) for n in (-(-seqlen_k // 4), seqlen_q, heads, batch)
    ]
    shapes = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
    counter = tuple(index.view(shape) for index, shape in zip(arange, shapes, strict=True))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), -1)
    return (words >= keep_threshold(dropout_p)).flatten(-2)[..., :seqlen_k]
