"""The C++ ops without a GPU: compiled over launchers that record what they are given."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmkernels.attention import cuda, cuda_backward
from mmkernels.patch_embed import cuda as patch_cuda
from mmkernels.patch_embed.build import build
from tests.attention.cuda_backward import AttentionBackward, AttentionDelta
from tests.cuda_harness import CSRC, SHORT, AttentionForward
from tests.op_recorder import Recorder, compiled, fields
from tests.patch_embed import cuda_harness as patch_harness
from tests.patch_embed.cases import EQUAL, IMAGENET, image_bytes, normal, weights

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(not CSRC.exists(), reason="mmkernels is not imported from a source tree"),
]
bf16, fp16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [bf16, fp16])
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return Recorder(compiled(tmp_path_factory.mktemp("ops")))


def expected(struct: Any, tensors: dict[str, Tensor | None], **numbers: Any) -> dict[str, Any]:
    """The parameters; strides are 0 in dimensions of one element, but for dlse (B, H, S)."""
    p = fields(struct(**numbers))
    for name, x in tensors.items():
        if x is None:
            continue
        p[name] = x.data_ptr()
        for dim, size, stride in zip(
            {2: "bs", 3: "bhs", 4: "bsh"}[x.ndim], x.shape, x.stride(), strict=False
        ):
            for field in (f"stride_{name}{dim}", f"stride_{name}_{dim}"):
                if field in p:
                    p[field] = 0 if size == 1 and x.ndim != 3 else stride
    return p


def strided(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(B, S, H, D) in a layout that the kernels take."""
    batch, length, heads, dim = shape
    if layout == "heads first":
        return torch.randn(batch, heads, length, dim, dtype=dtype).transpose(1, 2)
    if layout == "one head for all":
        return torch.randn(batch, length, 1, dim, dtype=dtype).expand(shape)
    if layout == "odd step":  # that leads nowhere
        return torch.randn(1, *shape[1:], dtype=dtype).as_strided(
            (1, *shape[1:]), (3, heads * dim, dim, 1)
        )
    return torch.randn(batch, length, heads + 1, dim + 8, dtype=dtype)[:, :, 1:, 8:]


def bounds(kind: str, batch: int, length: int) -> list[Tensor] | list[None]:
    """Two of (1 or B, length), the first one with strides."""
    if kind == "none":
        return [None, None]
    wide = torch.zeros(batch if kind == "each sample" else 1, length, 2, dtype=torch.int32)
    return [wide[..., 1], torch.ones(1, length, dtype=torch.int32)]


@CAPABILITIES
@DTYPES
@pytest.mark.parametrize("kind", ["none", "all samples", "each sample"])
@pytest.mark.parametrize("layout", ["heads first", "one head for all", "odd step", "part"])
@pytest.mark.parametrize(("head_dim", "softcap"), [(72, 0.0), (64, 2.5), (128, 1e5)])
def test_attention(head_dim, softcap, layout, kind, dtype, capability, recorder):
    """The kernels get what their structs say, and those for Hopper what they can do."""
    batch = 1 if layout == "odd step" else 2
    q, dout = (strided(layout, (batch, 19, 4, head_dim), dtype) for _ in range(2))
    k, v = (strided(layout, (batch, 11, 2, head_dim), dtype) for _ in range(2))
    (start, end), (row_start, row_end) = bounds(kind, batch, 19), bounds(kind, batch, 11)
    sizes = {"batch": batch, "seqlen_q": 19, "heads": 4, "head_dim": head_dim}
    numbers = sizes | {"seqlen_k": 11, "kv_heads": 2, "softmax_scale": 0.3, "softcap": softcap}
    inputs = {"q": q, "k": k, "v": v, "start": start, "end": end}
    scores = (None, None, None, None, 0.3, softcap, 0.0)
    hopper = capability == 90 and softcap != 1e5 and layout != "one head for all"
    instance = f"{80 if head_dim == 72 else head_dim}_{SHORT[dtype]}"
    chosen = f"sm90_{instance}" if hopper else instance

    assert cuda._shape_why_not(q, k, v) is None
    with recorder.gpu(capability):
        out, lse = cuda.forward(q, k, v, start, end, *scores)
    redone = hopper and kind != "none"
    names = [chosen, instance] if redone else [chosen]
    assert [name for name, _ in recorder.launches] == [f"attention_forward_{n}" for n in names]
    for _, p in recorder.launches:
        assert (p.pop("redo") is not None) == redone
        want = expected(AttentionForward, inputs | {"out": out, "lse": lse}, **numbers)
        del want["redo"]
        assert p == want

    dlse = torch.randn(batch, 19, 4).transpose(1, 2) if kind == "none" else None
    inputs |= {"dout": dout, "lse": lse, "row_start": row_start, "row_end": row_end}
    for deterministic in (True, False):
        with recorder.gpu(capability):
            dq, dk, dv, *_ = cuda_backward.backward(
                dout, dlse, q, k, v, out, lse, start, end, row_start, row_end, *scores,
                False, deterministic,
            )  # fmt: skip
        (delta_name, delta), (name, p) = recorder.launches
        assert delta_name == f"attention_delta_{SHORT[dtype]}"
        assert name == f"attention_backward_{chosen}"
        summed = hopper and not deterministic
        assert [p.pop(name) is not None for name in ("dq_sum", "redo")] == [summed, summed]
        assert p["delta"] == delta["delta"] is not None
        outputs = {"dq": dq, "dk": dk, "dv": dv}
        want = expected(AttentionBackward, inputs | outputs, **numbers)
        assert p == {name: want[name] for name in p} | {"delta": p["delta"]}
        tensors = {"dout": dout, "out": out, "lse": lse, "dlse": dlse}
        want = expected(AttentionDelta, tensors, **sizes)
        assert delta == want | {"delta": p["delta"]}


