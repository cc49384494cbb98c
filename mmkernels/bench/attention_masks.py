"""The masks of real models, each in every form that an implementation of attention asks for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels import masks
from mmkernels.attention.interval import IntervalMask

# FlexAttention's (b, h, q_idx, kv_idx) -> bool.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BenchMask:
    """One mask of self-attention.

    Attributes:
        name: what reports call it.
        interval: device -> how mmkernels builds it. What a model has of it beforehand (lengths, ids
            of images) lies on the device already; calling the result is what a model would pay.
        mask_mod: device -> the same mask in FlexAttention's form.
        causal: it is the causal mask, or each of its packed sequences is causal.
        window: keys that a row sees before its own; None: all of them.
        lengths: of the sequences that are packed into one, or of the prompts of a padded batch.
        padded: `lengths` are those of a batch with padding on the left.
        plain: causal, window and lengths say all of it, so that libraries which know only those
            can serve it.
    """

    name: str
    interval: Callable[[torch.device], Callable[[], IntervalMask | None]]
    mask_mod: Callable[[torch.device], MaskMod]
    causal: bool = False
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    padded: bool = False
    plain: bool = True

    @property
    def dense(self) -> bool:
        """SDPA needs it as a matrix: it is neither full nor causal."""
        return bool(self.lengths or self.window is not None or not self.plain)


def full() -> BenchMask:
    """Every row sees every key."""
    return BenchMask(
        "full",
        lambda device: lambda: None,
        lambda device: lambda b, h, i, j: j >= 0,
    )


def causal(seqlen: int) -> BenchMask:
    """Text."""
    return BenchMask(
        "causal",
        lambda device: lambda: masks.causal(seqlen, device=device),
        lambda device: lambda b, h, i, j: j <= i,
        causal=True,
    )


def window(size: int, seqlen: int) -> BenchMask:
    """Text, every row with the last `size` keys, its own among them."""
    return BenchMask(
        f"window {size}",
        lambda device: lambda: masks.window(seqlen, window_size=(size - 1, 0), device=device),
        lambda device: lambda b, h, i, j: (j <= i) & (j > i - size),
        causal=True,
        window=size - 1,
    )


def prefix_lm(prefix: int, seqlen: int) -> BenchMask:
    """An image and a prompt that see each other, then causal text."""
    return BenchMask(
        f"prefix-LM {prefix}",
        lambda device: lambda: masks.prefix_lm(prefix, seqlen, device=device),
        lambda device: lambda b, h, i, j: (j <= i) | (j < prefix),
        plain=False,
    )


def packed(what: str, lengths: tuple[int, ...]) -> BenchMask:
    """Images or their windows in one sequence, each seeing itself; `lengths` in patches."""
    total = sum(lengths)

    def interval(device: torch.device) -> Callable[[], IntervalMask]:
        cu_seqlens = starts(lengths).to(device)
        return lambda: masks.packed(cu_seqlens, total_q=total, total_k=total)

    def mask_mod(device: torch.device) -> MaskMod:
        image = torch.repeat_interleave(torch.tensor(lengths)).to(device)
        return lambda b, h, i, j: image[i] == image[j]

    return BenchMask(f"{len(lengths)} packed {what}", interval, mask_mod, lengths=lengths)


def image_spans(images: int, patches: int, seqlen: int) -> BenchMask:
    """Causal text with `images` images of `patches` tokens, each of which sees all of itself."""
    ids = torch.full((seqlen,), -1)
    stride = seqlen // images
    for image in range(images):
        begin = image * stride + (stride - patches) // 2
        ids[begin : begin + patches] = image

    def interval(device: torch.device) -> Callable[[], IntervalMask]:
        here = ids.to(device)
        return lambda: masks.causal(seqlen, device=device) | masks.spans(here)

    def mask_mod(device: torch.device) -> MaskMod:
        here = ids.to(device)
        return lambda b, h, i, j: (j <= i) | ((here[i] == here[j]) & (here[i] >= 0))

    return BenchMask(f"causal, {images} image spans", interval, mask_mod, plain=False)


def left_padding(lengths: tuple[int, ...], seqlen: int) -> BenchMask:
    """A batch of prompts of unequal length, padded on the left as generation needs it; causal."""

    def interval(device: torch.device) -> Callable[[], IntervalMask]:
        here = torch.tensor(lengths).to(device)

        def build() -> IntervalMask:
            real = masks.padding(here, seqlen, side="left")
            return real & masks.causal(seqlen, device=device)

        return build

    def mask_mod(device: torch.device) -> MaskMod:
        first = (seqlen - torch.tensor(lengths)).to(device)
        return lambda b, h, i, j: (j <= i) & (j >= first[b])

    return BenchMask(
        "causal, left padding", interval, mask_mod, causal=True, lengths=lengths, padded=True
    )


def starts(lengths: tuple[int, ...]) -> Tensor:
    """(N + 1,) int32: where each of the packed sequences begins, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
