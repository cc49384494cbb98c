"""Does every wrong argument raise an error that names it, what it got and what it wants?"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels._core import registry

B, C, D, N, P = 2, 3, 8, 4, 2
NAN = float("nan")


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


def embed(**changes: object) -> object:
    """Two images of 2 x 2 patches, right but for the changes."""
    arguments = {"pixels": ones(B, C, 8, 8), "weight": ones(D, C, 4, 4), "bias": ones(D)}
    return mm.patch_embed(**arguments | changes)


def varlen(**changes: object) -> object:
    """Two images of 2 and 4 patches."""
    images = [ones(C, 4, 8), ones(C, 8, 8)]
    arguments = {"images": images, "weight": ones(D, C, 4, 4), "bias": ones(D)}
    return mm.patch_embed_varlen(**arguments | changes)


def flattened(**changes: object) -> object:
    """Patches of 4 x 4 that are cut out."""
    arguments = {"pixels": ones(B, N, 48), "weight": ones(D, 48), "bias": ones(D)}
    return mm.patch_embed(**arguments | changes)


def masked(**changes: object) -> object:
    arguments = {"token_mask": ones(B, N).bool(), "mask_token": ones(D)}
    return embed(**arguments | changes)


def gathered(**changes: object) -> object:
    arguments = {"pos_embed": ones(9, D), "pos_index": torch.arange(N)}
    return embed(**arguments | changes)


class Elsewhere(Tensor):
    """Claims to lie on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(x: Tensor) -> Tensor:
    return x.as_subclass(Elsewhere)