class Both(patch_harness.Ops):
    """The compiled ops, and what the emulator's harness would launch in their place."""

    def __init__(self, ops: Any, capability: int) -> None:
        super().__init__("sm_90a" if capability == 90 else "sm_80", 0, 4)
        self.ops, self.launches = ops, []

    def patch_embed_forward(self, *arguments: Any) -> None:
        super().patch_embed_forward(*arguments)
        self.ops.patch_embed_forward(*arguments)

    def patch_embed_weight(self, *arguments: Any) -> None:
        super().patch_embed_weight(*arguments)
        self.ops.patch_embed_weight(*arguments)

    def _run(self, source, launcher, patch, dtype, p, tensors):
        for name, x in tensors.items():
            setattr(p, name, None if x is None else x.data_ptr())
        self.launches.append((f"patch_{launcher}_{patch}_{SHORT[dtype]}", fields(p)))


@CAPABILITIES
@DTYPES
@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("statistics", [None, {}, EQUAL, IMAGENET])
@pytest.mark.parametrize("layout", ["dense", "channels last", "one image for all", "one image"])
def test_patch_embed(layout, statistics, patch, dtype, capability, recorder):
    batch = 1 if layout == "one image" else 2
    shape = (batch, 3, 3 * patch + 2, 2 * patch + 16)
    pixels = normal(*shape).to(dtype) if statistics is None else image_bytes(*shape)
    if layout == "channels last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    if layout == "one image for all":
        pixels = pixels[:1].expand(shape)
    options = {name: x.to(dtype) for name, x in weights(40, 3, patch, patch).items()}
    options |= {"prefix_tokens": normal(2, 40).float(), "pos_embed": normal(11, 40).to(dtype)}
    options |= statistics or {}
    call = build("patch_embed", [pixels], **options)
    if reason := patch_cuda._call_why_not(call):
        assert layout == "channels last" and statistics == IMAGENET, reason
        return
    wanted = [False, True, False, False, False, False]
    with (
        recorder.gpu(capability) as ops,
        mock.patch.object(torch.ops, "mmkernels_cuda", both := Both(ops, capability)),
    ):
        out = patch_cuda.forward(*call)
        patch_cuda.backward(torch.ones_like(out), *call, wanted)
    assert len(both.launches) == 2
    assert recorder.launches == both.launches


def attention_arguments(head_dim: int = 64) -> dict[str, Any]:
    """What the attention ops share."""
    q, k = (torch.zeros(2, n, heads, head_dim, dtype=bf16) for n, heads in ((19, 4), (11, 2)))
    start, end = torch.zeros(2, 2, 19, dtype=torch.int32)
    lse, numbers = torch.zeros(2, 4, 19), {"softmax_scale": 0.3, "softcap": 0.0}
    return {"q": q, "k": k, "v": k.clone(), "start": start, "end": end, "lse": lse, **numbers}


