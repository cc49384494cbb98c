"""Does every wrong input raise an error that names the argument, what it got and what it wants?"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels.attention.interval import IntervalMask

masks = mm.masks
B, SQ, SK, HQ, HKV, D, DV = 2, 5, 7, 4, 2, 8, 6
NAN = float("nan")


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


NEW = {"k": ones(B, 2, HKV, D), "v": ones(B, 2, HKV, DV)}


class Case(NamedTuple):
    """A wrong call and what its error must be: its type, and words that its message must hold."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    words: tuple[str, ...]


def case(name: str, call: Callable[[], object], error: type[Exception], *words: str) -> Case:
    return Case(name, call, error, words)


WRONG = [
    # attention: tensors
    case("q is a list", lambda: attention(q=[1.0]), TypeError, "q is list", "torch.Tensor"),
    case("v is None", lambda: attention(v=None), TypeError, "v is NoneType", "torch.Tensor"),
    case("q has rank 3", lambda: attention(q=ones(SQ, HQ, D)), ValueError, "q has shape (5, 4, 8)",
         "4-dimensional", "(batch, seqlen, heads, head_dim)"),
    case("k has rank 5", lambda: attention(k=ones(1, B, SK, HKV, D)), ValueError,
         "k has shape (1, 2, 7, 2, 8)", "4-dimensional"),
    case("v has rank 2", lambda: attention(v=ones(SK, DV)), ValueError, "v has shape (7, 6)"),
    case("q is int", lambda: attention(q=ones(B, SQ, HQ, D, dtype=torch.int64)), TypeError,
         "q is torch.int64", "float16, bfloat16, float32 or float64"),
    case("q is complex", lambda: attention(q=ones(B, SQ, HQ, D, dtype=torch.complex64)), TypeError,
         "q is torch.complex64", "float32"),
    case("k has another dtype", lambda: attention(k=ones(B, SK, HKV, D).half()), TypeError,
         "q is torch.float32", "k torch.float16", "cast"),
    case("v has another dtype", lambda: attention(v=ones(B, SK, HKV, DV).double()), TypeError,
         "v torch.float64", "v.to(q.dtype)"),
    case("k on another device", lambda: attention(k=ones(B, SK, HKV, D, device="meta")), ValueError,
         "q is on cpu", "k on meta", "move"),
    case("q on another device", lambda: attention(q=ones(B, SQ, HQ, D, device="meta")), ValueError,
         "q is on meta", "k on cpu", "move"),
    case("batch of k", lambda: attention(k=ones(1, SK, HKV, D), v=ones(1, SK, HKV, DV)), ValueError,
         "q has batch size 2", "k 1", "expand"),
    case("seqlen of v", lambda: attention(v=ones(B, 6, HKV, DV)), ValueError,
         "k has shape (2, 7, 2, 8)", "v (2, 6, 2, 6)", "agree"),
    case("heads of v", lambda: attention(v=ones(B, SK, 1, DV)), ValueError, "v (2, 7, 1, 6)",
         "agree"),
    case("head dim of k", lambda: attention(k=ones(B, SK, HKV, 9)), ValueError,
         "head dim of q is 8", "of k 9", "agree"),
    case("head dim of v is 0", lambda: attention(v=ones(B, SK, HKV, 0)), ValueError, "of v 0"),
    case("heads no multiple", lambda: attention(k=ones(B, SK, 3, D), v=ones(B, SK, 3, DV)),
         ValueError, "q has 4 heads", "k 3", "multiple", "transpose(1, 2)"),
    case("no heads in k", lambda: attention(k=ones(B, SK, 0, D), v=ones(B, SK, 0, DV)), ValueError,
         "q has 4 heads", "k 0"),
    case("q is sparse", lambda: attention(q=ones(B, SQ, HQ, D).to_sparse()), TypeError, "q is",
         "sparse", "strided"),
    # attention: masks
    case("float mask", lambda: attention(mask=ones(SQ, SK)), TypeError, "mask is torch.float32",
         "bool", "bias="),
    case("mask is a list", lambda: attention(mask=[True]), TypeError, "mask is list",
         "IntervalMask"),
    case("bool mask of another shape", lambda: attention(mask=ones(SK, SQ).bool()), ValueError,
         "mask has shape (7, 5)", "broadcast", "(2, 4, 5, 7)"),
    case("bool mask of rank 5", lambda: attention(mask=ones(1, B, HQ, SQ, SK).bool()), ValueError,
         "mask has shape (1, 2, 4, 5, 7)", "(2, 4, 5, 7)"),
    case("bool mask elsewhere", lambda: attention(mask=ones(SQ, SK, device="meta").bool()),
         ValueError, "mask is on meta", "q on cpu"),
    case("rows of mask", lambda: attention(mask=masks.full(6, SK)), ValueError,
         "mask has shape (1, 6)", "(1 or 2, 5)"),
    case("batch of mask", lambda: attention(mask=masks.padding(integers(1, 2, 3), SQ, SK)),
         ValueError, "mask has shape (3, 5)", "(1 or 2, 5)"),
    case("keys of mask", lambda: attention(mask=masks.full(SQ, 8)), ValueError,
         "mask is over 8 keys", "k has 7"),
    case("mask ends beyond the keys",
         lambda: attention(mask=IntervalMask(integers(0, 0, 0, 0, 0), integers(1, 2, 9, 1, 1))),
         ValueError, "mask ends at key 9", "k has 7"),
    case("mask elsewhere", lambda: attention(mask=masks.full(SQ, SK, device="meta")), ValueError,
         "mask is on meta", "mask.to(q.device)"),
    case("window is a number", lambda: attention(window_size=3), TypeError, "window_size is 3",
         "(left, right)"),
    case("window has three", lambda: attention(window_size=(1, 2, 3)), TypeError, "(1, 2, 3)",
         "(left, right)"),
    case("window below -1", lambda: attention(window_size=(-2, 0)), ValueError,
         "window_size is (-2, 0)", ">= -1"),
    case("window is None", lambda: attention(window_size=None), TypeError, "window_size is None",
         "(left, right)"),
    case("window of floats", lambda: attention(window_size=(1.5, 0)), TypeError,
         "window_size is (1.5, 0)", "int"),
    case("window of strings", lambda: attention(window_size=("1", "2")), TypeError,
         "window_size is", "int"),
    # attention: scores
    case("bool bias", lambda: attention(bias=ones(SQ, SK).bool()), TypeError, "bias is torch.bool",
         "floating point", "mask="),
    case("int bias", lambda: attention(bias=ones(SQ, SK).int()), TypeError, "bias is torch.int32",
         "floating point"),
    case("bias is a number", lambda: attention(bias=1.0), TypeError, "bias is float",
         "torch.Tensor"),
    case("bias of another shape", lambda: attention(bias=ones(3, SQ, SK)), ValueError,
         "bias has shape (3, 5, 7)", "broadcast", "(2, 4, 5, 7)"),
    case("bias elsewhere", lambda: attention(bias=ones(SQ, SK, device="meta")), ValueError,
         "bias is on meta", "q on cpu"),
    case("alibi of another shape", lambda: attention(alibi_slopes=ones(2)), ValueError,
         "alibi_slopes has shape (2,)", "(4,) or (2, 4)"),
    case("alibi of another batch", lambda: attention(alibi_slopes=ones(3, 4)), ValueError,
         "alibi_slopes has shape (3, 4)", "(2, 4)"),
    case("int alibi", lambda: attention(alibi_slopes=integers(1, 2, 3, 4)), TypeError,
         "alibi_slopes is torch.int32", "floating-point"),
    case("alibi is a list", lambda: attention(alibi_slopes=[1.0] * 4), TypeError,
         "alibi_slopes is list", "floating-point"),
    case("alibi elsewhere", lambda: attention(alibi_slopes=ones(4, device="meta")), ValueError,
         "alibi_slopes is on meta", "q on cpu"),
    case("alibi with a gradient", lambda: attention(alibi_slopes=ones(4, requires_grad=True)),
         ValueError, "alibi_slopes needs a gradient", "detach", "bias="),
    case("sinks of another shape", lambda: attention(sinks=ones(B, HQ)), ValueError,
         "sinks has shape (2, 4)", "(4,)"),
    case("int sinks", lambda: attention(sinks=integers(1, 2, 3, 4)), TypeError,
         "sinks is torch.int32", "floating-point"),
    case("sinks elsewhere", lambda: attention(sinks=ones(4, device="meta")), ValueError,
         "sinks is on meta", "q on cpu"),
    # attention: numbers
    case("scale is NaN", lambda: attention(softmax_scale=NAN), ValueError, "softmax_scale is nan",
         "finite"),
    case("scale is infinite", lambda: attention(softmax_scale=math.inf), ValueError,
         "softmax_scale is inf", "finite"),
    case("scale is a string", lambda: attention(softmax_scale="auto"), TypeError,
         "softmax_scale is 'auto'", "number"),
    case("softcap negative", lambda: attention(softcap=-1.0), ValueError, "softcap is -1.0",
         ">= 0"),
    case("softcap NaN", lambda: attention(softcap=NAN), ValueError, "softcap is nan", ">= 0"),
    case("softcap is None", lambda: attention(softcap=None), TypeError, "softcap None", "number"),
    case("dropout above 1", lambda: attention(dropout_p=1.5), ValueError, "dropout_p is 1.5",
         "[0, 1]"),
    case("dropout below 0", lambda: attention(dropout_p=-0.1), ValueError, "dropout_p is -0.1",
         "[0, 1]"),
    case("dropout NaN", lambda: attention(dropout_p=NAN), ValueError, "dropout_p is nan", "[0, 1]"),
    case("generator is a seed", lambda: attention(dropout_p=0.5, generator=7), TypeError,
         "generator", "int", "torch.Generator"),
    # attention_varlen
    case("varlen: rank of q", lambda: varlen(q=ones(1, 5, HQ, D)), ValueError,
         "attention_varlen: q has shape (1, 5, 4, 8)", "(total, heads, head_dim)"),
    case("varlen: q is a list", lambda: varlen(q=[1.0]), TypeError, "q is list", "torch.Tensor"),
    case("varlen: v has another dtype", lambda: varlen(v=ones(7, HKV, DV).half()), TypeError,
         "v torch.float16", "cast"),
    case("varlen: heads no multiple", lambda: varlen(k=ones(7, 3, D), v=ones(7, 3, DV)), ValueError,
         "q has 4 heads", "k 3"),
    case("varlen: totals of k and v", lambda: varlen(v=ones(8, HKV, DV)), ValueError, "7, 2, 8)",
         "8, 2, 6)", "agree"),
    case("cu_seqlens decrease", lambda: varlen(cu_seqlens_q=integers(0, 4, 3)), ValueError,
         "cu_seqlens_q is [0, 4, 3]", "never decrease"),
    case("cu_seqlens not from 0", lambda: varlen(cu_seqlens_k=integers(1, 4, 7)), ValueError,
         "cu_seqlens_k is [1, 4, 7]", "start at 0"),
    case("cu_seqlens beyond the rows",
         lambda: varlen(cu_seqlens_q=integers(0, 2, 6), max_seqlen_q=6), ValueError,
         "cu_seqlens_q ends at 6", "5 packed rows"),
    case("cu_seqlens beyond the keys", lambda: varlen(cu_seqlens_k=integers(0, 4, 8)), ValueError,
         "cu_seqlens_k ends at 8", "7 packed"),
    case("float cu_seqlens", lambda: varlen(cu_seqlens_q=torch.tensor([0.0, 2.0, 5.0])), TypeError,
         "cu_seqlens_q is torch.float32", "integer"),
    case("cu_seqlens is a list", lambda: varlen(cu_seqlens_k=[0, 4, 7]), TypeError,
         "cu_seqlens_k is list", "integer tensor"),
    case("cu_seqlens of unlike lengths", lambda: varlen(cu_seqlens_q=integers(0, 5)), ValueError,
         "cu_seqlens_q", "(2,)", "(3,)", "(N + 1,)"),
    case("cu_seqlens of rank 2", lambda: varlen(cu_seqlens_q=integers(0, 2, 5)[None]), ValueError,
         "cu_seqlens_q", "(1, 3)", "(N + 1,)"),
    case("cu_seqlens without an element",
         lambda: varlen(cu_seqlens_q=integers(), cu_seqlens_k=integers()), ValueError,
         "cu_seqlens_q", "(0,)", "(N + 1,)"),
    case("cu_seqlens elsewhere", lambda: varlen(cu_seqlens_q=integers(0, 2, 5).to("meta")),
         ValueError, "cu_seqlens_q is on meta", "cu_seqlens_k on cpu", "move"),
    case("both cu_seqlens elsewhere",
         lambda: varlen(
             cu_seqlens_q=integers(0, 2, 5).to("meta"), cu_seqlens_k=integers(0, 4, 7).to("meta")),
         ValueError, "cu_seqlens_q is on meta", "q on cpu", "move"),
    case("max_seqlen_q too small", lambda: varlen(max_seqlen_q=2), ValueError, "max_seqlen_q is 2",
         "longest sequence has 3", "at least"),
    case("max_seqlen_k too small", lambda: varlen(max_seqlen_k=3), ValueError, "max_seqlen_k is 3",
         "longest sequence has 4"),
    case("max_seqlen is a tensor", lambda: varlen(max_seqlen_q=torch.tensor(3)), TypeError,
         "max_seqlen_q is Tensor", "int"),
    case("max_seqlen is None", lambda: varlen(max_seqlen_k=None), TypeError,
         "max_seqlen_k is NoneType", "int"),
    case("varlen: mask of another shape", lambda: varlen(mask=ones(3, 3).bool()), ValueError,
         "attention_varlen: mask has shape (3, 3)", "(1, 4, 5, 7)"),
    case("varlen: mask elsewhere", lambda: varlen(mask=ones(5, 7, device="meta").bool()),
         ValueError, "attention_varlen: mask is on meta", "q on cpu"),
    case("varlen: interval mask of another shape", lambda: varlen(mask=masks.full(6, 7)),
         ValueError, "mask has shape (1, 6)", "5"),
    case("varlen: float mask", lambda: varlen(mask=ones(5, 7)), TypeError, "mask is torch.float32",
         "bias="),
    case("varlen: bias beside alibi", lambda: varlen(alibi_slopes=ones(4), bias=ones(3, 3)),
         ValueError, "attention_varlen: bias has shape (3, 3)", "(1, 4, 5, 7)"),
    case("varlen: alibi of another shape", lambda: varlen(alibi_slopes=ones(3)), ValueError,
         "alibi_slopes has shape (3,)", "(4,)"),
    case("varlen: window below -1", lambda: varlen(window_size=(0, -3)), ValueError,
         "attention_varlen: window_size is (0, -3)", ">= -1"),
    # attention_with_kvcache
    case("cache: rank of q", lambda: decode(q=ones(B, HQ, D)), ValueError,
         "attention_with_kvcache: q has shape (2, 4, 8)", "4-dimensional"),
    case("cache of another dtype", lambda: decode(k_cache=ones(B, SK, HKV, D).half()), TypeError,
         "k_cache torch.float16", "cast"),
    case("v_cache elsewhere", lambda: decode(v_cache=ones(B, SK, HKV, DV, device="meta")),
         ValueError, "v_cache on meta", "move"),
    case("caches of unlike lengths", lambda: decode(v_cache=ones(B, 8, HKV, DV)), ValueError,
         "k_cache has shape (2, 7, 2, 8)", "v_cache (2, 8, 2, 6)", "agree"),
    case("batch of the cache",
         lambda: decode(k_cache=ones(3, SK, HKV, D), v_cache=ones(3, SK, HKV, DV)), ValueError,
         "q has batch size 2", "k_cache 3"),
    case("cache_seqlens too large", lambda: decode(cache_seqlens=integers(3, 8)), ValueError,
         "cache_seqlens is [3, 8]", "[0, 7]", "holds 7"),
    case("cache_seqlens negative", lambda: decode(cache_seqlens=integers(-1, 3)), ValueError,
         "cache_seqlens is [-1, 3]", "[0, 7]"),
    case("cache_seqlens an int too large", lambda: decode(cache_seqlens=8), ValueError,
         "cache_seqlens is 8", "[0, 7]"),
    case("no room for k", lambda: decode(cache_seqlens=integers(3, 6), **NEW), ValueError,
         "cache_seqlens is [3, 6]", "[0, 5]", "k has 2"),
    case("no room for k in a full cache", lambda: decode(cache_seqlens=None, **NEW), ValueError,
         "cache_seqlens is None", "2 keys", "pass the number"),
    case("more new keys than cache",
         lambda: decode(cache_seqlens=0, k=ones(B, 8, HKV, D), v=ones(B, 8, HKV, DV)), ValueError,
         "cache_seqlens is 0", "holds 7", "k has 8"),
    case("float cache_seqlens", lambda: decode(cache_seqlens=torch.tensor([1.0, 2.0])), TypeError,
         "cache_seqlens is torch.float32", "integer"),
    case("cache_seqlens is a float", lambda: decode(cache_seqlens=3.0), TypeError,
         "cache_seqlens is float", "integer"),
    case("cache_seqlens of another shape", lambda: decode(cache_seqlens=integers(1, 2, 3)),
         ValueError, "cache_seqlens has shape (3,)", "(2,)"),
    case("cache_seqlens elsewhere", lambda: decode(cache_seqlens=integers(3, 4).to("meta")),
         ValueError, "cache_seqlens is on meta", "q on cpu"),
    case("k without v", lambda: decode(k=NEW["k"]), ValueError, "v is missing", "together"),
    case("v without k", lambda: decode(v=NEW["v"]), ValueError, "k is missing", "together"),
    case("shape of new k", lambda: decode(k=ones(B, 2, HQ, D), v=NEW["v"]), ValueError,
         "k has shape (2, 2, 4, 8)", "(2, 2, 2, 8)"),
    case("length of new v", lambda: decode(k=NEW["k"], v=ones(B, 3, HKV, DV)), ValueError,
         "v has shape (2, 3, 2, 6)", "(2, 2, 2, 6)"),
    case("rank of new k", lambda: decode(k=ones(B, HKV, D), v=NEW["v"]), ValueError,
         "k has shape (2, 2, 8)", "Snew"),
    case("dtype of new k", lambda: decode(k=NEW["k"].half(), v=NEW["v"]), TypeError,
         "k torch.float16", "cast"),
    case("new k is a list", lambda: decode(k=[1.0], v=NEW["v"]), TypeError, "k is list",
         "torch.Tensor"),
    case("cache: sinks is a list", lambda: decode(sinks=[0.0] * 4), TypeError, "sinks is list",
         "floating-point"),
    case("block_table outside the cache",
         lambda: paged(block_table=torch.tensor([[0, 9], [1, 3]]).int()), ValueError,
         "block_table[1, 1] is 3", "pages 0 to 2"),
    case("block_table negative", lambda: paged(block_table=torch.tensor([[-1, 9], [1, 2]]).int()),
         ValueError, "block_table[0, 0] is -1", "pages 0 to 2"),
    case("block_table outside, for the new keys",
         lambda: paged(cache_seqlens=integers(3, 5), **NEW), ValueError, "block_table[0, 1] is 9",
         "pages 0 to 2"),
    case("float block_table", lambda: paged(block_table=ones(2, 2)), TypeError,
         "block_table is torch.float32", "integer"),
    case("block_table of another batch", lambda: paged(block_table=torch.zeros(3, 2).int()),
         ValueError, "block_table has shape (3, 2)", "(2, max_blocks)"),
    case("block_table of rank 1", lambda: paged(block_table=integers(0, 1)), ValueError,
         "block_table has shape (2,)", "(2, max_blocks)"),
    case("block_table elsewhere", lambda: paged(block_table=torch.zeros(2, 2).int().to("meta")),
         ValueError, "block_table is on meta", "q on cpu"),
    case("more keys than pages", lambda: paged(cache_seqlens=integers(3, 9)), ValueError,
         "cache_seqlens is [3, 9]", "[0, 8]"),
    case("pages of no key",
         lambda: paged(k_cache=ones(3, 0, HKV, D), v_cache=ones(3, 0, HKV, DV), cache_seqlens=0),
         ValueError, "k_cache has shape (3, 0, 2, 8)", "page"),
    case("cache: q requires a gradient", lambda: decode(q=ones(B, 1, HQ, D, requires_grad=True)),
         ValueError, "q requires a gradient", "no_grad", "mmkernels.attention"),
    case("cache: v requires a gradient",
         lambda: decode(k=NEW["k"], v=ones(B, 2, HKV, DV, requires_grad=True)), ValueError,
         "v requires a gradient", "no_grad"),
    case("cache: sinks require a gradient", lambda: decode(sinks=ones(4, requires_grad=True)),
         ValueError, "sinks requires a gradient", "no_grad"),
    case("cache: alibi of another shape", lambda: decode(alibi_slopes=ones(B, 3)), ValueError,
         "alibi_slopes has shape (2, 3)", "(4,) or (2, 4)"),
    case("cache: softcap negative", lambda: decode(softcap=-2.0), ValueError, "softcap is -2.0",
         ">= 0"),
    case("cache: window below -1", lambda: decode(window_size=(-5, 0)), ValueError,
         "attention_with_kvcache: window_size is (-5, 0)", ">= -1"),
    # scaled_dot_product_attention
    case("sdpa: query of rank 1", lambda: sdpa(query=ones(8)), ValueError, "query has shape (8,)",
         "(..., heads, seqlen, head_dim)"),
    case("sdpa: ranks differ", lambda: sdpa(key=ones(HQ, SK, D)), ValueError,
         "key has shape (4, 7, 8)", "query (2, 4, 5, 8)"),
    case("sdpa: query is a list", lambda: sdpa(query=[1.0]), TypeError, "query is list",
         "torch.Tensor"),
    case("sdpa: heads without enable_gqa",
         lambda: sdpa(key=ones(B, 2, SK, D), value=ones(B, 2, SK, DV)), ValueError,
         "query has 4 heads", "key 2", "enable_gqa=True"),
    case("sdpa: attn_mask and is_causal",
         lambda: sdpa(attn_mask=ones(SQ, SK).bool(), is_causal=True), ValueError,
         "attn_mask and is_causal", "put the causal part into attn_mask"),
    case("sdpa: attn_mask of another shape", lambda: sdpa(attn_mask=ones(SK, SQ).bool()),
         ValueError, "attn_mask has shape (7, 5)", "(2, 4, 5, 7)"),
    case("sdpa: float attn_mask of another shape", lambda: sdpa(attn_mask=ones(SK, SQ)), ValueError,
         "attn_mask has shape (7, 5)", "(2, 4, 5, 7)"),
    case("sdpa: query is int", lambda: sdpa(query=ones(B, HQ, SQ, D).int()), TypeError,
         "query is torch.int32", "float32"),
    case("sdpa: key has another dtype", lambda: sdpa(key=ones(B, HQ, SK, D).half()), TypeError,
         "query is torch.float32", "key torch.float16", "cast"),
    case("sdpa: seqlen of value", lambda: sdpa(value=ones(B, HQ, 6, DV)), ValueError,
         "key has shape (2, 4, 7, 8)", "value (2, 4, 6, 6)", "agree"),
    case("sdpa: 3-d, attn_mask of another shape",
         lambda: sdpa(
             query=ones(HQ, SQ, D), key=ones(HQ, SK, D), value=ones(HQ, SK, DV),
             attn_mask=ones(SK, SQ).bool()),
         ValueError, "attn_mask has shape (7, 5)", "(4, 5, 7)"),
    case("sdpa: int attn_mask", lambda: sdpa(attn_mask=ones(SQ, SK).int()), TypeError,
         "attn_mask is torch.int32", "bool", "floating"),
    case("sdpa: attn_mask is a list", lambda: sdpa(attn_mask=[[True]]), TypeError,
         "attn_mask is list", "torch.Tensor"),
    case("sdpa: dropout above 1", lambda: sdpa(dropout_p=2.0), ValueError, "dropout_p is 2.0",
         "[0, 1]"),
    case("sdpa: scale is NaN", lambda: sdpa(scale=NAN), ValueError, "scale is nan", "finite"),
    # IntervalMask
    case("float start", lambda: IntervalMask(ones(3), integers(1, 2, 3)), TypeError,
         "start is torch.float32", "integer"),
    case("bool end", lambda: IntervalMask(integers(0), ones(1).bool()), TypeError, "end is bool",
         "key indices", "from_dense"),
    case("start is a list", lambda: IntervalMask([0], integers(1)), TypeError, "start is list",
         "integer tensor"),
    case("start of rank 3", lambda: IntervalMask(integers(0)[None, None], integers(1)), ValueError,
         "start has shape (1, 1, 1)", "(B, Sq)"),
    case("start and end of unlike rows", lambda: IntervalMask(integers(0, 0), integers(1, 1, 1)),
         ValueError, "start has shape (1, 2)", "end (1, 3)", "agree"),
    case("start and end of unlike batch",
         lambda: IntervalMask(torch.zeros(2, 1).int(), torch.ones(3, 1).int()), ValueError,
         "start has shape (2, 1)", "end (3, 1)", "agree"),
    case("bounds on two devices", lambda: IntervalMask(integers(0), integers(1).to("meta")),
         ValueError, "start is on cpu", "end on meta", "move"),
    case("start > end", lambda: IntervalMask(integers(0, 3), integers(1, 2)), ValueError,
         "row 1 of batch 0 is [3, 2)", "start > end"),
    case("start negative", lambda: IntervalMask(integers(0, -1), integers(1, 2)), ValueError,
         "row 1 of batch 0 is [-1, 2)", "start < 0"),
    case("one start negative for a batch of ends",
         lambda: IntervalMask(integers(0, -1), torch.ones(2, 2).int()), ValueError,
         "row 1 of batch 0", "[-1, 1)", "start < 0"),
    case("end beyond the keys", lambda: IntervalMask(integers(0, 0), integers(4, 5), 4), ValueError,
         "row 1 of batch 0 is [0, 5)", "end > 4"),
    case("one end beyond the keys for a batch of starts",
         lambda: IntervalMask(torch.zeros(2, 2).int(), integers(4, 5), 4), ValueError,
         "row 1 of batch 0", "[0, 5)", "end > 4"),
    case("& of unlike rows", lambda: masks.full(3) & masks.full(4, 3), ValueError, "(1, 3)",
         "(1, 4)", "must agree"),
    case("| of unlike keys", lambda: masks.full(3, 4) | masks.full(3, 5), ValueError,
         "4 and 5 keys"),
    case("& across devices", lambda: masks.full(3) & masks.full(3, device="meta"), ValueError,
         "cpu and meta", ".to()"),
    case("& with a tensor", lambda: masks.full(3) & ones(3, 3).bool(), TypeError, "IntervalMask"),
    case("| of intervals that are apart",
         lambda: (
             IntervalMask(integers(0), integers(1), 4) | IntervalMask(integers(2), integers(3), 4)),
         ValueError, "row 0 of batch 0", "[0, 1]", "[2, 3]", "dense"),
    case("from_dense of floats", lambda: IntervalMask.from_dense(ones(2, 2)), TypeError,
         "mask is torch.float32", "bool"),
    case("from_dense of a list", lambda: IntervalMask.from_dense([[True]]), TypeError,
         "mask is list", "bool"),
    case("from_dense with heads", lambda: IntervalMask.from_dense(ones(2, 3, 2, 2).bool()),
         ValueError, "(2, 3, 2, 2)", "(B, 1, Sq, Sk)"),
    case("from_dense of no interval",
         lambda: IntervalMask.from_dense(torch.eye(3).bool() ^ ones(3, 3).bool()), ValueError,
         "row 1 of batch 0", "contiguous", "mask="),
    # Builders
    case("causal of a negative size", lambda: masks.causal(-1), ValueError, "seqlen_q is -1",
         ">= 0"),
    case("full over a negative size", lambda: masks.full(2, -3), ValueError, "seqlen_k is -3",
         ">= 0"),
    case("top_left of a negative size", lambda: masks.top_left(-1, 3), ValueError, "seqlen_q is -1",
         ">= 0"),
    case("causal of a float size", lambda: masks.causal(3.5), TypeError, "seqlen_q is", "int"),
    case("window below -1", lambda: masks.window(3, window_size=(0, -2)), ValueError,
         "window_size is (0, -2)", ">= -1"),
    case("window of a float", lambda: masks.window(3, window_size=(0.5, 1)), TypeError,
         "window_size is (0.5, 1)", "int"),
    case("padding beyond the keys", lambda: masks.padding(integers(2, 9), 4), ValueError,
         "lengths are [2, 9]", "[0, 4]"),
    case("padding of floats", lambda: masks.padding(ones(2), 4), TypeError,
         "lengths is torch.float32", "integer"),
    case("padding of rank 2", lambda: masks.padding(torch.ones(2, 1).int(), 4), ValueError,
         "lengths has shape (2, 1)", "(B,)"),
    case("padding on no side", lambda: masks.padding(integers(1), 4, side="top"), ValueError,
         "side is 'top'", "'left' or 'right'"),
    case("packed not from 0", lambda: masks.packed(integers(1, 2)), ValueError,
         "cu_seqlens_q is [1, 2]", "start at 0"),
    case("packed beyond the rows", lambda: masks.packed(integers(0, 5), total_q=4), ValueError,
         "cu_seqlens_q ends at 5", "4 packed"),
    case("packed of a list", lambda: masks.packed([0, 5]), TypeError, "cu_seqlens_q is list",
         "integer tensor"),
    case("packed into a negative total", lambda: masks.packed(integers(0), total_q=-1), ValueError,
         "total_q is -1", ">= 0"),
    case("prefix beyond the keys", lambda: masks.prefix_lm(5, 4), ValueError,
         "prefix_lengths are [5]", "[0, 4]"),
    case("negative prefix", lambda: masks.prefix_lm(integers(1, -1), 4), ValueError, "[1, -1]",
         "[0, 4]"),
    case("float prefix", lambda: masks.prefix_lm(1.5, 4), TypeError, "prefix_lengths is float",
         "integer"),
    case("prefix of rank 2", lambda: masks.prefix_lm(torch.ones(1, 1).int(), 4), ValueError,
         "prefix_lengths has shape (1, 1)", "(B,)"),
    case("an id in two spans", lambda: masks.spans(integers(3, -1, 3)), ValueError, "id 3",
         "two separate runs"),
    case("float ids", lambda: masks.spans(ones(3)), TypeError, "ids is torch.float32", "integer"),
    case("ids of rank 3", lambda: masks.spans(torch.zeros(1, 1, 2).int()), ValueError,
         "ids has shape (1, 1, 2)", "(B, S)"),
    # Backends
    case("unknown backend", lambda: attention(backend="flash"), ValueError, "backend is 'flash'",
         "'auto'", "reference"),
    case("backend is None", lambda: attention(backend=None), ValueError, "backend is None",
         "'auto'"),
    case("cache: unknown backend", lambda: decode(backend="x"), ValueError, "backend is 'x'",
         "reference"),
    case("varlen: unknown backend", lambda: varlen(backend="x"), ValueError, "backend is 'x'",
         "reference"),
    case("use_backend of an unknown backend", lambda: mm.use_backend("flash"), ValueError,
         "backend is 'flash'", "'auto'", "reference"),
    case("explain of a wrong call", lambda: mm.explain(mm.attention, ones(2), ones(2), ones(2)),
         ValueError, "q has shape (2,)", "4-dimensional"),
    case("explain of another function", lambda: mm.explain(print), TypeError, "function is",
         "attention", "explain("),
    case("explain of a result", lambda: mm.explain(ones(2)), TypeError, "function is", "attention"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case.name for case in WRONG])
def test_does_the_error_say_what_is_wrong(case):
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError, IndexError)) as raised:
        case.call()
    assert type(raised.value) is case.error, raised.value
    missing = [word for word in case.words if word not in str(raised.value)]
    assert not missing, f"{missing} not in {raised.value}"


@pytest.mark.parametrize("correct", [attention, varlen, decode, paged, sdpa])
def test_are_the_calls_right_but_for_the_changes(correct):
    assert torch.allclose(correct(), torch.ones(()))
