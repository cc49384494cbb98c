"""The CUDA backward kernels in the emulator of PTX, and what they are held to."""

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels.attention.interval import IntervalMask
from tests import cuda_harness
from tests.cuda_harness import on_device


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class AttentionBackward(ctypes.Structure):
    """The struct of csrc/attention/backward.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "q k v dout lse delta start end row_start row_end dq dk dv"),
        *_fields(ctypes.c_void_p, "dq_sum redo"),
        *_fields(ctypes.c_int64, "stride_qb stride_qs stride_qh stride_kb stride_ks stride_kh"),
        *_fields(ctypes.c_int64, "stride_vb stride_vs stride_vh"),
        *_fields(ctypes.c_int64, "stride_doutb stride_douts stride_douth"),
        *_fields(ctypes.c_int64, "stride_start_b stride_start_s stride_end_b stride_end_s"),
        *_fields(ctypes.c_int64, "stride_row_start_b stride_row_start_s"),
        *_fields(ctypes.c_int64, "stride_row_end_b stride_row_end_s"),
        *_fields(ctypes.c_int32, "batch seqlen_q seqlen_k heads kv_heads head_dim"),
        *_fields(ctypes.c_float, "softmax_scale softcap"),
    )


class AttentionDelta(ctypes.Structure):
    """The struct of csrc/attention/backward.h."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "dout out dlse lse delta"),
        *_fields(ctypes.c_int64, "stride_doutb stride_douts stride_douth"),
        *_fields(ctypes.c_int64, "stride_outb stride_outs stride_outh"),
        *_fields(ctypes.c_int64, "stride_dlse_b stride_dlse_h stride_dlse_s"),
        *_fields(ctypes.c_int32, "batch seqlen_q heads head_dim"),
    )


def _set_tensors(p: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    """Pointers, and strides where the struct has any; 0 in dimensions of one element."""
    fields = {name for name, _ in p._fields_}
    for name, x in tensors.items():
        setattr(p, name, x.data_ptr())
        dims = {2: "bs", 3: "bhs", 4: "bsh"}[x.ndim]
        for size, stride, dim in zip(x.shape, x.stride(), dims, strict=False):
            field = next(
                (f for f in (f"stride_{name}{dim}", f"stride_{name}_{dim}") if f in fields), None
            )
            if field is not None:
                setattr(p, field, 0 if size == 1 else stride)


def _launch(
    source: str, function: str, p: ctypes.Structure, buffers: list[Tensor], arch: str, seed: int
) -> list[Any]:
    """What the emulator counted in every kernel; raises on whatever it found."""
    library = cuda_harness.launchers(source, arch)
    status, results = library.run(
        function, ctypes.byref(p), None, buffers=buffers, check="report", seed=seed
    )
    assert status == 0, f"the launcher returned {status}"
    if issues := [issue["message"] for result in results for issue in result.issues]:
        raise AssertionError("\n".join(issues))
    return results


def attention_delta(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    *,
    arch: str = "sm_80",
    seed: int = 0,
) -> tuple[Tensor, Any]:
    """delta (B, Hq, Sq) float32, and what the emulator counted, None if nothing was launched."""
    batch, seqlen_q, heads, head_dim = out.shape
    delta = on_device(torch.full((batch, heads, seqlen_q), math.nan))
    tensors = {"dout": dout, "out": out, "lse": lse, "delta": delta}
    if dlse is not None:
        tensors["dlse"] = dlse
    p = AttentionDelta(batch=batch, seqlen_q=seqlen_q, heads=heads, head_dim=head_dim)
    _set_tensors(p, tensors)
    dtype = cuda_harness.SHORT[out.dtype]
    results = _launch(
        f"backward_delta_{dtype}", f"mmkernels_attention_delta_{dtype}", p,
        list(tensors.values()), arch, seed,
    )  # fmt: skip
    return delta, (results or [None])[0]


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    bounds: tuple[Tensor, ...] = (),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    *,
    deterministic: bool = True,
    arch: str = "sm_80",
    seed: int = 0,
) -> tuple[list[Tensor], list[Any]]:
    """dq, dk, dv, and what the emulator counted in every kernel; raises on whatever it found.

    Args:
        dout: like q. Tensors lie where `on_device` or views of it put them.
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: like k.
        lse: (B, Hq, Sq) float32.
        delta: like lse.
        bounds: start and end (1 or B, Sq), and maybe row_start and row_end (1 or B, Sk).
        softmax_scale: None: 1 / sqrt(D).
        softcap: 0: none.
        deterministic: False: the Hopper kernels may sum dq in any order.
        arch: what nvcc compiles for.
        seed: another one lets warps take turns in another order.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    grads = [on_device(torch.full(x.shape, math.nan, dtype=x.dtype)) for x in (q, k, v)]
    tensors = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    tensors |= dict(zip(("start", "end", "row_start", "row_end"), bounds, strict=False))
    if not deterministic:
        tiles = (batch, heads, -(-seqlen_q // 128))
        tensors["dq_sum"] = on_device(torch.zeros(*tiles, 128 * cuda_harness.WIDTHS[head_dim]))
        tensors["redo"] = on_device(torch.full(tiles, -1, dtype=torch.int32))
    p = AttentionBackward(
        batch=batch, seqlen_q=seqlen_q, seqlen_k=k.shape[1], heads=heads, kv_heads=k.shape[2],
        head_dim=head_dim, softcap=softcap,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
    )  # fmt: skip
    _set_tensors(p, tensors)
    name = f"{cuda_harness.WIDTHS[head_dim]}_{cuda_harness.SHORT[q.dtype]}"
    source, function = f"backward_{name}", f"mmkernels_attention_backward_{name}"
    if arch == "sm_90a":
        source, function = f"hopper_{source}", f"mmkernels_attention_backward_sm90_{name}"
    return grads, _launch(source, function, p, list(tensors.values()), arch, seed)


class Problem(NamedTuple):
    """Inputs of a backward pass, where a GPU would have them; the mask's bounds with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    mask: IntervalMask | None = None
    numbers: tuple[tuple[str, float], ...] = ()  # softmax_scale and softcap, where not the default

    @property
    def qkv(self) -> list[Tensor]:
        return [self.q, self.k, self.v]

    def bounds(self) -> tuple[Tensor, ...]:
        if self.mask is None:
            return ()
        mask = self.mask
        return tuple(map(on_device, (mask.start, mask.end, *mask.key_rows(self.k.shape[1]))))


