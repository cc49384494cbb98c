"""The public patch embedding functions: arguments in, one op out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._core import dtensors, ops, registry
from mmkernels._core.registry import Explanation
from mmkernels.patch_embed import flattened, reference
from mmkernels.patch_embed.autograd import embed
from mmkernels.patch_embed.build import build
from mmkernels.patch_embed.call import Call, items

Numbers = float | Sequence[float] | Tensor


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] | None = None,
    pos_embed: Tensor | None = None,
    pos_index: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pixel_mean: Numbers | None = None,
    pixel_std: Numbers | None = None,
    pad: bool = False,
    data_format: str = "channels_first",
    backend: str = "auto",
) -> Tensor:
    """Tokens of images, video or audio: patches times weight, plus bias and position.

    Args:
        pixels: (B, C, H, W) images, (B, C, T, H, W) video, or (B, C, L) audio, as the weight's
            dimensions say; uint8, float16, bfloat16, float32 or float64, in any strides. Or patches
            that are already cut out: (B, N, K) or (N, K) with K values each, in the order
            (C, [T,] H, W), with a weight of Conv2d or Conv3d or, (D, K), of Linear.
        weight: (D, C, *patch size), as in Conv1d, Conv2d and Conv3d. Its dtype is computed in and
            returned; pixels are cast to it.
        bias: (D,).
        stride: from patch to patch, a number or one for each dimension; None: the patch size.
            Patches overlap where it is less. A rest of the image too small for a patch is dropped.
        pos_embed: (N, D), (1, N, D) or (B, N, D), added to the N tokens of a sample; with P + N
            rows, to the prefix tokens, too. With pos_index: a table (rows, D).
        pos_index: (N,) or (B, N), or with P + N for N, integers: the row of pos_embed for each
            token. On a GPU a value out of range is clamped.
        prefix_tokens: (P, D), (1, P, D) or (B, P, D) class and register tokens, put first.
        token_mask: (N,) or (B, N) bool. Where True, mask_token takes the token's place, before
            pos_embed is added.
        mask_token: (D,), or with dimensions of 1 before it.
        pixel_mean: a number or one for each channel, in units of 0 to 1. Pixels become
            (pixels - pixel_mean) / pixel_std; uint8 is divided by 255 first, also without either.
        pixel_std: likewise.
        pad: fill the right and lower ends up to whole patches, with what is 0 after normalisation,
            where otherwise they are dropped.
        data_format: "channels_first", or "channels_last" for pixels (B, H, W, C) and patches in
            the order ([T,] H, W, C). The weight stays as it is.
        backend: "auto", or a backend's name; see `mmkernels.explain`. Patches that are cut out go
            to torch's own matrix product and take "auto" alone.

    Returns:
        (B, P + N, D) in the weight's dtype; patches in the order (t, y, x). For pixels (N, K):
        (N, D).

    Raises:
        ValueError: a shape, device or value is wrong; the message names the argument and the fix.
        TypeError: a dtype or type is wrong.
        BackendUnavailable: `backend` was named and cannot serve the call.

    Numerics: float32 sums (float64 for float64), rounded once. Of patches that are cut out the
    product is rounded, and each addition; bias + position is on CPUs that multiply in bfloat16.
    Bytes are saved for the backward pass as bytes, unless they are cut out. Under autocast weight
    is cast, and so is the result. Differentiable in all floating-point arguments but mean and std.

    DTensors: if pixels and weight are some, so is the result, divided by samples as pixels are, or
    by embed_dim as weight is. Other arguments may be DTensors, or plain and the same everywhere.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    where = "patch_embed"
    arguments = (
        weight, bias, stride, pos_embed, pos_index, prefix_tokens, token_mask, mask_token,
        pixel_mean, pixel_std, pad, data_format,
    )  # fmt: skip
    if flattened.is_flattened(pixels, weight):
        check_flattened_backend(backend)
        tokens = flattened.run(flattened.build(pixels, *arguments), data_format)
        return tokens if pixels.ndim == 3 else tokens[0]
    backend = registry.requested(backend)
    built = build(where, [pixels], *arguments)
    (item,) = items(built)
    return run(built, backend).view(item.batch, item.rows, weight.shape[0])