class Case(NamedTuple):
    """A wrong call and what its error must be: its type, and words that its message must hold."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    words: tuple[str, ...]


def case(name: str, call: Callable[[], object], error: type[Exception], *words: str) -> Case:
    return Case(name, call, error, words)


WRONG = [
    # pixels
    case("pixels are a list", lambda: embed(pixels=[ones(C, 8, 8)]), TypeError,
         "patch_embed: pixels is list", "torch.Tensor", "patch_embed_varlen"),
    case("pixels are None", lambda: embed(pixels=None), TypeError, "pixels is NoneType",
         "torch.Tensor"),
    case("pixels are int16", lambda: embed(pixels=ones(B, C, 8, 8).short()), TypeError,
         "pixels is torch.int16", "uint8", "float32", "cast it"),
    case("pixels are bool", lambda: embed(pixels=ones(B, C, 8, 8).bool()), TypeError,
         "pixels is torch.bool", "uint8"),
    case("pixels are complex", lambda: embed(pixels=ones(B, C, 8, 8, dtype=torch.complex64)),
         TypeError, "pixels is torch.complex64", "float32"),
    case("pixels are sparse", lambda: embed(pixels=ones(B, C, 8, 8).to_sparse()), TypeError,
         "pixels is torch.sparse_coo", "strided", "pixels.to_dense()"),
    case("pixels elsewhere", lambda: embed(pixels=ones(B, C, 8, 8, device="meta")), ValueError,
         "pixels is on meta", "weight on cpu", "pixels.to(weight.device)"),
    case("one image without a batch", lambda: embed(pixels=ones(C, 8, 8)), ValueError,
         "pixels has shape (3, 8, 8)", "(8, 3, 4, 4)", "pixels[None]"),
    case("a video for a weight of images", lambda: embed(pixels=ones(B, C, 2, 8, 8)), ValueError,
         "pixels has shape (2, 3, 2, 8, 8)", "(8, 3, 4, 4)", "(B, C, H, W)"),
    case("an image for a weight of video", lambda: embed(weight=ones(D, C, 2, 4, 4)), ValueError,
         "pixels has shape (2, 3, 8, 8)", "(8, 3, 2, 4, 4)", "(B, C, T, H, W)", "pixels[None]"),
    case("audio without channels",
         lambda: embed(pixels=ones(B, 90), weight=ones(D, 1, 9)), ValueError,
         "pixels has shape (2, 90)", "(8, 1, 9)", "(B, C, L)"),
    case("pixels of rank 0", lambda: embed(pixels=torch.tensor(1.0)), ValueError,
         "pixels has shape ()", "(B, C, H, W)"),
    case("pixels with channels last", lambda: embed(pixels=ones(B, 8, 8, C)), ValueError,
         "pixels has shape (2, 8, 8, 3)", "8 channels", "3; they must agree",
         "data_format='channels_last'"),
    case("pixels with channels first", lambda: embed(data_format="channels_last"), ValueError,
         "pixels has shape (2, 3, 8, 8)", "8 channels", "data_format='channels_first'",
         "(B, H, W, C)"),
    case("channels last of another rank",
         lambda: embed(pixels=ones(B, 2, 8, 8, C), data_format="channels_last"), ValueError,
         "pixels has shape (2, 2, 8, 8, 3)", "channels_last", "(B, H, W, C)"),
    case("channels of video", lambda: embed(pixels=ones(B, 4, 2, 8, 8), weight=ones(D, C, 2, 4, 4)),
         ValueError, "4 channels", "(8, 3, 2, 4, 4)", "(B, C, T, H, W)"),
    case("an image smaller than a patch", lambda: embed(pixels=ones(B, C, 8, 3)), ValueError,
         "pixels is (8, 3) in (H, W)", "a patch (4, 4)", "one patch must fit", "pad=True"),
    case("audio shorter than a patch", lambda: embed(pixels=ones(B, 1, 8), weight=ones(D, 1, 9)),
         ValueError, "pixels is (8,) in (L)", "a patch (9,)", "pad=True"),
    case("an image without a row, padded", lambda: embed(pixels=ones(B, C, 0, 8), pad=True),
         ValueError, "pixels is (0, 8) in (H, W)", "none may be 0"),
    case("an image without a row", lambda: embed(pixels=ones(B, C, 0, 8)), ValueError,
         "pixels is (0, 8) in (H, W)"),
    # weight and bias
    case("weight is None", lambda: embed(weight=None), TypeError, "weight is NoneType",
         "torch.Tensor"),
    case("weight is a module", lambda: embed(weight=torch.nn.Conv2d(C, D, 4)), TypeError,
         "weight is Conv2d", "torch.Tensor"),
    case("weight is uint8", lambda: embed(weight=ones(D, C, 4, 4).byte()), TypeError,
         "weight is torch.uint8", "float16, bfloat16, float32 or float64"),
    case("weight is complex", lambda: embed(weight=ones(D, C, 4, 4) * 1j), TypeError,
         "weight is torch.complex64", "float32"),
    case("weight is sparse", lambda: embed(weight=ones(D, C, 4, 4).to_sparse()), TypeError,
         "weight is torch.sparse_coo", "strided"),
    case("weight of rank 1", lambda: embed(weight=ones(D)), ValueError, "weight has shape (8,)",
         "Conv2d", "Linear"),
    case("weight of rank 6", lambda: embed(weight=ones(D, C, 1, 1, 1, 1)), ValueError,
         "weight has shape (8, 3, 1, 1, 1, 1)", "Conv3d"),
    case("weight of no value", lambda: embed(weight=ones(D, C, 0, 4)), ValueError,
         "weight has shape (8, 3, 0, 4)", "none may be 0"),
    case("weight of no token", lambda: embed(weight=ones(0, C, 4, 4)), ValueError,
         "weight has shape (0, 3, 4, 4)", "none may be 0"),
    case("images with a weight of Linear", lambda: embed(weight=ones(D, 48)), ValueError,
         "pixels has shape (2, 3, 8, 8)", "(8, 48)", "(B, N, 48) or (N, 48)",
         "weight.view(embed_dim, channels, *patch_size)"),
    case("bias is a number", lambda: embed(bias=1.0), TypeError, "bias is float", "torch.Tensor"),
    case("bias is a bool", lambda: embed(bias=True), TypeError, "bias is bool", "torch.Tensor"),
    case("bias is int", lambda: embed(bias=ones(D).int()), TypeError, "bias is torch.int32",
         "floating point", "bias.float()"),
    case("bias is sparse", lambda: embed(bias=ones(D).to_sparse()), TypeError,
         "bias is torch.sparse_coo", "bias.to_dense()"),
    case("bias elsewhere", lambda: embed(bias=ones(D, device="meta")), ValueError,
         "bias is on meta", "weight on cpu", "bias.to(weight.device)"),
    case("bias of another size", lambda: embed(bias=ones(C)), ValueError, "bias has shape (3,)",
         "(8,)", "weight"),
    case("bias of a batch", lambda: embed(bias=ones(B, D)), ValueError, "bias has shape (2, 8)",
         "(8,)"),
    # stride, pad and data_format
    case("stride 0", lambda: embed(stride=0), ValueError, "stride is 0", "at least 1", "2 such"),
    case("stride negative", lambda: embed(stride=(2, -1)), ValueError, "stride is (2, -1)",
         "at least 1"),
    case("three strides for two dimensions", lambda: embed(stride=(1, 2, 2)), ValueError,
         "stride is (1, 2, 2)", "2 such"),
    case("no stride", lambda: embed(stride=()), ValueError, "stride is ()",
         "None (the patch size)"),
    case("stride is a bool", lambda: embed(stride=True), TypeError, "stride is True", "an int"),
    case("stride of a bool", lambda: embed(stride=(True, 2)), TypeError, "stride is (True, 2)"),
    case("stride is a float", lambda: embed(stride=2.0), TypeError, "stride is 2.0", "an int"),
    case("stride of floats", lambda: embed(stride=(2.0, 2)), TypeError, "stride is (2.0, 2)"),
    case("stride is a string", lambda: embed(stride="22"), TypeError, "stride is '22'", "an int"),
    case("stride is a tensor", lambda: embed(stride=torch.tensor(2)), TypeError,
         "stride is tensor(2)", "an int"),
    case("pad is a string", lambda: embed(pad="same"), TypeError, "pad is 'same'",
         "True or False"),
    case("pad is a number", lambda: embed(pad=1), TypeError, "pad is 1", "True or False"),
    case("data_format is another", lambda: embed(data_format="NHWC"), ValueError,
         "data_format is 'NHWC'", "'channels_first' or 'channels_last'"),
    case("data_format is None", lambda: embed(data_format=None), ValueError, "data_format is None",
         "'channels_last'"),
    # pixel_mean and pixel_std
    case("a mean for another number of channels", lambda: embed(pixel_mean=(0.1, 0.2)), ValueError,
         "pixel_mean is (0.1, 0.2)", "each of the 3 channels", "0 to 1"),
    case("no mean", lambda: embed(pixel_mean=()), ValueError, "pixel_mean is ()", "3 channels"),
    case("a std for another number of channels", lambda: embed(pixel_std=[1.0] * 4), ValueError,
         "pixel_std is [1.0, 1.0, 1.0, 1.0]", "each of the 3 channels"),
    case("mean NaN", lambda: embed(pixel_mean=NAN), ValueError, "pixel_mean is nan", "finite"),
    case("mean infinite", lambda: embed(pixel_mean=(0.0, math.inf, 0.0)), ValueError,
         "pixel_mean is (0.0, inf, 0.0)", "finite"),
    case("std NaN", lambda: embed(pixel_std=(1.0, NAN, 1.0)), ValueError,
         "pixel_std is (1.0, nan, 1.0)", "finite"),
    case("std 0", lambda: embed(pixel_std=(0.1, 0.0, 0.1)), ValueError,
         "pixel_std is (0.1, 0.0, 0.1)", "above 0"),
    case("std negative", lambda: embed(pixel_mean=0.5, pixel_std=-0.5), ValueError,
         "pixel_std is -0.5", "above 0"),
    case("mean is a string", lambda: embed(pixel_mean="imagenet"), TypeError,
         "pixel_mean is 'imagenet'", "a finite number", "3 channels"),
    case("mean of None", lambda: embed(pixel_mean=(None,) * 3), TypeError, "pixel_mean is (None,",
         "a finite number"),
    case("std is complex", lambda: embed(pixel_std=1j), TypeError, "pixel_std is 1j",
         "a finite number"),
    case("mean on a GPU", lambda: embed(pixel_mean=on_gpu(ones(3))), TypeError,
         "pixel_mean is a tensor on cuda:0", "wait for the device", "pixel_mean.tolist()"),
    case("std on meta", lambda: embed(pixel_std=ones(3, device="meta")), TypeError,
         "pixel_std is a tensor on meta", "pixel_std.tolist()"),
    case("std of rank 2", lambda: embed(pixel_std=ones(3, 1)), TypeError,
         "pixel_std is [[1.0], [1.0], [1.0]]", "3 channels"),
    case("mean with a gradient", lambda: embed(pixel_mean=ones(3, requires_grad=True)), ValueError,
         "pixel_mean needs a gradient", "detach"),
    # pos_embed and pos_index
    case("pos_embed is a list", lambda: embed(pos_embed=[1.0]), TypeError, "pos_embed is list",
         "torch.Tensor"),
    case("pos_embed is int", lambda: embed(pos_embed=ones(N, D).long()), TypeError,
         "pos_embed is torch.int64", "floating point"),
    case("pos_embed elsewhere", lambda: embed(pos_embed=ones(N, D, device="meta")), ValueError,
         "pos_embed is on meta", "weight on cpu", "pos_embed.to(weight.device)"),
    case("pos_embed of another width", lambda: embed(pos_embed=ones(N, D + 1)), ValueError,
         "pos_embed has shape (4, 9)", "(rows, 8)", "weight"),
    case("pos_embed of rank 1", lambda: embed(pos_embed=ones(D)), ValueError,
         "pos_embed has shape (8,)", "(rows, 8)"),
    case("pos_embed of rank 4", lambda: embed(pos_embed=ones(1, 2, 2, D)), ValueError,
         "pos_embed has shape (1, 2, 2, 8)", "(rows, 8)"),
    case("rows of pos_embed", lambda: embed(pos_embed=ones(N + 1, D)), ValueError,
         "pos_embed has shape (5, 8)", "4 (tokens)"),
    case("rows of pos_embed with prefix tokens",
         lambda: embed(pos_embed=ones(N + 1, D), prefix_tokens=ones(P, D)), ValueError,
         "pos_embed has shape (5, 8)", "4 (tokens) or 6 (prefix tokens and tokens)"),
    case("samples of pos_embed", lambda: embed(pos_embed=ones(3, N, D)), ValueError,
         "pos_embed has shape (3, 4, 8)", "2 samples", "4 (tokens)"),
    case("pos_index without pos_embed", lambda: embed(pos_index=torch.arange(N)), ValueError,
         "pos_index is given", "pos_embed is None", "table"),
    case("pos_index is a list", lambda: gathered(pos_index=[0, 1, 2, 3]), TypeError,
         "pos_index is list", "torch.Tensor"),
    case("pos_index is float", lambda: gathered(pos_index=ones(N)), TypeError,
         "pos_index is torch.float32", "int32 or int64", "pos_index.long()"),
    case("pos_index is uint8", lambda: gathered(pos_index=ones(N).byte()), TypeError,
         "pos_index is torch.uint8", "int32 or int64"),
    case("pos_index is bool", lambda: gathered(pos_index=ones(N).bool()), TypeError,
         "pos_index is torch.bool", "int32 or int64"),
    case("pos_index elsewhere", lambda: gathered(pos_index=torch.arange(N, device="meta")),
         ValueError, "pos_index is on meta", "weight on cpu", "move"),
    case("pos_index negative", lambda: gathered(pos_index=torch.tensor([0, 1, -1, 2])), ValueError,
         "pos_index goes from -1 to 2", "rows 0 to 8"),
    case("pos_index beyond the table", lambda: gathered(pos_index=torch.tensor([0, 9, 1, 2])),
         ValueError, "pos_index goes from 0 to 9", "rows 0 to 8"),
    case("length of pos_index", lambda: gathered(pos_index=torch.arange(N + 1)), ValueError,
         "pos_index has shape (5,)", "4 (tokens)"),
    case("samples of pos_index", lambda: gathered(pos_index=torch.zeros(3, N).long()), ValueError,
         "pos_index has shape (3, 4)", "2 samples", "4 (tokens)"),
    case("pos_index of rank 3", lambda: gathered(pos_index=torch.zeros(1, B, N).long()), ValueError,
         "pos_index has shape (1, 2, 4)", "4 (tokens)"),
    case("a table for each sample", lambda: gathered(pos_embed=ones(B, 9, D)), ValueError,
         "pos_embed has shape (2, 9, 8)", "pos_index", "one table (rows, 8)"),
    case("a table without a row", lambda: gathered(pos_embed=ones(0, D)), ValueError,
         "pos_embed has shape (0, 8)", "at least one row"),
    # prefix_tokens
    case("prefix_tokens are a list", lambda: embed(prefix_tokens=[ones(D)]), TypeError,
         "prefix_tokens is list", "torch.Tensor"),
    case("prefix_tokens are int", lambda: embed(prefix_tokens=ones(P, D).int()), TypeError,
         "prefix_tokens is torch.int32", "floating point"),
    case("prefix_tokens elsewhere", lambda: embed(prefix_tokens=ones(P, D, device="meta")),
         ValueError, "prefix_tokens is on meta", "move"),
    case("prefix_tokens of rank 1", lambda: embed(prefix_tokens=ones(D)), ValueError,
         "prefix_tokens has shape (8,)", "(P, 8)", "(1 or 2, P, 8)"),
    case("prefix_tokens of another width", lambda: embed(prefix_tokens=ones(P, 7)), ValueError,
         "prefix_tokens has shape (2, 7)", "(P, 8)"),
    case("samples of prefix_tokens", lambda: embed(prefix_tokens=ones(3, P, D)), ValueError,
         "prefix_tokens has shape (3, 2, 8)", "(1 or 2, P, 8)"),
    # token_mask and mask_token
    case("token_mask without mask_token", lambda: masked(mask_token=None), ValueError,
         "mask_token is None", "go together"),
    case("mask_token without token_mask", lambda: masked(token_mask=None), ValueError,
         "token_mask is None", "go together"),
    case("token_mask is a list", lambda: masked(token_mask=[True] * N), TypeError,
         "token_mask is list", "torch.Tensor"),
    case("token_mask is float", lambda: masked(token_mask=ones(B, N)), TypeError,
         "token_mask is torch.float32", "bool", "True where mask_token goes"),
    case("token_mask elsewhere", lambda: masked(token_mask=ones(N, device="meta").bool()),
         ValueError, "token_mask is on meta", "weight on cpu", "move"),
    case("length of token_mask", lambda: masked(token_mask=ones(B, N - 1).bool()), ValueError,
         "token_mask has shape (2, 3)", "4 (tokens)"),
    case("token_mask over prefix tokens, too",
         lambda: masked(token_mask=ones(N + P).bool(), prefix_tokens=ones(P, D)), ValueError,
         "token_mask has shape (6,)", "4 (tokens)"),
    case("samples of token_mask", lambda: masked(token_mask=ones(3, N).bool()), ValueError,
         "token_mask has shape (3, 4)", "2 samples"),
    case("token_mask as a grid", lambda: masked(token_mask=ones(B, 2, 2).bool()), ValueError,
         "token_mask has shape (2, 2, 2)", "4 (tokens)"),
    case("mask_token is a number", lambda: masked(mask_token=0.0), TypeError,
         "mask_token is float", "torch.Tensor"),
    case("mask_token is int", lambda: masked(mask_token=ones(D).int()), TypeError,
         "mask_token is torch.int32", "floating point"),
    case("mask_token of another size", lambda: masked(mask_token=ones(D + 1)), ValueError,
         "mask_token has shape (9,)", "(8,)"),
    case("mask_token elsewhere", lambda: masked(mask_token=ones(D, device="meta")), ValueError,
         "mask_token is on meta", "mask_token.to(weight.device)"),
    # patches that are cut out
    case("values of a patch", lambda: flattened(pixels=ones(B, N, 47)), ValueError,
         "pixels has shape (2, 4, 47)", "(8, 48)", "(B, N, 48) or (N, 48)"),
    case("values of a patch, of a convolution",
         lambda: flattened(pixels=ones(N, 47), weight=ones(D, C, 4, 4)), ValueError,
         "pixels has shape (4, 47)", "(8, 3, 4, 4)", "(N, 48)", "pixels[None]"),
    case("one patch of rank 1", lambda: flattened(pixels=ones(48)), ValueError,
         "pixels has shape (48,)", "(N, 48)"),
    case("patches are int", lambda: flattened(pixels=ones(B, N, 48).int()), TypeError,
         "pixels is torch.int32", "uint8"),
    case("patches elsewhere", lambda: flattened(pixels=ones(B, N, 48, device="meta")), ValueError,
         "pixels is on meta", "weight on cpu"),
    case("patches with a stride", lambda: flattened(stride=4), ValueError, "stride is given",
         "(2, 4, 48)", "cut out", "leave it"),
    case("patches with pad", lambda: flattened(pad=True), ValueError, "pad is given", "cut out"),
    case("patches, pad a string", lambda: flattened(pad="same"), TypeError, "pad is 'same'"),
    case("patches of another format", lambda: flattened(data_format="last"), ValueError,
         "data_format is 'last'", "'channels_last'"),
    case("patches, channels that Linear does not know", lambda: flattened(pixel_mean=(0.1,) * 3),
         ValueError, "pixel_mean is (0.1, 0.1, 0.1)", "(embed_dim, channels, *patch)"),
    case("patches, rows of pos_embed", lambda: flattened(pos_embed=ones(5, D)), ValueError,
         "pos_embed has shape (5, 8)", "4 (tokens)"),
    case("patches, mask alone", lambda: flattened(mask_token=ones(D)), ValueError,
         "token_mask is None", "go together"),
    case("patches, bias of another size", lambda: flattened(bias=ones(9)), ValueError,
         "bias has shape (9,)", "(8,)"),
    # patch_embed_varlen
    case("images are a tensor", lambda: varlen(images=ones(B, C, 8, 8)), TypeError,
         "patch_embed_varlen: images is Tensor", "list", "patch_embed"),
    case("images are an iterator", lambda: varlen(images=iter([ones(C, 8, 8)])), TypeError,
         "images is list_iterator", "list of at least one tensor"),
    case("no images", lambda: varlen(images=[]), ValueError, "images is empty", "at least one"),
    case("no images to explain", lambda: mm.explain(mm.patch_embed_varlen, [], ones(8, C, 4, 4)),
         ValueError, "images is empty", "at least one"),
    case("a backend for patches", lambda: flattened(backend="cpu"), ValueError,
         "backend is 'cpu'", "cut out", "leave it 'auto'"),
    case("patches of another size to explain",
         lambda: mm.explain(mm.patch_embed, ones(2, 5, 11), ones(8, 12)), ValueError,
         "pixels has shape (2, 5, 11)", "(B, N, 12)"),
    case("images are None", lambda: varlen(images=None), TypeError, "images is NoneType", "list"),
    case("an image is None", lambda: varlen(images=[ones(C, 8, 8), None]), TypeError,
         "images[1] is NoneType", "torch.Tensor"),
    case("an image is int", lambda: varlen(images=[ones(C, 8, 8).int()]), TypeError,
         "images[0] is torch.int32", "uint8"),
    case("images of two dtypes", lambda: varlen(images=[ones(C, 8, 8), ones(C, 8, 8).byte()]),
         TypeError, "images[0] is torch.float32", "images[1] torch.uint8", "cast"),
    case("an image elsewhere", lambda: varlen(images=[ones(C, 8, 8), ones(C, 8, 8).to("meta")]),
         ValueError, "images[1] is on meta", "weight on cpu", "images[1].to(weight.device)"),
    case("an image with a batch", lambda: varlen(images=[ones(C, 8, 8), ones(1, C, 8, 8)]),
         ValueError, "images[1] has shape (1, 3, 8, 8)", "it must be (C, H, W)"),
    case("an image of rank 0", lambda: varlen(images=[torch.tensor(1.0)]), ValueError,
         "images[0] has shape ()", "(C, H, W)"),
    case("an image with channels last", lambda: varlen(images=[ones(8, 8, C)]), ValueError,
         "images[0] has shape (8, 8, 3)", "8 channels", "data_format='channels_last'"),
    case("an image with channels first", lambda: varlen(data_format="channels_last"), ValueError,
         "images[0] has shape (3, 4, 8)", "(H, W, C)", "data_format='channels_first'"),
    case("an image smaller than a patch", lambda: varlen(images=[ones(C, 8, 8), ones(C, 2, 8)]),
         ValueError, "images[1] is (2, 8) in (H, W)", "a patch (4, 4)", "pad=True"),
    case("images with a weight of Linear", lambda: varlen(weight=ones(D, 48)), ValueError,
         "weight has shape (8, 48)", "Linear", "weight.view(embed_dim, channels, *patch_size)"),
    case("varlen: weight is None", lambda: varlen(weight=None), TypeError,
         "patch_embed_varlen: weight is NoneType"),
    case("varlen: bias of another size", lambda: varlen(bias=ones(9)), ValueError,
         "patch_embed_varlen: bias has shape (9,)", "(8,)"),
    case("varlen: stride 0", lambda: varlen(stride=[0, 1]), ValueError,
         "patch_embed_varlen: stride is [0, 1]", "at least 1"),
    case("varlen: rows of pos_embed", lambda: varlen(pos_embed=ones(5, D)), ValueError,
         "pos_embed has shape (5, 8)", "2 samples", "6 (tokens)"),
    case("varlen: rows of pos_embed with prefix tokens",
         lambda: varlen(pos_embed=ones(8, D), prefix_tokens=ones(P, D)), ValueError,
         "pos_embed has shape (8, 8)", "6 (tokens) or 10 (prefix tokens and tokens)"),
    case("varlen: pos_embed of samples", lambda: varlen(pos_embed=ones(2, 6, D)), ValueError,
         "pos_embed has shape (2, 6, 8)", "6 (tokens)"),
    case("varlen: pos_index beyond the table",
         lambda: varlen(pos_embed=ones(5, D), pos_index=torch.arange(6)), ValueError,
         "pos_index goes from 0 to 5", "rows 0 to 4"),
    case("varlen: pos_index without pos_embed", lambda: varlen(pos_index=torch.arange(6)),
         ValueError, "pos_embed is None"),
    case("varlen: length of pos_index",
         lambda: varlen(pos_embed=ones(9, D), pos_index=torch.arange(5)), ValueError,
         "pos_index has shape (5,)", "6 (tokens)"),
    case("varlen: prefix tokens of samples", lambda: varlen(prefix_tokens=ones(2, P, D)),
         ValueError, "prefix_tokens has shape (2, 2, 8)", "(1, P, 8)"),
    case("varlen: length of token_mask",
         lambda: varlen(token_mask=ones(4).bool(), mask_token=ones(D)), ValueError,
         "token_mask has shape (4,)", "6 (tokens)"),
    case("varlen: token_mask alone", lambda: varlen(token_mask=ones(6).bool()), ValueError,
         "mask_token is None", "go together"),
    case("varlen: std 0", lambda: varlen(pixel_std=0), ValueError, "pixel_std is 0", "above 0"),
    case("varlen: mean on a GPU", lambda: varlen(pixel_mean=on_gpu(ones(3))), TypeError,
         "pixel_mean is a tensor on cuda:0", "pixel_mean.tolist()"),
    case("varlen: pad is None", lambda: varlen(pad=None), TypeError, "pad is None",
         "True or False"),
    # Backends
    case("unknown backend", lambda: embed(backend="conv"), ValueError, "backend is 'conv'",
         "'auto'", "reference"),
    case("backend is None", lambda: embed(backend=None), ValueError, "backend is None", "'auto'"),
    case("varlen: unknown backend", lambda: varlen(backend="conv"), ValueError, "backend is 'conv'",
         "'auto'"),
    case("patches, unknown backend", lambda: flattened(backend="conv"), ValueError,
         "backend is 'conv'", "'auto'"),
    case("explain of a wrong call", lambda: mm.explain(mm.patch_embed, ones(8, 8), ones(D, C, 4)),
         ValueError, "pixels has shape (8, 8)", "(B, C, L)"),
    case("explain of a wrong list",
         lambda: mm.explain(mm.patch_embed_varlen, [ones(8, 8)], ones(D, C, 4, 4)), ValueError,
         "images[0] has shape (8, 8)", "(C, H, W)"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case.name for case in WRONG])
def test_does_the_error_say_what_is_wrong(case):
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError, IndexError)) as raised:
        case.call()
    assert type(raised.value) is case.error, raised.value
    message = str(raised.value)
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in {message}"
    assert message.startswith(("patch_embed", "backend"))


@pytest.mark.parametrize("correct", [embed, varlen, flattened, masked, gathered])
def test_are_the_calls_right_but_for_the_changes(correct):
    out = correct()
    out = out[0] if isinstance(out, tuple) else out
    assert set(out.unique().tolist()) <= {1.0, 49.0, 50.0} and out.shape[-1] == D


@pytest.mark.parametrize("call", [embed, varlen])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_does_a_backend_that_cannot_serve_give_every_reason(call, requires_grad):
    weight = ones(D, C, 4, 4, requires_grad=requires_grad)
    with pytest.raises(mm.BackendUnavailable) as raised:
        call(weight=weight, backend="sdpa")
    message = str(raised.value)
    assert "patch_embed_forward" in message or "patch_embed_backward" in message
    for backend in registry.backends("patch_embed_forward"):
        assert backend.name in message
    assert "mmkernels has no sdpa backend" in message


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")
def test_is_no_value_read_on_a_gpu():
    """Reading it would synchronise, which a fake tensor refuses."""
    with torch._subclasses.FakeTensorMode(), torch.device("cuda"):
        table, index, prefix = ones(9, D), torch.arange(N), ones(P, D)
        mask = {"token_mask": ones(B, N).bool(), "mask_token": ones(D)}
        out = embed(pos_embed=table, pos_index=index, prefix_tokens=prefix, **mask)
    assert out.shape == (B, P + N, D) and out.device.type == "cuda"
