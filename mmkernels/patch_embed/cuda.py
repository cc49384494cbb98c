"""The patch embedding on the CUDA kernels of `csrc/patch_embed`, held by the compiled extension.

The extension registers its launchers as ops of its own, `torch.ops.mmkernels_cuda`; it is loaded
when a call first asks whether it could serve. The forward pass is one kernel a tensor of pixels,
the weight's gradient two; all other gradients are sums and products of torch's.

With s = 1 / (255 std) for bytes, the kernels multiply bytes as they are and scale sums:

    tokens  = sum over c of s_c (pixels_c weight_c) + bias - sum over c of (mean_c / std_c) weight_c
    dweight = s (sum of dout pixels) - (mean / std) (sum of dout)
"""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmkernels._core import library
from mmkernels._core.registry import register
from mmkernels.patch_embed import gradients
from mmkernels.patch_embed.call import (
    Call,
    Item,
    constants,
    items,
    prefix_count,
    raw_scale,
    row_count,
)

PATCHES = (14, 16)
MIN_CAPABILITY = (8, 0)
# Of the weight's gradient: what a block sums, values of a token by values of a patch, how many
# patches at a time, and at least how often; blocks that a multiprocessor runs at once.
BLOCK, BLOCK_P, MIN_STEPS, RESIDENT = 128, 32, 4, 2


def _channels_last(call: Call) -> bool:
    """Do the channels of all pixels lie side by side?"""
    channels = call.weight.shape[1]
    return channels > 1 and all(x.stride(1) == 1 and x.stride(4) == channels for x in call.pixels)


def _flat(x: Tensor, last: bool) -> Tensor:
    """x (N, C, 1, H, W) as (N, C, H, W), or as (N, 1, H, W * C) where channels come last.

    The kernels know no other order of the channels: to them it is one, in rows that are longer.
    """
    x = x[:, :, 0]
    return x.permute(0, 2, 3, 1).flatten(2)[:, None] if last else x


def _step(call: Call, last: bool) -> tuple[int, int]:
    """From patch to patch, in rows and values of `_flat` pixels."""
    return call.stride[1], call.stride[2] * (call.weight.shape[1] if last else 1)


def _pixels_why_not(x: Tensor, call: Call, name: str, last: bool) -> str | None:
    dtype, patch = call.weight.dtype, call.weight.shape[4]
    if x.dtype not in (dtype, torch.uint8):
        return f"{name} is {x.dtype}; the CUDA kernels take the weight's dtype and uint8"
    if call.pixel_mean and x.dtype != torch.uint8:
        return "pixel_mean or pixel_std is given; the CUDA kernels normalise uint8 only"
    if x.shape[2] != 1:
        return f"{name} has {x.shape[2]} frames; the CUDA kernels embed images"
    if last and len(set(call.pixel_std)) > 1:
        return "pixel_std differs between channels; the CUDA kernels then want channels first"
    piece = 16 // x.element_size() if patch == 16 else 2  # pixels of one copy
    flat, step = _flat(x, last), _step(call, last)[1]
    strides = [flat.stride(dim) for dim in range(3) if flat.shape[dim] > 1]
    start = 0 if isinstance(x, FakeTensor) else x.data_ptr() % (piece * x.element_size())
    if flat.stride(3) != 1 or start or any(n % piece for n in (*strides, step)):
        return (
            f"{name} has strides {tuple(x.stride())} and patches {call.stride[2]} apart; the CUDA "
            "kernels want channels first with a last stride of 1, or last without gaps, and "
            f"patches and their rows to start at multiples of {piece} values"
        )
    return None


def _call_why_not(call: Call) -> str | None:
    """Why the kernels do not serve the call on any GPU."""
    weight = call.weight
    if weight.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"weight is {dtype}; the CUDA kernels take float16 and bfloat16"
    size = tuple(weight.shape[2:])
    if size not in [(1, patch, patch) for patch in PATCHES]:
        return (
            f"patches are {' x '.join(map(str, size))}; the CUDA kernels take 1 x 14 x 14 and "
            "1 x 16 x 16"
        )
    if len(weight) % 8:
        return f"embed_dim is {len(weight)}; the CUDA kernels need a multiple of 8"
    if call.pad:
        return "pad is True; the CUDA kernels know whole patches only"
    for name, x in (("pos_index", call.pos_index), ("token_mask", call.token_mask)):
        if x is not None:
            return f"{name} is given; the CUDA kernels know none"
    tail = {"bias": call.bias, "pos_embed": call.pos_embed, "prefix_tokens": call.prefix}
    for name, x in tail.items():
        if x is not None and x.dtype not in (weight.dtype, torch.float32):
            return f"{name} is {x.dtype}; the CUDA kernels take the weight's dtype and float32"
    last = _channels_last(call)
    for index, x in enumerate(call.pixels):
        name = "pixels" if len(call.pixels) == 1 else f"images[{index}]"
        if (reason := _pixels_why_not(x, call, name, last)) is not None:
            return reason
    return None


