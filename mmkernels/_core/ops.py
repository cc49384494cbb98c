"""Every operation's schema, in one table, and its registration with torch.

One op a logical operation; the backend is chosen inside of it. So one fake implementation and one
opcheck serve all backends and `torch.compile` sees no graph break. Autograd lives outside, in a
`torch.autograd.Function`, because that costs a third of what an op with autograd of its own does.

Shapes: q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), start and end (1 or B, Sq) int32,
row_start and row_end (1 or B, Sk) int32, bias broadcastable to (B, Hq, Sq, Sk), alibi_slopes (Hq,)
or (B, Hq), sinks (Hq,), seed (1,) int64, out (B, Sq, Hq, Dv), lse (B, Hq, Sq). Absent results have
no elements, since a schema cannot say "Tensor or None". Those of the patch embedding stand in
`patch_embed/call.py`; its out is (rows, D), and `wanted` says which of its gradients are: those of
pixels, weight, bias, pos_embed, prefix and mask_token.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mmkernels._core import dtensors, registry
from mmkernels.patch_embed.call import Call, row_count

_MASK = "Tensor? start, Tensor? end"
_SCORES = "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
_NUMBERS = "float softmax_scale, float softcap, float dropout_p"
_PATCHES = (
    "Tensor[] pixels, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? pos_index,"
    " Tensor? prefix, Tensor? token_mask, Tensor? mask_token, float[] pixel_mean,"
    " float[] pixel_std, int[] stride, bool pad, bool pos_prefix, bool pos_per_sample,"
    " bool mask_per_sample"
)

SCHEMAS = {
    "attention_forward": (
        f"(Tensor q, Tensor k, Tensor v, {_MASK}, {_SCORES}, {_NUMBERS}, str backend)"
        " -> (Tensor out, Tensor lse)"
    ),
    "attention_backward": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {_MASK}, Tensor? row_start, Tensor? row_end, {_SCORES}, {_NUMBERS},"
        " bool bias_grad, bool deterministic, str backend)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
    ),
    "attention_decode": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table,"
        " Tensor? alibi_slopes, Tensor? sinks, float softmax_scale, float softcap,"
        " int window_left, int window_right, str backend) -> (Tensor out, Tensor lse)"
    ),
    "patch_embed_forward": f"({_PATCHES}, str backend) -> Tensor",
    "patch_embed_backward": (
        f"(Tensor dout, {_PATCHES}, bool[] wanted, str backend) -> (Tensor[] dpixels,"
        " Tensor dweight, Tensor dbias, Tensor dpos_embed, Tensor dprefix, Tensor dmask_token)"
    ),
}

_library = torch.library.Library("mmkernels", "DEF")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention_forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype(q.dtype))
    return out, lse


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    start: Tensor | None, end: Tensor | None, row_start: Tensor | None, row_end: Tensor | None,
    bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    softmax_scale: float, softcap: float, dropout_p: float, bias_grad: bool, *_: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _attention_decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return _attention_forward_fake(q, k_cache, v_cache)


def _patch_embed_forward_fake(*inputs: Any) -> Tensor:
    call = Call(*inputs[:-1])
    return call.weight.new_empty(row_count(call), call.weight.shape[0])


def _patch_embed_backward_fake(dout: Tensor, *inputs: Any) -> tuple:
    *arguments, wanted, _ = inputs
    call = Call(*arguments)
    leaves = (call.weight, call.bias, call.pos_embed, call.prefix, call.mask_token)
    return (
        [x.new_empty(x.shape) for x in call.pixels] if wanted[0] else [],
        *(
            x.new_empty(x.shape) if want and x is not None else dout.new_empty(0)
            for want, x in zip(wanted[1:], leaves, strict=True)
        ),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "attention_forward": _attention_forward_fake,
    "attention_backward": _attention_backward_fake,
    "attention_decode": _attention_decode_fake,
    "patch_embed_forward": _patch_embed_forward_fake,
    "patch_embed_backward": _patch_embed_backward_fake,
}


def _implementation(op: str) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        arguments, backend = inputs[:-1], inputs[-1]
        run_backend = registry.select(op, backend, arguments)
        first = arguments[0]  # a tensor, or a list of some, in every schema
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device):
            return run_backend(*arguments)
        with torch.autocast(device, enabled=False):  # or it would cast the float32 inside
            return run_backend(*arguments)

    return run


def _vmap_rule(op: str) -> Callable[..., Any]:
    """One call per element: right for every argument, slower than folding into the batch."""

    def element(x: Any, dim: Any, index: int) -> Any:
        if isinstance(x, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else (dim,) * len(x)
            return [element(*pair, index) for pair in zip(x, dims, strict=True)]
        return x if dim is None else x.select(dim, index)

    def stacked(results: list) -> Any:
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return type(results[0])(stacked(list(parts)) for parts in zip(*results, strict=True))

    def batch_dims(results: Any) -> Any:
        if isinstance(results, Tensor):
            return 0
        return type(results)(map(batch_dims, results))

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Any, Any]:
        run = getattr(torch.ops.mmkernels, op).default
        calls = (
            [element(x, dim, index) for x, dim in zip(inputs, in_dims, strict=True)]
            for index in range(info.batch_size)
        )
        results = stacked([run(*arguments) for arguments in calls])
        return results, batch_dims(results)

    return rule


_implementations = {op: _implementation(op) for op in SCHEMAS}

for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema)
    _library.impl(_op, _implementations[_op], "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmkernels::{_op}", _FAKES[_op], lib=_library)
    torch.library.register_vmap(f"mmkernels::{_op}", _vmap_rule(_op), lib=_library)


def _plain(inputs: Iterable[Any]) -> bool:
    """Whether all tensors among the inputs are torch's own, with memory: no subclass, no shape."""
    for x in inputs:
        if type(x) is Tensor or type(x) is Parameter:
            if x.is_meta:
                return False
        elif isinstance(x, Tensor) or (type(x) is list and not _plain(x)):
            return False
    return True


def _refuse_dtensors(run: Any, inputs: tuple) -> None:
    """Raises if an input is a DTensor: the functions that take some hand on each process's part."""
    for argument, x in zip(run._schema.arguments, inputs, strict=True):
        if dtensors.is_dtensor(x):
            name, first = argument.name, run._schema.arguments[0].name
            op = run._schema.name.removeprefix("mmkernels::")
            if name == first:
                raise TypeError(f"{op}: {name} is a DTensor; it takes none, pass {name}.to_local()")
            raise TypeError(
                f"{op}: {name} is a DTensor and {first} a plain tensor; make {first} one, or pass "
                f"{name}.full_tensor()"
            )


def call(op: str, *inputs: Any) -> Any:
    """Runs an op: through torch's dispatcher, unless nobody there would look at it.

    Plain eager tensors of which none needs a gradient go to the implementation at once, which saves
    7 of the 30 microseconds of a small call.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or not _plain(inputs)
    )
    if watched:
        run = getattr(torch.ops.mmkernels, op).default
        if not torch.compiler.is_compiling():
            _refuse_dtensors(run, inputs)
        return run(*inputs)
    return _implementations[op](*inputs)


attention_forward = torch.ops.mmkernels.attention_forward.default
attention_backward = torch.ops.mmkernels.attention_backward.default
attention_decode = torch.ops.mmkernels.attention_decode.default
