"""What a kernel's test needs: inputs, an eager yardstick, and the rule for its error.

The rule, for every output and every backend: against the reference in float64, the maximum and the
mean error are at most twice those of eager PyTorch in the same dtype, plus rounding: that of the
output's dtype, and for attention that of lse and delta, which its passes share.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._core.ops import lse_dtype
from mmkernels.attention import masks
from mmkernels.attention.interval import IntervalMask

__all__ = [
    "MASKS",
    "assert_accurate",
    "attention_rounding",
    "device_for",
    "eager_attention",
    "eager_normalized",
    "eager_patch_embed",
    "make_qkv",
]

MaskBuilder = Callable[[int, int, int], IntervalMask | None]


def _documents(batch: int, seqlen_q: int, seqlen_k: int) -> IntervalMask:
    cuts_q = torch.tensor([0, seqlen_q // 5, seqlen_q // 5, seqlen_q // 2, seqlen_q])
    cuts_k = torch.tensor([0, seqlen_k // 4, seqlen_k // 3, seqlen_k // 2, seqlen_k])
    return masks.packed(cuts_q, cuts_k, causal=True)


def _image_spans(batch: int, seqlen_q: int, seqlen_k: int) -> IntervalMask:
    ids = torch.full((batch, seqlen_k), -1)
    for row in range(batch):
        ids[row, seqlen_k // 8 + row : seqlen_k // 3 + row] = 0
        ids[row, seqlen_k // 2 : 3 * seqlen_k // 4] = 1
    both = masks.causal(seqlen_k) | masks.spans(ids)
    return IntervalMask(both.start[:, -seqlen_q:], both.end[:, -seqlen_q:], seqlen_k)


def _ragged(batch: int, seqlen_q: int, seqlen_k: int) -> IntervalMask:
    """Any intervals at all, a third of them empty."""
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    bounds = torch.randint(0, seqlen_k + 1, (2, batch, seqlen_q), generator=generator)
    empty = torch.rand((batch, seqlen_q), generator=generator) < 1 / 3
    start, end = bounds.amin(0), bounds.amax(0)
    return IntervalMask(start, torch.where(empty, start, end), seqlen_k)


def _lengths(batch: int, seqlen_k: int) -> Tensor:
    return torch.tensor([seqlen_k * (row + 1) // (batch + 1) for row in range(batch)])


MASKS: dict[str, MaskBuilder] = {
    "none": lambda b, sq, sk: None,
    "causal": lambda b, sq, sk: masks.causal(sq, sk),
    "window": lambda b, sq, sk: masks.window(sq, sk, window_size=(sk // 4, 3)),
    "padding": lambda b, sq, sk: masks.padding(_lengths(b, sk), sq, sk),
    "left padding, causal": lambda b, sq, sk: (
        masks.padding(_lengths(b, sk), sq, sk, side="left") & masks.causal(sq, sk)
    ),
    "documents": _documents,
    "prefix-LM": lambda b, sq, sk: masks.prefix_lm(_lengths(b, sk), sq, sk),
    "image spans": _image_spans,
    "ragged": _ragged,
}
"""Kinds of interval masks by their names. A builder takes (batch, seqlen_q, seqlen_k), Sq <= Sk."""


def device_for(backend: str) -> str:
    """Where a test of this backend puts its tensors: on the GPU if it needs one and there is one.

    Without a GPU the Triton kernels run on CPU tensors, in Triton's interpreter.

    Args:
        backend: its name.

    Returns:
        "cuda" or "cpu".
    """
    on_gpu = backend in ("triton", "cuda", "sdpa") and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def make_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed inputs of attention, alike on all devices.

    Args:
        batch: B.
        seqlen_q: Sq.
        seqlen_k: Sk.
        heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        value_dim: Dv; None: D.
        dtype: what the float32 numbers are rounded to.
        device: where the tensors lie.
        seed: of the numbers.

    Returns:
        q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, seqlen_q, heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim if value_dim is None else value_dim),
    )
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out and lse as model code writes them, every step in the inputs' dtype: the yardstick.

    Args:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hkv, D).
        v: (B, Sk, Hkv, Dv).
        mask: bool, broadcasts to (B, Hq, Sq, Sk), True = attend; rows that see nothing get out 0.
        bias: broadcasts likewise, added.
        sinks: (Hq,).
        alibi_slopes: (Hq,).
        softmax_scale: None: 1 / sqrt(D).
        softcap: 0: none.

    Returns:
        out (B, Sq, Hq, Dv) and lse (B, Hq, Sq).
    """
    groups = q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        row = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
        distance = (row - torch.arange(k.shape[1], device=q.device)).abs()
        scores = scores - (alibi_slopes[:, None, None] * distance).to(scores.dtype)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    unseeing = torch.zeros_like(scores[..., :1], dtype=torch.bool)
    if mask is not None:
        unseeing = ~mask.expand(scores.shape).any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & ~unseeing, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[1]].masked_fill(unseeing, 0.0)
    lse = torch.logsumexp(scores, -1, keepdim=True).masked_fill(unseeing, -torch.inf)
    return (weights @ value).transpose(1, 2), lse.squeeze(-1)