def forward_arguments(head_dim: int = 64) -> dict[str, Any]:
    shared = attention_arguments(head_dim)
    redo = torch.zeros(2, 4, 2, dtype=torch.int32)
    return shared | {"out": torch.zeros_like(shared["q"]), "redo": redo}


def delta_arguments(head_dim: int = 64) -> dict[str, Any]:
    dout, out = torch.zeros(2, 2, 19, 4, head_dim, dtype=bf16)
    dlse, lse, delta = torch.zeros(3, 2, 4, 19)
    return {"dout": dout, "out": out, "dlse": dlse, "lse": lse, "delta": delta}


def backward_arguments(head_dim: int = 64) -> dict[str, Any]:
    shared = attention_arguments(head_dim)
    row_start, row_end = torch.zeros(2, 1, 11, dtype=torch.int32)
    return shared | {
        **{f"d{name}": torch.zeros_like(shared[name]) for name in "qkv"},
        "dout": torch.zeros_like(shared["q"]),
        "delta": torch.zeros(2, 4, 19),
        "row_start": row_start,
        "row_end": row_end,
        "dq_sum": torch.zeros(2, 4, 1, 128 * head_dim),
        "redo": torch.zeros(2, 4, 1, dtype=torch.int32),
    }


def patch_forward_arguments(patch: int = 16) -> dict[str, Any]:
    """Of 2 x 3 patches and 2 prefix tokens."""
    return {
        "pixels": torch.zeros(2, 3, 32, 48, dtype=bf16),
        "weight": torch.zeros(40, 3, patch, patch, dtype=bf16),
        "bias": torch.zeros(40),
        "pos": torch.zeros(8, 40),
        "prefix": torch.zeros(1, 2, 40, dtype=bf16),
        "scale": torch.ones(3),
        "out": torch.zeros(16, 40, dtype=bf16),
        **{"step_h": 16, "step_w": 16, "pos_first": 0, "pos_stride": 0, "pos_prefix": True},
    }


def patch_weight_arguments(patch: int = 16) -> dict[str, Any]:
    return {
        "dout": torch.zeros(16, 40, dtype=bf16),
        "pixels": torch.zeros(2, 3, 32, 48, dtype=bf16),
        "scale": torch.ones(3),
        "partial": torch.zeros(3, 40, 3, patch, patch),
        "dweight": torch.zeros(40, 3, patch, patch),
        **{"step_h": 16, "step_w": 16},
    }


ARGUMENTS = {
    "attention_forward": forward_arguments,
    "attention_delta": delta_arguments,
    "attention_backward": backward_arguments,
    "patch_embed_forward": patch_forward_arguments,
    "patch_embed_weight": patch_weight_arguments,
}


def misplaced(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape)


def odd_rows(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 4)[..., : x.shape[-1]]


def wide_rows(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 8)[..., : x.shape[-1]]


def every_other(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape, 2)[..., 0]


def endless(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, 2**30, *x.shape[2:])


def shorter(dim: int) -> Any:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - 1).contiguous()


def nothing(x: Tensor) -> None:
    return None