def problem(
    shape: tuple[int, int, int, int, int],
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    mask: IntervalMask | None = None,
    **numbers: float,
) -> Problem:
    """Normal inputs and cotangents; shape is (batch, Sq, Sk, heads, key heads)."""
    q, k, v = testing.make_qkv(*shape, head_dim, dtype=dtype)
    dout, _, _ = testing.make_qkv(*shape, head_dim, dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(2)
    dlse = torch.randn((shape[0], shape[3], shape[1]), generator=generator)
    return Problem(*map(on_device, (q, k, v, dout, dlse)), mask, tuple(numbers.items()))


def forward(x: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse of the reference, computed in `dtype`."""
    out, lse = mm.attention(
        *(t.to(dtype) for t in x.qkv), mask=x.mask, return_lse=True, backend="reference",
        **dict(x.numbers),
    )  # fmt: skip
    return on_device(out.to(x.q.dtype)), on_device(lse.float())


def run(
    x: Problem, *, dlse: bool = True, deterministic: bool = True, **options: Any
) -> tuple[list[Tensor], list[Any]]:
    """dq, dk, dv after the reference's forward pass, and the counters of the main kernels."""
    out, lse = forward(x)
    delta, _ = attention_delta(x.dout, out, lse, x.dlse if dlse else None, **options)
    return attention_backward(
        x.dout, *x.qkv, lse, delta, x.bounds(), **dict(x.numbers), deterministic=deterministic,
        **options,
    )  # fmt: skip


def exact(x: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """out and lse of the reference in float64, and dq, dk, dv."""
    leaves = [t.double().requires_grad_() for t in x.qkv]
    results = mm.attention(
        *leaves, mask=x.mask, return_lse=True, backend="reference", **dict(x.numbers)
    )
    grads = torch.autograd.grad(results, leaves, [x.dout.double(), x.dlse.double()])
    return list(results), list(grads)


def _eager(x: Problem) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in x.qkv]
    dense = None if x.mask is None else x.mask.to_dense()[:, None]
    out, lse = testing.eager_attention(*leaves, mask=dense, **dict(x.numbers))
    results = [out, lse.where(lse > -math.inf, 0.0)]
    grads = [g.to(t.dtype) for t, g in zip(results, (x.dout, x.dlse), strict=True)]
    return list(torch.autograd.grad(results, leaves, grads))


def check(x: Problem, **options: Any) -> list[Any]:
    """Holds dq, dk and dv to the error rule; what the emulator counted."""
    got, results = run(x, **options)
    (out, lse), right = exact(x)
    delta = (x.dout.double() * out).sum(-1).transpose(1, 2) - x.dlse
    rounding = testing.attention_rounding(x.q.dtype, lse, delta)
    names = ("dq", "dk", "dv")
    for name, *values in zip(names, got, right, _eager(x), strict=True):
        testing.assert_accurate(name, *values, rounding)
    assert not got[0].transpose(1, 2)[lse == -math.inf].any(), "dq of a row without a key"
    return results
