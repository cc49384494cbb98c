"""Pairs of torch's multi-head attention and ours with the same parameters, and calls of both."""

import torch
from torch import Tensor, nn

from mmkernels.modules import MultiheadAttention

TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
HEADS, WIDTH, BATCH, LEN_Q, LEN_K = 2, 16, 3, 4, 6
OPTIONS = {
    "packed": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 10, "vdim": 12},
    "kdim_no_bias": {"kdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
}
# (dtype kind of key_padding_mask, dtype kind and rank of attn_mask, is_causal)
MASKS = {
    "no_mask": (None, None, False),
    "padding_bool": ("bool", None, False),
    "padding_float": ("float", None, False),
    "attn_2d_bool": (None, ("bool", 2), False),
    "attn_2d_float": (None, ("float", 2), False),
    "attn_3d_bool": (None, ("bool", 3), False),
    "attn_3d_float": (None, ("float", 3), False),
    "bool_bool": ("bool", ("bool", 3), False),
    "bool_float": ("bool", ("float", 2), False),
    "float_bool": ("float", ("bool", 2), False),
    "float_float": ("float", ("float", 3), False),
    "causal": (None, ("causal", 2), True),
    "causal_padding": ("bool", ("causal", 2), True),
    "not_really_causal": (None, ("float", 2), True),
}
LAYOUTS = ("batch_first", "seq_first", "unbatched")
INPUTS = ("self", "cross_shared", "cross")
WEIGHTS = (
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
)


def make_pair(dtype: torch.dtype = torch.float64, **options):
    """The same parameters in torch's module and in ours, biases not left at 0."""
    options = {"embed_dim": WIDTH, "num_heads": HEADS, "dtype": dtype} | options
    theirs = nn.MultiheadAttention(**options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_mask(kind: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A mask that leaves every query its key 0: without a key, torch gives NaN."""
    if kind is None:
        return None
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).triu(1)
    hidden = torch.rand(shape) < 0.4
    hidden[..., :1] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=dtype).masked_fill(hidden, -torch.inf).requires_grad_()


def make_inputs(inputs, layout, theirs, *, batch=BATCH, len_q=LEN_Q, len_k=LEN_K):
    """query, key and value; the same object where `inputs` says so."""

    def sequence(length, width):
        shape = {
            "batch_first": (batch, length, width),
            "seq_first": (length, batch, width),
            "unbatched": (length, width),
        }[layout]
        return torch.randn(shape, dtype=theirs.out_proj.weight.dtype, requires_grad=True)

    query = sequence(len_q, theirs.embed_dim)
    if inputs == "self":
        return query, query, query
    key = sequence(len_k, theirs.kdim)
    return query, key, key if inputs == "cross_shared" else sequence(len_k, theirs.vdim)


def make_masks(masks, layout, theirs, *, batch, len_q, len_k):
    padding, attn, is_causal = masks
    batch = () if layout == "unbatched" else (batch,)
    dtype = theirs.out_proj.weight.dtype
    kind, rank = attn or (None, 2)
    leading = (theirs.num_heads * (batch or (1,))[0],) if rank == 3 else ()
    return {
        "key_padding_mask": make_mask(padding, (*batch, len_k), dtype),
        "attn_mask": make_mask(kind, (*leading, len_q, len_k), dtype),
        "is_causal": is_causal,
    }


def results(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **arguments):
    """Outputs and the gradients of all inputs, float masks and parameters, by name."""
    out, weights = module(query, key, value, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator)).sum()
    found = {"out": out}
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator)).sum()
        found["weights"] = weights
    leaves = {"query": query, "key": key, "value": value} | dict(module.named_parameters())
    leaves |= {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(ours: dict, theirs: dict, dtype: torch.dtype) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        got = ours[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype, name
            torch.testing.assert_close(
                got, want, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}"
            )
