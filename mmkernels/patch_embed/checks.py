"""The errors that the patch embedding raises for wrong arguments, and its inputs made canonical."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mmkernels._core import dtensors
from mmkernels._core.values import readable
from mmkernels.attention.checks import DTYPES

FORMATS = ("channels_first", "channels_last")
OTHER_FORMAT = {
    "channels_first": "pixels with channels last need data_format='channels_last'",
    "channels_last": "pixels with channels first need data_format='channels_first'",
}
DIMS = {1: "L", 2: "H, W", 3: "T, H, W"}
PIXEL_DTYPES = (torch.uint8, *DTYPES)


def check_tensor(
    where: str,
    name: str,
    x: Any,
    weight: Tensor,
    dtypes: tuple[torch.dtype, ...],
    wanted: str,
    hint: str = "",
) -> None:
    """Raises unless x is a strided tensor of one of `dtypes`, or `wanted`, where weight is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {name} is {type(x).__name__}; it must be a torch.Tensor{hint}")
    if x.layout != torch.strided:
        raise TypeError(
            f"{where}: {name} is {x.layout}; it must be strided, e.g. {name}.to_dense()"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"{where}: {name} is {x.dtype}; it must be {wanted}")
    if x.device != weight.device:
        raise ValueError(
            f"{where}: {name} is on {x.device} and weight on {weight.device}; move one, e.g. "
            f"{name}.to(weight.device)"
        )


def check_floating(where: str, name: str, x: Any, weight: Tensor) -> None:
    """Raises unless x is a floating-point tensor on the weight's device."""
    check_tensor(where, name, x, weight, DTYPES, f"floating point, e.g. {name}.float()")


def check_weight(where: str, weight: Any) -> None:
    """Raises unless weight is (D, C, *kernel) or (D, K) of a dtype that can be computed in."""
    check_tensor(where, "weight", weight, weight, DTYPES, "float16, bfloat16, float32 or float64")
    if not 2 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; it must be (embed_dim, channels, "
            "*patch) as of Conv1d, Conv2d or Conv3d, or (embed_dim, values of a patch) as of "
            "Linear, and none may be 0"
        )


def check_options(where: str, pad: Any, data_format: Any) -> None:
    """Raises unless pad is a bool and data_format one of FORMATS."""
    if not isinstance(pad, bool):
        raise TypeError(f"{where}: pad is {pad!r}; it must be True or False")
    if not isinstance(data_format, str) or data_format not in FORMATS:
        raise ValueError(
            f"{where}: data_format is {data_format!r}; it must be {' or '.join(map(repr, FORMATS))}"
        )


def check_pixels(where: str, name: str, pixels: Any, weight: Tensor) -> None:
    """Raises unless pixels is a floating-point or uint8 tensor where weight is."""
    check_tensor(
        where, name, pixels, weight, PIXEL_DTYPES,
        "uint8 (0 to 255), or float16, bfloat16, float32 or float64; cast it",
        " (images of mixed size: patch_embed_varlen)" if where == "patch_embed" else "",
    )  # fmt: skip
    if type(pixels) is not Tensor or type(weight) not in (Tensor, Parameter):
        dtensors.check_together(where, **{name: pixels, "weight": weight})


def channels_first(
    where: str, name: str, x: Tensor, weight: Tensor, dims: int, data_format: str
) -> Tensor:
    """x as a (B, C, T, H, W) view; weight is (D, C, kt, kh, kw), of which `dims` are given."""
    last, varlen = data_format == "channels_last", where == "patch_embed_varlen"
    if x.ndim == dims + 2:
        channels = x.shape[-1 if last else 1]
        if channels == weight.shape[1]:
            x = x.movedim(-1, 1) if last else x
            return x.unflatten(1, (channels, *(1,) * (3 - dims))) if dims < 3 else x
    given = tuple(x.shape[1:] if varlen else x.shape)
    shape = (*weight.shape[:2], *weight.shape[5 - dims :])
    wanted = f"{DIMS[dims]}, C" if last else f"C, {DIMS[dims]}"
    if x.ndim != dims + 2:
        raise ValueError(
            f"{where}: {name} has shape {given}; with a weight of shape {shape} and {data_format} "
            f"it must be ({'' if varlen else 'B, '}{wanted})"
            f"{'' if varlen else f'; one sample alone needs {name}[None]'}"
        )
    raise ValueError(
        f"{where}: {name} has shape {given}, that is {channels} channels, and weight {shape}, that "
        f"is {weight.shape[1]}; they must agree. {data_format} means "
        f"({'' if varlen else 'B, '}{wanted}); {OTHER_FORMAT[data_format]}"
    )


