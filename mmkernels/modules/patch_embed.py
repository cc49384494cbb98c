"""timm's `PatchEmbed` and `PatchEmbedWithSize` on `mm.patch_embed`.

Constructor, attributes, methods, messages of assertions and state_dict are timm's, so that its
models take this module in the place of their own and load their checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.modules.projection import Grid, as_tuple, check_pixels, embed
from mmkernels.modules.resampling import resampled_kernels
from mmkernels.patch_embed.api import Numbers
from mmkernels.patch_embed.checks import statistics

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")
Size = int | Sequence[int]
Pair = tuple[int, int]


class PatchEmbed(nn.Module):
    """Patches of an image times a weight, with timm's interface.

    Parameters are `proj.weight` (embed_dim, in_chans, *patch_size), `proj.bias` (embed_dim,) and
    those of `norm`. Where proj has hooks, or is no plain `nn.Conv2d` any more (LoRA, a
    parametrisation, another module), proj itself is called.

    Args:
        img_size: height and width of the images; None: not checked, nor are grid_size and
            num_patches then known.
        patch_size: height and width of a patch.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
        norm_layer: called with embed_dim, device and dtype, makes the norm of the output.
        flatten: whether the output is (B, N, D) rather than (B, D, gh, gw).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC", overrides flatten.
        bias: whether proj has a bias.
        strict_img_size: whether images must have img_size rather than whole patches.
        dynamic_img_pad: whether images are padded to whole patches on the right and below.
        device: where the parameters lie.
        dtype: dtype of the parameters, in which tokens are returned.
        pixel_mean: a number or one for each channel, in units of 0 to 1; pixels become
            (pixels - pixel_mean) / pixel_std. uint8 is divided by 255 first, also without either.
        pixel_std: likewise.
        backend: backend of `mm.patch_embed`.

    Raises:
        ValueError: a size, output_fmt, pixel_mean or pixel_std is none of these.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; timm's
    `layers/patch_embed.py`.
    """

    # On the class too, for a module of timm's whose class is changed in place.
    pixel_mean: Sequence[float] = ()
    pixel_std: Sequence[float] = ()
    backend: str = "auto"

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pixel_mean: Numbers | None = None,
        pixel_std: Numbers | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if output_fmt not in (None, *FORMATS):
            raise ValueError(
                f"output_fmt is {output_fmt!r}; it must be None or one of {', '.join(FORMATS)}"
            )
        self.patch_size: Pair = _pair("patch_size", patch_size)
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.pixel_mean, self.pixel_std = statistics(
            type(self).__name__, pixel_mean, pixel_std, in_chans
        )
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **factory
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()

    def _init_img_size(self, img_size: Size | None) -> tuple[Pair | None, Pair | None, int | None]:
        """img_size, grid_size and num_patches for an img_size."""
        if img_size is None:
            return None, None, None
        height, width = _pair("img_size", img_size)
        grid = height // self.patch_size[0], width // self.patch_size[1]
        return (height, width), grid, grid[0] * grid[1]

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Changes the expected image size and, resampling the weight, the patch size.

        Args:
            img_size: the new one; None: as before.
            patch_size: the new one; None: as before. A new one makes a new parameter `proj.weight`,
                for which an optimizer must be made anew.

        Raises:
            ValueError: a size is wrong.
            TypeError: a new patch size is asked for, and proj is not an `nn.Conv2d`.

        Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023.
        """
        new = self.patch_size if patch_size is None else _pair("patch_size", patch_size)
        if new != self.patch_size:
            proj = self.proj
            if type(proj) is not nn.Conv2d:
                raise TypeError(
                    f"proj is {type(proj).__name__}, whose weight cannot be resampled to patches "
                    f"of {new}; set the patch size before proj is wrapped or replaced"
                )
            weight = resampled_kernels(proj.weight.detach(), new)
            proj.weight = nn.Parameter(weight, requires_grad=proj.weight.requires_grad)
            proj.kernel_size = proj.stride = self.patch_size = new
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(
            img_size or self.img_size
        )

    def feat_ratio(self, as_scalar: bool = True) -> Pair | int:
        """Pixels of a patch: its longer side, or (height, width) unless as_scalar."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """The grid (gh, gw) of an image of img_size (height, width)."""
        (height, width), (patch_h, patch_w) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return -(-height // patch_h), -(-width // patch_w)
        return height // patch_h, width // patch_w

    def extra_repr(self) -> str:
        """What the representations of proj and norm do not show."""
        return (
            f"img_size={self.img_size}, output_fmt={'NLC' if self.flatten else self.output_fmt}, "
            f"strict_img_size={self.strict_img_size}, dynamic_img_pad={self.dynamic_img_pad}, "
            f"pixel_mean={self.pixel_mean or None}, pixel_std={self.pixel_std or None}, "
            f"backend={self.backend!r}"
        )

    def check_size(self, x: Tensor) -> None:
        """Raises unless forward takes images of the size of x; errors as there."""
        check_pixels(type(self).__name__, x, ("B", "C", "H", "W"))
        if self.img_size is None or (self.dynamic_img_pad and not self.strict_img_size):
            return
        for name, size, patch, wanted in _named(x, self.patch_size, self.img_size):
            if self.strict_img_size:
                message = f"Input {name} ({size}) doesn't match model ({wanted})."
                torch._assert(size == wanted, message)
            else:
                message = f"Input {name} ({size}) should be divisible by patch size ({patch})."
                torch._assert(size % patch == 0, message)

    def forward(self, x: Tensor) -> Any:
        """Embeds images.

        Args:
            x: (B, C, H, W), floating point or uint8, in any strides.

        Returns:
            (B, N, D), or as output_fmt says: NCHW (B, D, gh, gw), NHWC (B, gh, gw, D), NCL
            (B, D, N), NLC (B, N, D); all of them views of (B, N, D) in memory.

        Raises:
            AssertionError: the image size is not img_size, or not whole patches; as in timm.
            ValueError: x has other dimensions or channels.
            TypeError: x is no tensor or has another dtype.
        """
        self.check_size(x)
        tokens, grid = self._embed(x, self.patch_size if self.dynamic_img_pad else None)
        return self.norm(self._formatted(tokens, grid))

    def _embed(self, x: Tensor, pad_to: Pair | None, **tail: Any) -> tuple[Tensor, Grid]:
        return embed(
            self.proj, x, pad_to=pad_to, pixel_mean=self.pixel_mean, pixel_std=self.pixel_std,
            backend=self.backend, **tail,
        )  # fmt: skip

    def _formatted(self, tokens: Tensor, grid: Grid) -> Tensor:
        if self.flatten or self.output_fmt == "NLC":
            return tokens
        if self.output_fmt == "NCL":
            return tokens.transpose(1, 2)
        tokens = tokens.unflatten(1, grid)
        return tokens if self.output_fmt == "NHWC" else tokens.permute(0, 3, 1, 2)


class PatchEmbedWithSize(PatchEmbed):
    """`PatchEmbed` that returns the grid, too, and takes images of whole patches of any size.

    Args:
        img_size: as in `PatchEmbed`; None: images need not be whole patches.
        patch_size: as in `PatchEmbed`.
        in_chans: likewise.
        embed_dim: likewise.
        norm_layer: likewise.
        flatten: likewise.
        output_fmt: likewise.
        bias: likewise.
        device: likewise.
        dtype: likewise.
        pixel_mean: likewise.
        pixel_std: likewise.
        backend: likewise.

    Raises:
        ValueError: as `PatchEmbed`.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pixel_mean: Numbers | None = None,
        pixel_std: Numbers | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, norm_layer, flatten, output_fmt, bias,
            device=device, dtype=dtype, pixel_mean=pixel_mean, pixel_std=pixel_std,
            backend=backend,
        )  # fmt: skip

    def check_size(self, x: Tensor) -> None:
        """Raises unless forward takes images of the size of x; errors as there."""
        check_pixels(type(self).__name__, x, ("B", "C", "H", "W"))
        if self.img_size is None:
            return
        for name, size, patch, _ in _named(x, self.patch_size, self.img_size):
            message = f"Input image {name} ({size}) must be divisible by patch size ({patch})."
            torch._assert(size % patch == 0, message)

    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """Embeds images.

        Args:
            x: as for `PatchEmbed`, and so are the errors.

        Returns:
            What `PatchEmbed` returns, and the grid (gh, gw).
        """
        self.check_size(x)
        tokens, grid = self._embed(x, None)
        return self.norm(self._formatted(tokens, grid)), torch.Size(grid)


def _pair(name: str, value: Size) -> Pair:
    height, width = as_tuple(name, value, 2)
    return height, width


def _named(x: Tensor, patch_size: Pair, img_size: Pair) -> Any:
    """("height", size, patch, expected size), and the same for the width."""
    return zip(("height", "width"), x.shape[2:], patch_size, img_size, strict=True)