@functools.cache  # every call of `auto` asks
def _instance_why_not(device: int | None, dtype: torch.dtype, patch: int, op: str) -> str | None:
    if torch.cuda.is_available():  # fake tensors say "cuda" on machines without a GPU, too
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < MIN_CAPABILITY:
            return f"the GPU has compute capability {major}.{minor}; the CUDA kernels need 8.0"
    built = getattr(torch.ops.mmkernels_cuda, f"patch_embed_{op}_built")
    if not built(patch, dtype == torch.bfloat16):
        return f"the extension was built without a kernel for {dtype} and patches of {patch}"
    return None


def _why_not(call: Call, op: str) -> str | None:
    weight = call.weight
    if weight.device.type != "cuda":
        return f"weight is on {weight.device.type}; the CUDA kernels run on NVIDIA GPUs"
    if (reason := _call_why_not(call)) is not None:
        return reason
    if torch.version.hip:
        return "this torch is built for ROCm; the CUDA kernels run on NVIDIA GPUs"
    if (reason := library.load_error()) is not None:
        return reason
    return _instance_why_not(weight.device.index, weight.dtype, weight.shape[4], op)


def why_not(*inputs: Any) -> str | None:
    """Why the forward kernel cannot serve a call, or None."""
    return _why_not(Call(*inputs), "forward")


def backward_why_not(dout: Tensor | None, *inputs: Any) -> str | None:
    """Why the weight's kernel cannot serve a call, or None."""
    return _why_not(Call(*inputs[: len(Call._fields)]), "weight")


def only_by_name(*_: object) -> str:
    """Why `auto` passes over the kernels."""
    return "only by name: not yet measured on a GPU"


def _resolved(x: Any) -> Any:
    """x, lazily negated tensors carried out: a kernel reads the memory behind them."""
    if isinstance(x, list):
        return [_resolved(one) for one in x]
    return x.resolve_neg() if isinstance(x, Tensor) else x


def _copyable(x: Tensor) -> Tensor:
    """x, copied unless its rows can be read 16 bytes at a time."""
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    fits = x.stride(-1) == 1 and all(n <= 1 or step % 8 == 0 for n, step in rows)
    if fits and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _weight(weight: Tensor, tma: bool) -> Tensor:
    """weight (D, C, P, R) with rows in one piece, which for TMA start at multiples of 16 bytes."""
    rows = weight.flatten(1)
    missing = -rows.shape[1] % 8 if tma else 0
    rows = F.pad(rows, (0, missing)) if missing else rows.contiguous()
    rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
    return rows[:, : rows.shape[1] - missing].unflatten(1, weight.shape[1:])


@functools.cache
def _reads_by_tma(device: torch.device) -> bool:
    """Does the Hopper kernel run there?"""
    return torch.cuda.get_device_capability(device) == (9, 0)


def _is_raw(call: Call) -> bool:
    return call.pixels[0].dtype == torch.uint8


def _scales(call: Call) -> list[float]:
    """What sums over the pixels of each channel are multiplied by; of floats nothing."""
    factor = raw_scale(torch.uint8)
    if not _is_raw(call):
        return []
    return [factor / std for std in call.pixel_std] or [factor] * call.weight.shape[1]


def _shifts(call: Call) -> Tensor:
    """(C,) mean / std: what is subtracted from scaled pixels."""
    ratios = [m / s for m, s in zip(call.pixel_mean, call.pixel_std, strict=True)]
    return constants(ratios, call.weight.device)


def _parts_scale(call: Call) -> Tensor | None:
    """The forward kernel's scale: one for all channels, or of each its ratio to the next one's."""
    scales = _scales(call)
    if not scales:
        return None
    if len(set(scales)) == 1:
        return constants(scales[:1], call.weight.device)
    ratios = [a / b for a, b in itertools.pairwise(scales)]
    return constants([*ratios, scales[-1]], call.weight.device)


