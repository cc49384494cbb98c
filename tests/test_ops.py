"""The C++ ops without a GPU: compiled over launchers that record what they are given."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmkernels.attention import cuda, cuda_backward
from mmkernels.patch_embed import cuda as patch_cuda
from mmkernels.patch_embed.build import build
from tests.attention.cuda_backward import AttentionBackward, AttentionDelta
from tests.cuda_harness import SHORT, AttentionForward
from tests.op_recorder import MARKS, compiled, fields
from tests.patch_embed import cuda_harness as patch_harness
from tests.patch_embed.cases import EQUAL, IMAGENET, image_bytes, normal, weights

pytestmark = MARKS
bf16, fp16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [bf16, fp16])
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])


@pytest.fixture(scope="module")
def recorder():
    return compiled()


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
    stride = (8, 8 if patch == 14 else 16)
    tokens = math.prod((n - patch) // s + 1 for n, s in zip(shape[2:], stride, strict=True))
    pos = normal(*([batch] if layout == "dense" else []), 2 + tokens, 40).to(dtype)
    options |= {"prefix_tokens": normal(2, 40).float(), "pos_embed": pos, "stride": stride}
    options |= statistics or {}
    call = build("patch_embed", [pixels], **options)
    if reason := patch_cuda._call_why_not(call):
        assert layout == "channels last" and statistics == IMAGENET, reason
        return
    wanted = [False, True, False, False, False, False]
    with (
        recorder.gpu(capability) as ops,
        mock.patch.object(torch.ops, "mmkernels_cuda", both := Both(ops, capability)),
        mock.patch.object(patch_cuda, "_splits", lambda *_: 3),
    ):
        out = patch_cuda.forward(*call)
        patch_cuda.backward(torch.ones_like(out), *call, wanted)
    assert len(both.launches) == 2
    assert recorder.launches == both.launches
