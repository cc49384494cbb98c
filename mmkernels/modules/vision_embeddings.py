"""The front of a vision transformer: patches, class and register tokens, and positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.modules.patch_embed import PatchEmbed, Size
from mmkernels.modules.projection import Grid, check_pixels, finished, is_plain
from mmkernels.modules.resampling import PositionCache, resampled_positions
from mmkernels.patch_embed.api import Numbers

MODES = ("bicubic", "bilinear")


class VisionEmbeddings(nn.Module):
    """Images to the tokens that the first block of a vision transformer takes.

    One call of `mm.patch_embed` writes all of them. Parameters are named as in timm's
    `VisionTransformer` and load from its state_dict: `patch_embed.proj.weight` (D, C, h, w),
    `patch_embed.proj.bias` (D,), `cls_token` (1, 1, D), `reg_token` (1, reg_tokens, D), `pos_embed`
    (1, rows, D), those of `norm_pre`, and `mask_token` (1, 1, D).

    In evaluation without gradients positions that were resampled for a grid are kept until
    pos_embed changes. Writing to `pos_embed.data` is not seen; call `positions.clear()` after it,
    or `train` or `eval`, which do.

    Args:
        img_size: height and width of the images, and so the grid of pos_embed; None without
            positions: any.
        patch_size: height and width of a patch.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
        class_token: whether there is a class token, the first.
        reg_tokens: number of register tokens, after the class token. A distillation token is one.
        pos_embed: "learn", or None, "none" or "" for models without (with rotary positions, say).
        no_embed_class: whether pos_embed has rows for the patches alone, none for the tokens
            before them.
        mask_token: whether there is a token that takes the place of masked patches.
        dynamic_img_size: whether images may have any size of whole patches; positions are then
            resampled to their grid.
        dynamic_img_pad: whether images are padded to whole patches on the right and below.
        interpolation: "bicubic" or "bilinear" resampling of positions.
        antialias: whether resampling smooths where the grid is coarser than that of pos_embed.
            timm does; transformers' ViT, CLIP, SigLIP and DINOv2 do not.
        bias: whether the patch projection has one; CLIP's has not.
        pos_drop_rate: probability of dropout after the sum with positions.
        norm_layer: called with embed_dim, device and dtype, makes `norm_pre`, which comes last
            (CLIP's pre_layrnorm); None: no norm.
        device: where the parameters lie.
        dtype: dtype of the parameters, in which tokens are returned.
        pixel_mean: as in `PatchEmbed`, and so are pixel_std and backend.
        pixel_std: see pixel_mean.
        backend: see pixel_mean.

    Raises:
        ValueError: an argument is none of these.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Darcet et al., "Vision
    Transformers Need Registers", ICLR 2024; timm's `models/vision_transformer.py`.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        class_token: bool = True,
        reg_tokens: int = 0,
        pos_embed: str | None = "learn",
        no_embed_class: bool = False,
        mask_token: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        interpolation: str = "bicubic",
        antialias: bool = True,
        bias: bool = True,
        pos_drop_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pixel_mean: Numbers | None = None,
        pixel_std: Numbers | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if pos_embed not in ("learn", "none", "", None):
            raise ValueError(f"pos_embed is {pos_embed!r}; it must be 'learn', 'none' or None")
        if interpolation not in MODES:
            raise ValueError(
                f"interpolation is {interpolation!r}; it must be one of {', '.join(MODES)}"
            )
        learned = pos_embed == "learn"
        if learned and img_size is None:
            raise ValueError(
                "img_size is None, and pos_embed 'learn' has a row for each of its patches; give "
                "the size (dynamic_img_size=True takes others, too) or pos_embed=None"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, bias=bias,
            strict_img_size=not dynamic_img_size, dynamic_img_pad=dynamic_img_pad,
            pixel_mean=pixel_mean, pixel_std=pixel_std, backend=backend, **factory,
        )  # fmt: skip
        self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.interpolation = interpolation
        self.antialias = antialias

        def parameter(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, rows, embed_dim, **factory)) if rows else None

        self.cls_token = parameter(int(class_token))
        self.reg_token = parameter(reg_tokens)
        self.mask_token = parameter(int(mask_token))
        patches = self.patch_embed.num_patches or 0
        self.pos_embed = parameter(learned * (patches + self._embedded_prefix))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = norm_layer(embed_dim, **factory) if norm_layer else nn.Identity()
        self.positions = PositionCache()
        self.reset_tokens()

    def reset_tokens(self) -> None:
        """Initialises tokens and positions as timm does; the projection is left as it is."""
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def _embedded_prefix(self) -> int:
        """Rows of pos_embed before those of the patches."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def train(self, mode: bool = True) -> "VisionEmbeddings":
        """Sets the mode, as every module's, and forgets resampled positions."""
        self.positions.clear()
        return super().train(mode)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Changes the image size and, resampling weight and positions, the grid.

        Args:
            img_size: the new one; None: as before.
            patch_size: the new one; None: as before. See `PatchEmbed.set_input_size`.

        Raises:
            ValueError, TypeError: as there.
        """
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        new = self.patch_embed.grid_size
        if self.pos_embed is None or old is None or new is None or old == new:
            return
        self.positions.clear()
        made = resampled_positions(self.pos_embed.detach(), old, new, *self._resampling)
        self.pos_embed = nn.Parameter(made, requires_grad=self.pos_embed.requires_grad)

    @property
    def _resampling(self) -> tuple[int, str, bool]:
        return self._embedded_prefix, self.interpolation, self.antialias

    def forward(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embeds images.

        Args:
            x: (B, C, H, W), floating point or uint8, in any strides.
            bool_masked_pos: (B, N) or (N,) bool; where True, the mask token takes the place of the
                patch, before its position is added.

        Returns:
            (B, P + N, D): class token, register tokens, patches row by row.

        Raises:
            AssertionError: the image size is not img_size, or not whole patches; as in timm.
            ValueError: x or bool_masked_pos has a wrong shape; there is no mask token.
            TypeError: x or bool_masked_pos is no tensor or has a wrong dtype.
        """
        if bool_masked_pos is not None:
            self._check_mask(bool_masked_pos)
        tail = {
            "prefix_tokens": self._prefix_tokens(),
            "token_mask": bool_masked_pos,
            "mask_token": None if bool_masked_pos is None else self.mask_token,
        }
        embed = self.patch_embed
        if is_plain(embed, PatchEmbed) and is_plain(embed.norm, nn.Identity):
            embed.check_size(x)
            pad_to = embed.patch_size if embed.dynamic_img_pad else None
            tokens, _ = embed._embed(x, pad_to, positions=self._positions, **tail)
        else:
            check_pixels(type(self).__name__, x, ("B", "C", "H", "W"))
            pos = self._positions(embed.dynamic_feat_size((x.shape[2], x.shape[3])))
            tokens = finished(embed(x), pos, **tail)
        return self.norm_pre(self.pos_drop(tokens))

    def _positions(self, grid: Grid) -> Tensor | None:
        old = self.patch_embed.grid_size
        if self.pos_embed is None or old is None:
            return None
        return self.positions.get(self.pos_embed, old, (grid[0], grid[1]), *self._resampling)

    def _prefix_tokens(self) -> Tensor | None:
        if self.cls_token is None or self.reg_token is None:
            return self.reg_token if self.cls_token is None else self.cls_token
        return torch.cat((self.cls_token, self.reg_token), 1)

    def _check_mask(self, mask: Any) -> None:
        where = type(self).__name__
        if self.mask_token is None:
            raise ValueError(
                f"{where}: bool_masked_pos is given, and there is no mask token; make the module "
                "with mask_token=True"
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"{where}: bool_masked_pos is {got}; it must be a bool tensor, True where a patch "
                "is masked"
            )
