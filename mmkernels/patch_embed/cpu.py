"""Patch embedding on CPUs: one copy of the patches, and one product that adds to bias + position.

    X = patches of (pixels - raw mean_c), a row for every token; 0 in the rows of prefix tokens
    out = bias + pos;  out += alpha X W^T;  then mask token and prefix
    dW = alpha dout^T X,  dX = dout W, laid back on the pixels

alpha is 1 / (255 std) for bytes, which so enter the product as they are, less the mean; where std
differs between channels it is multiplied into the pixels instead. The product is MKL's in float32,
or float64, and out is rounded once.

This one form serves every shape, overlapping patches too: it was measured beside convolutions in
both memory formats and the plain product of the patches, and docs/performance.md shows where one of
those is faster. 16-bit weights are multiplied in float32, unless the CPU has instructions for
bfloat16: then that product stays in bfloat16, which is not yet measured.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._core.registry import register
from mmkernels.patch_embed import gradients
from mmkernels.patch_embed.call import Call, Item, items, prefix_count, raw_scale, row_count
from mmkernels.patch_embed.reference import padded
from mmkernels.patch_embed.tail import masked_tokens, position_slots

# Rows of one product: enough for MKL, and few enough for its operands to stay in the cache.
CHUNK = 4096
# Whether this CPU has instructions for products in bfloat16.
NATIVE_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Piece(NamedTuple):
    """Some samples of an item.

    Attributes:
        item: theirs.
        samples: which.
        start: of their rows within the chunk.
        end: likewise.
    """

    item: Item
    samples: slice
    start: int
    end: int

    def rows(self, chunk: Tensor) -> Tensor:
        """The piece's rows (samples, rows, ...) of a chunk's (rows, ...); a view."""
        return chunk[self.start : self.end].view(-1, self.item.rows, chunk.shape[1])


def chunks(call: Call) -> Iterator[tuple[slice, list[Piece]]]:
    """All rows, in runs of whole samples with at most CHUNK rows or one sample."""
    first = size = 0
    pieces: list[Piece] = []
    for item in items(call):
        sample = 0
        while sample < item.batch:
            if pieces and size + item.rows > CHUNK:
                yield slice(first, first + size), pieces
                first, size, pieces = first + size, 0, []
            count = min(max((CHUNK - size) // item.rows, 1), item.batch - sample)
            added = count * item.rows
            pieces.append(Piece(item, slice(sample, sample + count), size, size + added))
            sample, size = sample + count, size + added
    if pieces:
        yield slice(first, first + size), pieces


def product_dtype(weight: Tensor, *addends: Tensor | None) -> torch.dtype:
    """In which the patches are multiplied, and added to these."""
    # Autocast leaves positions in float32; cast, they would give another sum.
    narrow = all(x is None or x.dtype == weight.dtype for x in addends)
    if weight.dtype == torch.bfloat16 and NATIVE_BFLOAT16 and narrow:
        return torch.bfloat16
    return torch.promote_types(weight.dtype, torch.float32)


class Pixels:
    """How pixels become the product's operand X, and gradients of X become theirs.

    Attributes:
        alpha: what the product of X is multiplied by.
    """

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        self.call, self.dtype = call, dtype
        self.kernel = call.weight.shape[2:]
        self.wide = torch.promote_types(dtype, torch.float32)
        raw = raw_scale(call.pixels[0].dtype)
        scales = [raw / std for std in call.pixel_std] or [raw]
        equal = len(set(scales)) == 1
        self.alpha = scales[0] if equal else 1.0
        self.scale = None if equal else self._channels(scales)
        means = [mean / raw for mean in call.pixel_mean]
        self.mean = self._channels(means) if any(means) else None

    def _channels(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self.wide, device="cpu").view(-1, 1, 1, 1)

    def view(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """x (B, C, T, H, W) as (B, *grid, C, *kernel); a view."""
        steps = [stride * s for stride, s in zip(x.stride()[2:], self.call.stride, strict=True)]
        return x.as_strided(
            (x.shape[0], *grid, x.shape[1], *self.kernel),
            (x.stride(0), *steps, *x.stride()[1:]),
        )

    def fill(self, operand: Tensor, pieces: list[Piece]) -> Tensor:
        """The chunk's rows of X, in the first rows of `operand`; 0 for what is no patch."""
        prefix = prefix_count(self.call)
        for piece in pieces:
            item, x = piece.item, piece.item.pixels[piece.samples]
            if self.mean is not None or self.scale is not None:
                x = x.to(self.wide, copy=True)
            if self.mean is not None:
                x.sub_(self.mean)
            if self.scale is not None:
                x.mul_(self.scale)
            x = padded(x, item, self.kernel, self.call.stride)
            rows = piece.rows(operand)
            rows[:, :prefix] = 0.0
            patches = self.view(x, item.grid)
            rows[:, prefix:].view(patches.shape).copy_(patches)
            if (mask := masked(self.call, piece)) is not None:
                rows[:, prefix:].masked_fill_(mask, 0.0)  # NaN times a gradient of 0 would be NaN
        return operand[: pieces[-1].end]

    def fold(self, doperand: Tensor, piece: Piece) -> Tensor:
        """The gradient of a piece's pixels, from that of X (rows of a chunk, K) less alpha."""
        item = piece.item
        stride, kernel = self.call.stride, self.kernel
        size = item.pixels.shape[2:]
        reached = [(n - 1) * s + k for n, s, k in zip(item.grid, stride, kernel, strict=True)]
        whole = [max(n, reach) for n, reach in zip(size, reached, strict=True)]
        rows = piece.rows(doperand)[:, prefix_count(self.call) :]
        dx = doperand.new_zeros((len(rows), item.pixels.shape[1], *whole))
        target = self.view(dx, item.grid)
        source = rows.view(target.shape)
        # Patches that are so many apart share no pixel.
        t, y, x = (-(-k // s) for k, s in zip(kernel, stride, strict=True))
        for i in range(t):
            for j in range(y):
                for k in range(x):
                    target[:, i::t, j::y, k::x] += source[:, i::t, j::y, k::x]
        return dx[:, :, : size[0], : size[1], : size[2]].mul_(
            self.alpha if self.scale is None else self.scale
        )


def positions(call: Call, piece: Piece, dtype: torch.dtype) -> Tensor | None:
    """pos_embed of a piece's slots, (1 or samples, rows or tokens, D), in `dtype`."""
    if call.pos_embed is None:
        return None
    slots = call.pos_embed if call.pos_index is None else call.pos_index
    found = position_slots(call, slots, piece.item)
    found = found[piece.samples] if call.pos_per_sample else found
    if call.pos_index is not None:
        found = call.pos_embed[found.clamp(0, len(call.pos_embed) - 1).long()]
    return found.to(dtype)


def masked(call: Call, piece: Piece) -> Tensor | None:
    """(1 or samples, tokens, 1) bool: those that mask_token replaces."""
    found = masked_tokens(call, piece.item)
    return found if found is None or len(found) == 1 else found[piece.samples]


def begin(call: Call, piece: Piece, target: Tensor) -> None:
    """Writes bias + pos into a piece's tokens, for the product to be added."""
    prefix = prefix_count(call)
    tokens, pos = piece.rows(target)[:, prefix:], positions(call, piece, target.dtype)
    if pos is not None and call.pos_prefix:
        pos = pos[:, prefix:]
    if pos is not None and call.bias is not None:
        torch.add(pos.expand(tokens.shape), call.bias.to(tokens.dtype), out=tokens)
    elif pos is not None:
        tokens.copy_(pos)
    elif call.bias is not None:
        tokens.copy_(call.bias)


def finish(call: Call, piece: Piece, target: Tensor) -> None:
    """Writes a piece's prefix and masked tokens."""
    prefix, mask = prefix_count(call), masked(call, piece)
    if not prefix and mask is None:
        return
    rows, pos = piece.rows(target), positions(call, piece, target.dtype)
    if mask is not None:
        assert call.mask_token is not None
        token = call.mask_token.to(target.dtype)
        if pos is not None:
            token = token + pos[:, prefix if call.pos_prefix else 0 :]
        rows[:, prefix:] = torch.where(mask, token, rows[:, prefix:])
    if prefix and call.prefix is not None:
        first = call.prefix if len(call.prefix) == 1 else call.prefix[piece.samples]
        first = first.to(target.dtype)
        if pos is not None and call.pos_prefix:
            first = first + pos[:, :prefix]
        rows[:, :prefix] = first


def forward(*inputs: Any) -> Tensor:
    """out (rows, D) in the weight's dtype; see `_core/ops.py`."""
    call = Call(*inputs)
    weight = call.weight
    dtype = product_dtype(weight, call.bias, call.pos_embed)
    out = weight.new_empty((row_count(call), len(weight)))
    pixels, matrix = Pixels(call, dtype), weight.flatten(1).to(dtype).t()
    planned = list(chunks(call))
    longest = max((rows.stop - rows.start for rows, _ in planned), default=0)
    operand = out.new_empty((longest, len(matrix)), dtype=dtype)
    direct = dtype == out.dtype
    scratch = out if direct else out.new_empty((longest, len(weight)), dtype=dtype)
    adds = call.bias is not None or call.pos_embed is not None
    for rows, pieces in planned:
        target = out[rows] if direct else scratch[: rows.stop - rows.start]
        if adds:
            for piece in pieces:
                begin(call, piece, target)
        x = pixels.fill(operand, pieces)
        target.addmm_(x, matrix, beta=float(adds), alpha=pixels.alpha)
        for piece in pieces:
            finish(call, piece, target)
        if not direct:
            out[rows] = target
    return out


def backward(dout: Tensor, *inputs: Any) -> tuple:
    """The gradients that are wanted; see `_core/ops.py`."""
    *arguments, wanted = inputs
    call = Call(*arguments)
    dtype = product_dtype(call.weight)
    pixels, matrix = Pixels(call, dtype), call.weight.flatten(1).to(dtype)
    dpixels = [x.new_zeros(x.shape) for x in call.pixels] if wanted[0] else []
    # One tensor may stand at two places of a list.
    places = {item.first_row: dx for item, dx in zip(items(call), dpixels, strict=False)}
    planned = list(chunks(call)) if wanted[0] or wanted[1] else []
    longest = max((rows.stop - rows.start for rows, _ in planned), default=0)
    operand = dout.new_empty((longest if wanted[1] else 0, matrix.shape[1]), dtype=dtype)
    dmatrix = matrix.new_zeros(matrix.shape, dtype=pixels.wide) if wanted[1] else None
    for rows, pieces in planned:
        dtokens = product_gradient(dout[rows], call, pieces, dtype)
        if dmatrix is not None:
            x = pixels.fill(operand, pieces)
            if dmatrix.dtype == dtype:
                dmatrix.addmm_(dtokens.t(), x, alpha=pixels.alpha)
            else:
                dmatrix.add_(dtokens.t() @ x, alpha=pixels.alpha)
        if wanted[0]:
            doperand = dtokens @ matrix
            for piece in pieces:
                places[piece.item.first_row][piece.samples] = pixels.fold(doperand, piece)
    dweight = None if dmatrix is None else dmatrix.view(call.weight.shape)
    sums = gradients.sample_sums(dout, call) if any(wanted[2:]) else []
    return gradients.results(dout, call, wanted, dpixels, dweight, sums)


def product_gradient(dout: Tensor, call: Call, pieces: list[Piece], dtype: torch.dtype) -> Tensor:
    """dout of a chunk, 0 in rows that no patch gave: those of prefixes and masked tokens."""
    prefix = prefix_count(call)
    rewritten = prefix > 0 or call.token_mask is not None
    dtokens = dout.to(dtype, copy=rewritten, memory_format=torch.contiguous_format)
    if rewritten:
        for piece in pieces:
            rows = piece.rows(dtokens)
            rows[:, :prefix] = 0.0
            if (mask := masked(call, piece)) is not None:
                rows[:, prefix:].masked_fill_(mask, 0.0)
    return dtokens


def declines(pixels: list[Tensor]) -> str | None:
    """Why pixels cannot be served, or None."""
    others = {str(x.device) for x in pixels if x.device.type != "cpu"}
    if others:
        return f"pixels are on {', '.join(sorted(others))}; this backend serves CPU tensors"
    return None


def forward_why_not(pixels: list[Tensor], *_: object) -> str | None:
    """Declines what is not on the CPU."""
    return declines(pixels)


def backward_why_not(dout: Tensor | None, pixels: list[Tensor], *_: object) -> str | None:
    """Declines what is not on the CPU."""
    return declines(pixels)


register("patch_embed_forward", "cpu", forward, forward_why_not)
register("patch_embed_backward", "cpu", backward, backward_why_not)
