"""What the C++ ops refuse or keep from Hopper's kernels, whatever Python asks before them."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.op_recorder import MARKS, compiled

pytestmark = MARKS
bf16 = torch.bfloat16


@pytest.fixture(scope="module")
def recorder():
    return compiled()


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


def too_many(x: Tensor) -> Tensor:
    return x[:1].expand(2**29, *x.shape[1:])


def one_more(x: Tensor) -> Tensor:
    return torch.cat((x, x[:1]))


def three_heads(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], 3, x.shape[3])


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
    ("patch_embed_forward", "scale must be contiguous", "scale", every_other),
    ("patch_embed_weight", "scale must be contiguous", "scale", every_other),
    ("attention_forward", "a sequence is too long", "k v", endless),
    ("attention_backward", "a sequence is too long", "k v dk dv", endless),
    ("attention_forward", "q has 4 heads, no multiple of k's 3", "k v", three_heads),
    ("attention_backward", "q has 4 heads, no multiple of k's 3", "k", three_heads),
    ("attention_forward", "start and end go together", "end", nothing),
    ("attention_backward", "start and end go together", "start", nothing),
    ("attention_backward", "row_start and row_end go together", "row_end", nothing),
    ("attention_backward", "dq_sum and redo go together", "redo", nothing),
    ("attention_forward", "with start, Hopper's kernel needs redo", "redo", nothing),
    ("attention_backward", "end is of 3 batch elements, not 1 or 2", "end", one_more),
    ("attention_delta", "out has a head dim of 63, no multiple of 8", "dout out", shorter(3)),
    ("patch_embed_forward", "pixels hold no whole patch", "pixels", lambda x: x[:, :, :15]),
    ("patch_embed_weight", "there are too many patches", "pixels", too_many),
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
    said = pytest.raises(RuntimeError, match="the kernel was not launched: as the test wants it")
    with recorder.gpu(90, launch_error=1) as ops, said:
        getattr(ops, op)(**ARGUMENTS[op]())
    assert len(recorder.launches) == 1


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("attention_forward", name) for name in ("q", "k", "v")),
        *(("attention_backward", name) for name in ("q", "k", "v", "dout")),
    ],
)
def test_copies_by_tma_step_on(op, name, recorder):
    """A stride of 0 is left to the portable kernel."""
    arguments = ARGUMENTS[op]()
    with recorder.gpu(90) as ops:
        getattr(ops, op)(**arguments)
        assert "sm90" in recorder.launches[0][0]
        recorder.launches.clear()
        arguments[name] = arguments[name][:, :1].expand(arguments[name].shape)
        getattr(ops, op)(**arguments)
    assert [name for name, _ in recorder.launches] == [f"{op}_64_bf16"]


def test_tma_takes_padded_weights_alone(recorder):
    with recorder.gpu(90) as ops:
        ops.patch_embed_forward(**patch_forward_arguments(14))
    assert [name for name, _ in recorder.launches] == ["patch_forward_14_bf16"]