COPYABLE = "must start at a multiple of 16 bytes, with a last stride of 1 and all others multiples"
REFUSED = [
    # An op, its message, and what is done to which arguments.
    ("attention_forward", "q must be float16 or bfloat16", "q", Tensor.float),
    *(
        (op, f"{name} has another dtype than this op takes", name, change)
        for op, names, change in (
            ("attention_forward", "k v out", Tensor.half),
            ("attention_forward", "lse start end redo", Tensor.half),
            ("attention_delta", "dout dlse lse delta", Tensor.half),
            ("attention_backward", "dout k v lse delta dq dk dv", Tensor.half),
            ("attention_backward", "start end row_start row_end dq_sum redo", Tensor.half),
            ("patch_embed_forward", "pixels bias pos prefix scale out", Tensor.half),
            ("patch_embed_weight", "pixels scale partial dweight", Tensor.half),
        )
        for name in names.split()
    ),
    *(
        (op, f"{name} has size ", name, shorter(-1))
        for op, names in (
            ("attention_forward", "k v out lse start end redo"),
            ("attention_delta", "dout dlse lse delta"),
            ("attention_backward", "dout k v lse delta dq dk dv"),
            ("attention_backward", "start end row_start row_end dq_sum redo"),
            ("patch_embed_forward", "bias pos prefix scale out"),
            ("patch_embed_weight", "dout scale partial"),
        )
        for name in names.split()
    ),
    *(
        (op, f"{name} {COPYABLE}", name, change)
        for op, names in (
            ("attention_forward", "q k v out"),
            ("attention_delta", "dout out"),
            ("attention_backward", "dout q k v dq dk dv"),
            ("patch_embed_forward", "out pos prefix bias"),
        )
        for name in names.split()
        for change in (misplaced, odd_rows, every_other)
        if (name, change) not in [("bias", odd_rows)]
    ),
    *(
        (op, "must be contiguous", name, wide_rows)
        for op, names in (
            ("attention_forward", "out lse redo"),
            ("attention_delta", "lse delta"),
            ("attention_backward", "lse delta dq dk dv dq_sum redo"),
            ("patch_embed_forward", "out"),
            ("patch_embed_weight", "dout partial dweight"),
        )
        for name in names.split()
    ),
    *(
        ("patch_embed_weight", f"{name} must be contiguous and start", name, misplaced)
        for name in ("dout", "partial", "dweight")
    ),
    *(("patch_embed_" + op, "scale must be contig", "scale", every_other) for op in ("forward", "weight")),
    ("attention_forward", "a sequence is too long", "k v", endless),
    ("attention_backward", "a sequence is too long", "k v dk dv", endless),
    ("attention_forward", "q has 4 heads, no multiple of k's 3", "k v", lambda x: x.new_zeros(2, 11, 3, 64)),
    ("attention_backward", "q has 4 heads, no multiple of k's 3", "k", lambda x: x.new_zeros(2, 11, 3, 64)),
    ("attention_forward", "start and end go together", "end", nothing),
    ("attention_backward", "start and end go together", "start", nothing),
    ("attention_backward", "row_start and row_end go together", "row_end", nothing),
    ("attention_backward", "dq_sum and redo go together", "redo", nothing),
    ("attention_forward", "with start, Hopper's kernel needs redo", "redo", nothing),
    ("attention_backward", "end is of 3 batch elements, not 1 or 2", "end", lambda x: x[:1].repeat(3, 1)),
    ("attention_delta", "out has a head dim of 63, no multiple of 8", "dout out", shorter(3)),
    ("patch_embed_forward", "pixels hold no whole patch", "pixels", lambda x: x[:, :, :15]),
    ("patch_embed_weight", "there are too many patches", "pixels", lambda x: x[:1].expand(2**29, -1, -1, -1)),
    *(
        ("patch_embed_forward", "patches must start at multiples of 8 pixels", "pixels", change)
        for change in (misplaced, odd_rows, every_other)
    ),
    ("patch_embed_forward", "patches must start at multiples of 8 pixels", "step_w", lambda x: 4),
    ("patch_embed_forward", "pos has 7 slots, not 8", "pos", shorter(0)),
    ("patch_embed_forward", "pos has 8 slots, not 9", "pos_first", lambda x: 1),
    ("patch_embed_forward", "weight must start at a multiple of 16 bytes", "weight", misplaced),
    ("patch_embed_forward", "weight must start at a multiple of 16 bytes", "weight", wide_rows),
    ("patch_embed_weight", "dout has 15 rows, which do not fit 12 patches", "dout", shorter(0)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "message", "names", "change"), REFUSED)
def test_refusals(op, message, names, change, recorder):
    arguments = ARGUMENTS[op]()
    with recorder.gpu(90) as ops:
        getattr(ops, op)(**arguments)
        recorder.launches.clear()
        arguments |= {name: change(arguments[name]) for name in names.split()}
        with pytest.raises(RuntimeError, match=re.escape(message)):
            getattr(ops, op)(**arguments)
    assert recorder.launches == []


@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op != "attention_delta"])
def test_sizes_that_no_kernel_is_built_for(op, recorder):
    size, what = (24, "a head dim of 24") if "attention" in op else (8, "patches of 8")
    with recorder.gpu() as ops, pytest.raises(RuntimeError, match=f"no kernel for {what}"):
        getattr(ops, op)(**ARGUMENTS[op](size))
    assert recorder.launches == []


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_failed_launch_raises(op, recorder):
    with recorder.gpu(90, launch_error=1) as ops:
        with pytest.raises(RuntimeError, match="the kernel was not launched: as the test wants it"):
            getattr(ops, op)(**ARGUMENTS[op]())
    assert len(recorder.launches) == 1