def check_fits(
    where: str, name: str, x: Tensor, kernel: Sequence[int], dims: int, pad: bool
) -> None:
    """Raises if x (B, C, T, H, W), of which `dims` are given, is smaller than one patch."""
    if any(n == 0 or (n < k and not pad) for n, k in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(
            f"{where}: {name} is {tuple(x.shape[5 - dims :])} in ({DIMS[dims]}) and a patch "
            f"{tuple(kernel[3 - dims :])}; "
            + ("none may be 0" if pad else "one patch must fit, or pad=True fill it up")
        )


def strides(where: str, stride: Any, kernel: Sequence[int], dims: int) -> list[int]:
    """(st, sh, sw) of `stride`; kernel is (kt, kh, kw), of which `dims` are the patch's."""
    if stride is None:
        return list(kernel)
    values = list(stride) if isinstance(stride, Sequence) else [stride] * dims
    whole = all(isinstance(s, (int, torch.SymInt)) and not isinstance(s, bool) for s in values)
    if not whole or len(values) != dims or min(values) < 1:
        raise (ValueError if whole else TypeError)(
            f"{where}: stride is {stride!r}; it must be None (the patch size), an int of at least "
            f"1, or a sequence of {dims} such, one for each dimension of a patch"
        )
    return [1] * (3 - dims) + values


def numbers(where: str, name: str, value: Any, channels: int) -> list[float]:
    """pixel_mean or pixel_std as floats, one a channel."""
    wanted = f"a finite number, or one for each of the {channels} channels of weight"
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            raise TypeError(
                f"{where}: {name} is a tensor on {value.device}, and reading it would wait for "
                f"the device or end a compiled graph; pass numbers, e.g. {name}={name}.tolist(), "
                "made once"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{where}: {name} needs a gradient, and gets none; detach it")
        value = value.tolist()
    listed = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    try:
        values = [float(x) for x in listed]
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} is {value!r}; it must be {wanted}") from None
    values = values * channels if len(values) == 1 else values
    if len(values) != channels or not all(-math.inf < x < math.inf for x in values):
        raise ValueError(
            f"{where}: {name} is {value!r}; it must be {wanted}, in units of 0 to 1"
            + (
                ""
                if channels > 1
                else "; a weight (embed_dim, channels, *patch) says which is which"
            )
        )
    return values


def statistics(where: str, pixel_mean: Any, pixel_std: Any, channels: int) -> tuple:
    """pixel_mean and pixel_std as lists of floats, one a channel; empty if both are None."""
    if pixel_mean is None and pixel_std is None:
        return [], []
    mean = numbers(where, "pixel_mean", 0.0 if pixel_mean is None else pixel_mean, channels)
    std = numbers(where, "pixel_std", 1.0 if pixel_std is None else pixel_std, channels)
    if min(std) <= 0.0:
        raise ValueError(f"{where}: pixel_std is {pixel_std!r}; it must be above 0")
    return mean, std


def check_vector(where: str, name: str, x: Any, weight: Tensor) -> Tensor:
    """x as (D,), on the weight's device."""
    check_floating(where, name, x, weight)
    if x.numel() != weight.shape[0] or x.shape[-1:] != weight.shape[:1]:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}; it must be ({weight.shape[0]},), the "
            "first dimension of weight"
        )
    return x.reshape(weight.shape[0])


def check_prefix(where: str, prefix: Any, weight: Tensor, batch: int | None) -> Tensor:
    """prefix_tokens as (1 or B, P, D); batch None: one for all."""
    check_floating(where, "prefix_tokens", prefix, weight)
    shape = tuple(prefix.shape)
    if prefix.ndim == 2:
        prefix = prefix[None]
    if prefix.ndim != 3 or prefix.shape[2] != weight.shape[0] or prefix.shape[0] not in (1, batch):
        raise ValueError(
            f"{where}: prefix_tokens has shape {shape}; it must be (P, {weight.shape[0]}) or "
            f"({1 if batch is None else f'1 or {batch}'}, P, {weight.shape[0]})"
        )
    return prefix