def eager_normalized(
    pixels: Tensor,
    dtype: torch.dtype,
    pixel_mean: Sequence[float] | Tensor | None = None,
    pixel_std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Pixels as processors make them ready for a model: normalised in float32, then in `dtype`.

    Args:
        pixels: (B, C, *size); bytes become numbers from 0 to 1.
        dtype: of the model; float64 is normalised in itself.
        pixel_mean: one number a channel, or a tensor of them where pixels lie, as a model's buffer.
        pixel_std: likewise.

    Returns:
        (B, C, *size) in `dtype`.
    """
    x = pixels
    if x.dtype == torch.uint8:
        x = x.to(torch.promote_types(dtype, torch.float32)) / 255
    if pixel_mean is not None and pixel_std is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (-1, *(1,) * (x.ndim - 2))
        numbers = (pixel_mean, pixel_std)
        mean, std = (torch.as_tensor(n, dtype=wide, device=x.device).view(shape) for n in numbers)
        x = (x.to(wide) - mean) / std
    return x.to(dtype)


def eager_patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] | None = None,
    pos_embed: Tensor | None = None,
    pos_index: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    token_mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pixel_mean: Sequence[float] | Tensor | None = None,
    pixel_std: Sequence[float] | Tensor | None = None,
    pad: bool = False,
) -> Tensor:
    """Tokens as model code writes them, every step in the weight's dtype: the yardstick.

    Pixels are those of `eager_normalized`.

    Args:
        pixels: (B, C, *size).
        weight: (D, C, *patch size).
        bias: (D,).
        stride: as in `mmkernels.patch_embed`.
        pos_embed: likewise.
        pos_index: likewise.
        prefix_tokens: (P, D) or (B, P, D).
        token_mask: as in `mmkernels.patch_embed`.
        mask_token: likewise.
        pixel_mean: as in `eager_normalized`.
        pixel_std: likewise.
        pad: as in `mmkernels.patch_embed`.

    Returns:
        (B, P + N, D) in the weight's dtype.
    """
    x = eager_normalized(pixels, weight.dtype, pixel_mean, pixel_std)
    kernel = weight.shape[2:]
    steps = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride or kernel)
    if pad:
        sizes = list(zip(x.shape[2:], kernel, steps, strict=True))
        counts = [min(max(-(-(n - k) // s), 0) + 1, -(-n // s)) for n, k, s in sizes]
        pairs = zip(counts, sizes, strict=True)
        rest = [max((count - 1) * s + k - n, 0) for count, (n, k, s) in pairs]
        x = F.pad(x, [amount for n in reversed(rest) for amount in (0, n)])
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    tokens = conv(x, weight, bias, stride=steps).flatten(2).transpose(1, 2)
    if token_mask is not None and mask_token is not None:
        tokens = torch.where(token_mask[..., None], mask_token, tokens)
    pos = pos_embed if pos_embed is None or pos_index is None else pos_embed[pos_index.long()]
    if pos is not None and pos.shape[-2] == tokens.shape[1]:
        tokens, pos = tokens + pos, None
    if prefix_tokens is not None:
        prefix = prefix_tokens.expand(len(tokens), -1, -1)
        tokens = torch.cat((prefix, tokens), 1)
    return tokens if pos is None else tokens + pos


def attention_rounding(dtype: torch.dtype, *shared: Tensor) -> float:
    """Relative rounding of attention's outputs: of their dtype, and of what its two passes share.

    Args:
        dtype: of the inputs.
        *shared: lse, and for gradients delta = sum(dout * out) - dlse. Both are rounded to float32;
            in ds = exp(s - lse) (dp - delta) an error of eps * |lse| scales a probability, and one
            of eps * |delta| remains where dp and delta cancel.

    Returns:
        What `assert_accurate` takes as rounding.
    """
    size = sum(float(x.detach().where(x.isfinite(), 0.0).abs().amax()) for x in shared if x.numel())
    rounding = torch.finfo(dtype).eps + torch.finfo(lse_dtype(dtype)).eps * size
    # In float64 the exact values are rounded as much as those that are held against them.
    return 2 * rounding if dtype == torch.float64 else rounding


def assert_accurate(
    name: str, got: Tensor, exact: Tensor, eager: Tensor, rounding: float | None = None
) -> None:
    """Raises unless `got` obeys the error rule.

    Args:
        name: of the output, for the message.
        got: what the kernel made.
        exact: the same from the reference in float64.
        eager: the same from eager PyTorch in the kernel's input dtype.
        rounding: relative to the exact values; None: the epsilon of got's dtype.

    Raises:
        AssertionError: the maximum or mean error is too large, or an element that should be finite
            is not (or the reverse); names the worst element.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    got64, exact, eager64 = got.detach().double(), exact.detach().double(), eager.detach().double()
    finite = exact.isfinite()
    assert torch.equal(got64[~finite], exact[~finite]), f"{name}: wrong where it should be infinite"
    assert got64[finite].isfinite().all(), f"{name}: not finite where it should be"
    if not finite.any():
        return
    error = torch.where(finite, (got64 - exact).abs(), 0.0)
    allowed = torch.where(finite, (eager64 - exact).abs(), 0.0)
    size = torch.where(finite, exact.abs(), 0.0)
    rounding = torch.finfo(got.dtype).eps if rounding is None else rounding
    for kind in ("max", "mean"):
        measure = getattr(torch, kind)
        worst, limit = measure(error), 2 * measure(allowed) + rounding * measure(size)
        if worst > limit:
            index = tuple(torch.unravel_index(error.argmax(), error.shape))
            where = tuple(int(i) for i in index)
            raise AssertionError(
                f"{name}: {kind} error {worst:.3g} is above {limit:.3g} (eager's is "
                f"{measure(allowed):.3g}); worst at {where}: {got64[index]:.6g}, not "
                f"{exact[index]:.6g}"
            )
