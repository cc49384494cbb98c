"""One right call of each public attention function, which a test makes wrong in one place."""

import torch
from torch import Tensor

import mmkernels as mm

B, SQ, SK, HQ, HKV, D, DV = 2, 5, 7, 4, 2, 8, 6


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(**changes: object) -> object:
    """A call that is right but for the changes."""
    q, k, v = ones(B, SQ, HQ, D), ones(B, SK, HKV, D), ones(B, SK, HKV, DV)
    return mm.attention(**{"q": q, "k": k, "v": v} | changes)


def varlen(**changes: object) -> object:
    arguments = {
        "q": ones(5, HQ, D), "k": ones(7, HKV, D), "v": ones(7, HKV, DV),
        "cu_seqlens_q": integers(0, 2, 5), "cu_seqlens_k": integers(0, 4, 7),
        "max_seqlen_q": 3, "max_seqlen_k": 4,
    }  # fmt: skip
    return mm.attention_varlen(**arguments | changes)


def decode(**changes: object) -> object:
    arguments = {
        "q": ones(B, 1, HQ, D), "k_cache": ones(B, SK, HKV, D), "v_cache": ones(B, SK, HKV, DV),
        "cache_seqlens": integers(3, 4),
    }  # fmt: skip
    return mm.attention_with_kvcache(**arguments | changes)


def paged(**changes: object) -> object:
    """Three pages of four keys; sequences of 3 and 5 keys."""
    arguments = {
        "q": ones(B, 1, HQ, D), "k_cache": ones(3, 4, HKV, D), "v_cache": ones(3, 4, HKV, DV),
        "cache_seqlens": integers(3, 5), "block_table": torch.tensor([[0, 9], [1, 2]]).int(),
    }  # fmt: skip
    return mm.attention_with_kvcache(**arguments | changes)


def sdpa(**changes: object) -> object:
    arguments = {
        "query": ones(B, HQ, SQ, D), "key": ones(B, HQ, SK, D), "value": ones(B, HQ, SK, DV),
    }  # fmt: skip
    return mm.scaled_dot_product_attention(**arguments | changes)