def patch_embed_varlen(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] | None = None,
    pos_embed: Tensor | None = None,
    pos_index: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pixel_mean: Numbers | None = None,
    pixel_std: Numbers | None = None,
    pad: bool = False,
    data_format: str = "channels_first",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens of images of mixed size, packed into one sequence without padding.

    Args:
        images: (C, H, W) each, or (C, T, H, W) or (C, L), as the weight's dimensions say; with
            data_format "channels_last" (H, W, C) and so on. At least one, all of one dtype.
        weight: (D, C, *patch size).
        bias: (D,).
        stride: as in `patch_embed`.
        pos_embed: (tokens, D), added to the tokens of all images one after the other; with as many
            rows as there are tokens and prefix tokens, to the latter, too. With pos_index: a table
            (rows, D).
        pos_index: (tokens,) integers, or with prefix tokens: the row of pos_embed for each token.
        prefix_tokens: (P, D) or (1, P, D), put before the tokens of every image.
        token_mask: (tokens,) bool, over the tokens of all images.
        mask_token: (D,).
        pixel_mean: as in `patch_embed`.
        pixel_std: likewise.
        pad: likewise, every image by itself.
        data_format: likewise.
        backend: "auto", or a backend's name.

    Returns:
        tokens (rows, D) in the weight's dtype, each image's prefix tokens and patches one after the
        other; and cu_seqlens (images + 1,) int32 on the same device: image i has the rows from
        cu_seqlens[i] to cu_seqlens[i + 1], as `attention_varlen` and `masks.packed` take them.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `patch_embed`.

    Source: Dehghani et al., "Patch n' Pack: NaViT", NeurIPS 2023.
    """
    where = "patch_embed_varlen"
    backend = registry.requested(backend)
    built = build(
        where, batches_of_one(where, images), weight, bias, stride, pos_embed, pos_index,
        prefix_tokens, token_mask, mask_token, pixel_mean, pixel_std, pad, data_format,
    )  # fmt: skip
    ends = [0, *(item.first_row + item.rows for item in items(built))]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cpu")
    cu_seqlens = cu_seqlens.to(weight.device, non_blocking=True)
    return run(built, backend), cu_seqlens


def check_flattened_backend(backend: str) -> None:
    """Raises if a call names a backend for patches that are cut out.

    `use_backend` and the environment speak of the operations that have backends, so a model under
    them may embed such patches.
    """
    registry.requested(backend)
    if backend != "auto":
        raise ValueError(
            f"patch_embed: backend is {backend!r}, and pixels are patches that are cut out, which "
            "torch's own matrix product serves; leave it 'auto'"
        )


def batches_of_one(where: str, images: Any) -> list[Tensor]:
    """Each image as a batch."""
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise TypeError(
            f"{where}: images is {type(images).__name__}; it must be a list of at least one tensor "
            "(a batch of one size: patch_embed)"
        )
    if len(images) == 0:
        raise ValueError(f"{where}: images is empty; it must have at least one")
    return [x[None] if isinstance(x, Tensor) else x for x in images]


def run(call: Call, backend: str) -> Tensor:
    """out (rows, D), with gradients where they are wanted."""
    if dtensors.is_dtensor(call.weight):
        from mmkernels.distributed import sharding

        return sharding.run_patch_embed(call, lambda local: run(local, backend))
    if not needs_grad(call):
        return ops.call("patch_embed_forward", *call, backend)
    if backend == "reference" and not torch.compiler.is_compiling():
        with torch.autocast(call.weight.device.type, enabled=False):  # it would cast inside
            return reference.differentiable(call)
    # Better now than in the middle of the backward pass; a tracer has no use for the choice.
    if backend != "auto" and not torch.compiler.is_compiling():
        registry.select("patch_embed_backward", backend, backward_inputs(call))
    return embed(call, backend)


def differentiable_arguments(call: Call) -> tuple[Tensor | None, ...]:
    """Those that have a gradient, in the order of the backward op's results, pixels left out."""
    return call.weight, call.bias, call.pos_embed, call.prefix, call.mask_token


def needs_grad(call: Call) -> bool:
    """Whether a gradient is wanted."""
    if not torch.is_grad_enabled():
        return False
    tensors = (*call.pixels, *differentiable_arguments(call))
    return any(x is not None and x.requires_grad for x in tensors)


def backward_inputs(call: Call) -> tuple:
    """What a backend's why_not reads before there is a result; dout is None."""
    wanted = [
        any(x.requires_grad for x in call.pixels),
        *(x is not None and x.requires_grad for x in differentiable_arguments(call)),
    ]
    return None, *call, wanted


def explain_call(call: Call, backend: str) -> Explanation:
    """Which backends would run a call, forward and, where gradients are wanted, backward."""
    backward = None
    if needs_grad(call):
        backward = registry.explain_op("patch_embed_backward", backend, backward_inputs(call))
    return registry.explain_op("patch_embed_forward", backend, tuple(call), backward)


def explain_patch_embed(
    pixels: Tensor, weight: Tensor, *args: Any, backend: str = "auto", **kwargs: Any
) -> Explanation:
    """`explain` for `mmkernels.patch_embed`."""
    if flattened.is_flattened(pixels, weight):
        check_flattened_backend(backend)
        flattened.build(pixels, weight, *args, **kwargs)
        return Explanation("linear", "torch", {"torch": None})
    built = build("patch_embed", [pixels], weight, *args, **kwargs)
    return explain_call(built, registry.requested(backend))


def explain_varlen(
    images: Sequence[Tensor], *args: Any, backend: str = "auto", **kwargs: Any
) -> Explanation:
    """`explain` for `mmkernels.patch_embed_varlen`."""
    where = "patch_embed_varlen"
    built = build(where, batches_of_one(where, images), *args, **kwargs)
    return explain_call(built, registry.requested(backend))


registry.explainable(patch_embed, explain_patch_embed)
registry.explainable(patch_embed_varlen, explain_varlen)
