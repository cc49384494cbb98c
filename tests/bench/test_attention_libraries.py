"""Are other libraries' functions called as their documentation says?

Stand-ins with the signatures of the libraries compute by the reference, so that a wrong layout,
scale, alignment or length gives a wrong result.
"""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mmkernels as mm
from mmkernels.attention.interval import IntervalMask
from mmkernels.bench import attention_libraries, suite_attention
from mmkernels.bench.attention_problem import AttentionProblem
from mmkernels.bench.case import Unavailable

CPU = torch.device("cpu")
SHAPES = {name: model.toy for name, model in suite_attention.BY_NAME.items()}
PLAIN = [name for name, (_, mask) in SHAPES.items() if mask.plain]


def install(monkeypatch, name: str, **members) -> None:
    """Makes a module importable, and its parents with it."""
    for parent in [name[:i] for i, x in enumerate(name + ".") if x == "."]:
        if parent.partition(".")[0] == "torch" and parent != name:
            continue
        module = ModuleType(parent)
        module.__spec__ = importlib.machinery.ModuleSpec(parent, None)
        monkeypatch.setitem(sys.modules, parent, module)
    vars(sys.modules[name]).update(members)


def solve(library: str, shape: str, mode: str = "forward + backward") -> float:
    """The error of a library on a model's toy problem."""
    size, mask = SHAPES[shape]
    prepare = attention_libraries.LIBRARIES[library]
    this = AttentionProblem(size, mask, torch.float32, mode, CPU, {library: prepare})
    return this.check(this.implementations[library]()())


# flash_attn 2.8: flash_attn_interface.py.


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return mm.attention(
        q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale,
        backend="reference",
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return mm.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        window_size=window_size, softmax_scale=softmax_scale, backend="reference",
    )  # fmt: skip


def check_lengths(q, cu_seqlens_q, cu_seqlens_k, max_q, max_k) -> None:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q), "padding goes in"
    assert max_q == max_k == int(cu_seqlens_q.diff().max()) and isinstance(max_q, int)


@pytest.mark.parametrize("shape", PLAIN)
def test_flash_attn(shape, monkeypatch):
    functions = (flash_attn_func, flash_attn_varlen_func)
    install(monkeypatch, "flash_attn", **{f.__name__: f for f in functions})
    assert solve("flash-attn", shape) < 1e-4


def torch_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    check_lengths(query, cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return mm.attention_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale,
        window_size=window_size, backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("shape", PLAIN)
def test_varlen_attn(shape, monkeypatch):
    install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=torch_varlen_attn)
    if SHAPES[shape].mask.lengths:
        assert solve("varlen_attn", shape) < 1e-4
    else:
        with pytest.raises(Unavailable, match="for packed sequences"):
            solve("varlen_attn", shape)


# xformers 0.0.35 and MSLK: fmha/__init__.py and attn_bias.py.


class LowerTriangularMask:
    def interval(self, q):
        return mm.masks.top_left(q.shape[1], q.shape[1])


class LocalAttentionFromBottomRightMask:
    def __init__(self, window_left: int, window_right: int) -> None:
        assert window_left >= 0 and window_right >= 0
        self.window_size = (window_left, window_right)

    def interval(self, q):
        return mm.masks.window(q.shape[1], window_size=self.window_size)


class BlockDiagonalMask:
    def __init__(self, lengths: list[int], causal: bool) -> None:
        self.lengths, self.causal = lengths, causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert device == CPU, "its default is the GPU where there is one"
        return cls(q_seqlen, False)

    def make_causal(self):
        return BlockDiagonalMask(self.lengths, True)

    def interval(self, q):
        assert q.shape[0] == 1 and q.shape[1] == sum(self.lengths)
        return mm.masks.packed(torch.tensor([0, *self.lengths]).cumsum(0), causal=self.causal)


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    mask: IntervalMask | None = None if attn_bias is None else attn_bias.interval(query)
    shape = query.shape
    if query.ndim == 5:
        assert key.shape == value.shape == shape
        if any(x.requires_grad for x in (query, key, value)):
            raise NotImplementedError("BMGHK has no backward pass")
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    assert query.shape == key.shape, "it does not broadcast"
    out = mm.attention(query, key, value, mask=mask, softmax_scale=scale, backend="reference")
    return out.view(shape)


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize(
    ("library", "module"), [("xformers", "xformers.ops.fmha"), ("MSLK", "mslk.attention.fmha")]
)
@pytest.mark.parametrize("shape", PLAIN)
def test_fmha(shape, library, module, mode, monkeypatch):
    biases = (LowerTriangularMask, LocalAttentionFromBottomRightMask, BlockDiagonalMask)
    install(
        monkeypatch,
        module,
        memory_efficient_attention=memory_efficient_attention,
        attn_bias=SimpleNamespace(**{bias.__name__: bias for bias in biases}),
    )
    assert solve(library, shape, mode) < 1e-4


@pytest.mark.parametrize("library", ["flash-attn", "xformers", "MSLK"])
def test_why_a_library_takes_no_part(library, monkeypatch):
    prefix_lm = "PaliGemma 3B 448"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"^\w+ is not installed$"):
        solve(library, "Qwen2.5-7B")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(Unavailable, match=r"^has no such mask: prefix-LM 40$"):
        solve(library, prefix_lm)
    for name in ("flash_attn", "xformers.ops.fmha", "mslk.attention.fmha"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=r"^cannot be imported: "):
        solve(library, "Qwen2.5-7B")