def _bias(call: Call) -> Tensor | None:
    """The bias, with what the mean of the channels contributes to a product of raw pixels."""
    if not any(call.pixel_mean):
        return None if call.bias is None else _copyable(call.bias)
    folded = -(call.weight.float().sum((2, 3, 4)) @ _shifts(call))
    return folded if call.bias is None else folded + call.bias.float()


def forward(*inputs: Any) -> Tensor:
    """out (rows, D) in the weight's dtype; see `_core/ops.py`."""
    call = Call(*map(_resolved, inputs))
    out = call.weight.new_empty(row_count(call), len(call.weight))
    last = _channels_last(call)
    weight = _weight(_flat(call.weight, last), _reads_by_tma(call.weight.device))
    bias, scale = _bias(call), _parts_scale(call)
    pos = None if call.pos_embed is None else _copyable(call.pos_embed)
    prefix = None if call.prefix is None else _copyable(call.prefix)
    for item in items(call):
        first, size = item.first_token, item.tokens
        if call.pos_prefix:
            first, size = item.first_row, item.rows
        if not call.pos_per_sample:
            first = size = 0
        torch.ops.mmkernels_cuda.patch_embed_forward(
            _flat(item.pixels, last), weight, bias, pos, prefix, scale, _rows(out, item),
            *_step(call, last), first, size, call.pos_prefix,
        )  # fmt: skip
    return out


def _rows(x: Tensor, item: Item) -> Tensor:
    """The item's rows of x (rows, D)."""
    return x[item.first_row : item.first_row + item.batch * item.rows]


def backward(dout: Tensor, *inputs: Any) -> tuple:
    """The gradients that are wanted; see `_core/ops.py`."""
    *arguments, wanted = inputs
    call = Call(*map(_resolved, arguments))
    dout = _copyable(_resolved(dout).contiguous())
    mean = any(call.pixel_mean)
    sums = []
    if any(wanted[2:]) or (wanted[1] and mean):
        sums = gradients.sample_sums(dout, call)
    dweight = _weight_gradient(dout, call) if wanted[1] else None
    if dweight is not None and mean:
        shifts, prefix = _shifts(call).view(1, -1, 1, 1, 1), prefix_count(call)
        for one in sums:
            dweight -= one.kept[prefix:].sum(0).view(-1, 1, 1, 1, 1) * shifts
    dpixels = gradients.pixel_gradients(dout, call) if wanted[0] else []
    return gradients.results(dout, call, wanted, dpixels, dweight, sums)


def _weight_gradient(dout: Tensor, call: Call) -> Tensor:
    """(D, C, 1, P, P) float32, the mean of raw pixels left out."""
    last, device = _channels_last(call), dout.device
    shape = _flat(call.weight, last).shape
    scales = _scales(call)[: shape[1]]
    scale = constants(scales, device) if scales else None
    total = torch.zeros(shape, dtype=torch.float32, device=device)
    listed = [item for item in items(call) if item.batch * item.tokens]
    for item in listed:
        splits = _splits(item.batch * item.tokens, shape, _processors(device))
        partial = torch.empty((splits, *shape), dtype=torch.float32, device=device)
        dweight = torch.empty(shape, dtype=torch.float32, device=device)
        torch.ops.mmkernels_cuda.patch_embed_weight(
            _rows(dout, item), _flat(item.pixels, last), scale, partial, dweight, *_step(call, last)
        )
        total = dweight if len(listed) == 1 else total + dweight
    if last:
        total = total[:, 0].unflatten(2, (-1, call.weight.shape[1])).permute(0, 3, 1, 2)
    return total[:, :, None]


def _splits(patches: int, shape: tuple[int, ...], processors: int) -> int:
    """Shares of the patches: as many as fill the GPU once, none of them too short."""
    dim, *values = shape
    tiles = -(-dim // BLOCK) * -(-torch.Size(values).numel() // BLOCK)
    return max(1, min(RESIDENT * processors // tiles, patches // (MIN_STEPS * BLOCK_P)))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


register("patch_embed_forward", "cuda", forward, why_not, only_by_name)
register("patch_embed_backward", "cuda", backward, backward_why_not, only_by_name)