def check_index(where: str, index: Tensor, count: int) -> None:
    """Raises if an index lies outside [0, count), where its values can be read."""
    if index.numel() and readable(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= count:
            raise ValueError(
                f"{where}: pos_index goes from {low} to {high}; pos_embed has the rows 0 to "
                f"{count - 1}"
            )


def slots(
    where: str, name: str, x: Tensor, ndim: int, batch: int, counts: dict[str, int], varlen: bool
) -> tuple[Tensor, str, bool]:
    """x as (slots, ...), which of `counts` its slots are, and whether they run over all samples.

    Args:
        where: name of the function.
        name: of the argument.
        x: (n, ...) or (1 or B, n, ...), where n is one of `counts`.
        ndim: dimensions of x without a batch.
        batch: samples.
        counts: words for the message -> n, preferred first.
        varlen: n counts all samples' slots.
    """
    for words, count in counts.items():
        if x.ndim == ndim and x.shape[0] == count:
            return x, words, varlen
        if x.ndim == ndim + 1 and x.shape[1] == count:
            if x.shape[0] == 1:
                return x[0], words, varlen
            if x.shape[0] == batch and not varlen:
                return x.flatten(0, 1), words, True
    wanted = " or ".join(f"{count} ({words})" for words, count in counts.items())
    place = "its first dimension" if varlen else "its first dimension, or the one after the batch,"
    raise ValueError(
        f"{where}: {name} has shape {tuple(x.shape)}, and there are {batch} samples; {place} must "
        f"be {wanted}"
    )


def positions(
    where: str,
    pos_embed: Any,
    pos_index: Any,
    weight: Tensor,
    batch: int,
    counts: dict[str, int],
    varlen: bool,
) -> tuple[Tensor, Tensor | None, str, bool]:
    """pos_embed (slots or rows, D), pos_index (slots,), and what `slots` says of the slots."""
    check_floating(where, "pos_embed", pos_embed, weight)
    dim = weight.shape[0]
    if pos_embed.ndim not in (2, 3) or pos_embed.shape[-1] != dim:
        raise ValueError(
            f"{where}: pos_embed has shape {tuple(pos_embed.shape)}; it must be (rows, {dim}) or "
            f"(1 or B, rows, {dim}), the last being the first dimension of weight"
        )
    if pos_index is None:
        found, words, per_sample = slots(where, "pos_embed", pos_embed, 2, batch, counts, varlen)
        return found, None, words, per_sample
    check_tensor(
        where, "pos_index", pos_index, weight, (torch.int32, torch.int64),
        "int32 or int64, e.g. pos_index.long()",
    )  # fmt: skip
    if (pos_embed.ndim == 3 and pos_embed.shape[0] != 1) or pos_embed.shape[-2] == 0:
        raise ValueError(
            f"{where}: pos_embed has shape {tuple(pos_embed.shape)}; with pos_index it must be one "
            f"table (rows, {dim}) with at least one row"
        )
    table = pos_embed.reshape(-1, dim)
    check_index(where, pos_index, len(table))
    index, words, per_sample = slots(where, "pos_index", pos_index, 1, batch, counts, varlen)
    return table, index, words, per_sample


def check_token_mask(
    where: str, mask: Any, weight: Tensor, batch: int, tokens: int, varlen: bool
) -> tuple[Tensor, bool]:
    """token_mask as (slots,) and whether these run over all samples."""
    check_tensor(
        where, "token_mask", mask, weight, (torch.bool,),
        "bool, True where mask_token goes, e.g. token_mask.bool()",
    )  # fmt: skip
    found, _, per_sample = slots(where, "token_mask", mask, 1, batch, {"tokens": tokens}, varlen)
    return found, per_sample


def check_alike(where: str, pixels: Sequence[Tensor]) -> None:
    """Raises unless all images have one dtype."""
    for index, x in enumerate(pixels):
        if x.dtype != pixels[0].dtype:
            raise TypeError(
                f"{where}: images[0] is {pixels[0].dtype} and images[{index}] {x.dtype}; cast one"
            )
