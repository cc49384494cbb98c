"""Models of libraries other than transformers, small, and what `mm.replace` does with each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.report import Report
from mmkernels.testing import assert_accurate
from tests.integrations.counting import kernel_calls

BY_HAND = "computes softmax(q k^T) v itself"
UNFUSED = "its fused_attn is False"
PADDED = "no padding"
OVERLAPPING = "no patches side by side"


@dataclass(frozen=True)
class Row:
    """A model and what `mm.replace` is to say of it.

    Attributes:
        library: the package that has it.
        name: for people.
        make: makes it.
        run: one forward of it, on inputs of a dtype.
        attention: attention modules swapped.
        left: attention modules left.
        patches: patch embeddings swapped.
        patches_left: convolutions over pixels left.
        why: a part of each reason for leaving one.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.dtype], Tensor]
    attention: int = 0
    left: int = 0
    patches: int = 0
    patches_left: int = 0
    why: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model in evaluation mode, with weights such that every part of it matters."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.ndim > 1:
                    parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def kernels_of(model: nn.Module, report: Report) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """For the name of each entry, the attentions and patch embeddings that ran in each call."""
    ran: dict[str, list[tuple[int, int]]] = {entry.name: [] for entry in report.entries}
    handles = []
    with kernel_calls() as calls:

        def count() -> tuple[int, int]:
            return calls.attention, calls.patch_embed

        def watch(name: str, module: nn.Module) -> None:
            before = []

            def leave(*_: Any) -> None:
                attention, patches = before.pop()
                ran[name].append((calls.attention - attention, calls.patch_embed - patches))

            handles.append(module.register_forward_pre_hook(lambda *_: before.append(count())))
            handles.append(module.register_forward_hook(leave))

        for name in ran:
            watch(name, model.get_submodule(name))
        yield ran
        total = [(sum(a), sum(b)) for a, b in (zip(*r, strict=True) for r in ran.values() if r)]
        inside = tuple(map(sum, zip(*total, strict=True))) if total else (0, 0)
        assert inside == count(), "a kernel ran outside of what the report names"
    for handle in handles:
        handle.remove()


def claimed(report: Report) -> dict[str, list[tuple[int, int]]]:
    """What `kernels_of` must find after one forward if the report is true."""
    kinds = {"attention": (1, 0), "patch embedding": (0, 1)}
    return {e.name: [kinds[e.kind] if e.swapped else (0, 0)] for e in report.entries}


def unfused(model: nn.Module) -> nn.Module:
    """A model of timm without `scaled_dot_product_attention`."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def measure(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of every parameter for a fixed projection of it."""
    model.zero_grad()
    out = run(model)
    (out * numbers(*out.shape, seed=2).to(out.dtype)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"output": out.detach(), **gradients}


# Of a few layers, with about eight operations each between two tensors that are stored. Eager's own
# error is one draw, and may happen to be almost none.
ROUNDING = 16 * torch.finfo(torch.float32).eps


def assert_parity(
    got: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]
) -> None:
    """The error rule for what `measure` gives.

    A gradient is a sum and rounds as its terms do, which may cancel, as those of a query and a key
    do: they are taken to be as large as the largest gradient in the module around it.
    """
    assert got.keys() == exact.keys() == eager.keys()
    largest: dict[str, float] = {}
    for name, x in exact.items():
        around = name.rsplit(".", 2)[0]
        largest[around] = max(largest.get(around, 0.0), x.abs().max().item())
    for name, x in exact.items():
        terms = largest[name.rsplit(".", 2)[0]] / max(x.abs().max().item(), 1e-300)
        assert_accurate(name, got[name], x, eager[name], ROUNDING * terms)


def timm_row(name: str, size: int = 32, options: Any = None, cls: str = "", **expected: Any) -> Row:
    """A model of timm by its registered name, or of a class in one of its modules."""

    def make() -> nn.Module:
        import timm

        given = {"num_classes": 10} | (options or {})
        if not cls:
            return timm.create_model(name, **given)
        module, _, kind = cls.partition(".")
        return getattr(getattr(timm.models, module), kind)(**given)

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return model(numbers(2, 3, size, size, dtype=dtype))

    return Row("timm", name, make, run, **expected)


VIT = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 4}
STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
WINDOWS = {
    "img_size": 32,
    "depths": (1, 1),
    "embed_dim": 32,
    "num_heads": (2, 4),
    "window_size": 4,
}
TWO = {"attention": 2, "patches": 1}


def maxxvit(block: str, size: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.maxxvit import MaxxVit, MaxxVitCfg

        config = MaxxVitCfg(
            embed_dim=(32, 32), depths=(1, 1), block_type=("C", block), stem_width=16
        )
        return MaxxVit(config, img_size=size, num_classes=10)

    return make


def resnet_clip() -> nn.Module:
    import timm
    from timm.models.byobnet import ByoBlockCfg

    block = ByoBlockCfg(type="bottle", d=1, c=64, s=2, br=0.25)
    return timm.create_model("resnet50_clip", num_classes=10, blocks=(block,) * 3, stem_chs=16)


def image(size: int) -> Callable[[nn.Module, torch.dtype], Tensor]:
    return lambda model, dtype: model(numbers(2, 3, size, size, dtype=dtype))


TIMM = (
    timm_row("vit_tiny_patch16_224", 32, VIT, **TWO),
    timm_row("deit_tiny_distilled_patch16_224", 32, VIT, **TWO),
    timm_row("beit_base_patch16_224", 32, VIT, **TWO),
    timm_row("eva02_tiny_patch14_224", 28, VIT | {"img_size": 28}, **TWO),
    timm_row("vit_base_patch16_rope_mixed_224", 32, VIT, **TWO),
    timm_row("vit_relpos_small_patch16_224", 32, VIT, **TWO),
    timm_row("samvit_base_patch16", 64, VIT | {"img_size": 64, "window_size": 3}, **TWO),
    timm_row("vit_base_patch16_siglip_224", 32, VIT, attention=3, patches=1),
    timm_row("naflexvit_base_patch16_gap", 32, {k: VIT[k] for k in list(VIT)[1:]}, attention=2),
    timm_row("swin_tiny", 32, WINDOWS, "swin_transformer.SwinTransformer", left=2, patches=1,
             why=(UNFUSED,)),
    timm_row("swinv2_tiny", 32, WINDOWS, "swin_transformer_v2.SwinTransformerV2", left=2, patches=1,
             why=(BY_HAND,)),
    timm_row("convnext_atto", 32, {"depths": (1,) * 4, "dims": (16,) * 4}, "convnext.ConvNeXt",
             patches=4),
    timm_row("cait_xxs24_224", 32, VIT, attention=2, left=2, patches=1, why=(BY_HAND,)),
    timm_row("xcit_nano_12_p8_224", 32, VIT, attention=2, left=2, patches_left=2,
             why=(PADDED, UNFUSED)),
    timm_row("crossvit_tiny_240", 48, {"img_size": 48, "img_scale": (1.0, 2 / 3),
             "patch_size": (12, 16), "embed_dim": (32, 48), "depth": ((1, 2, 0),),
             "num_heads": (2, 2), "mlp_ratio": (2.0, 2.0, 1.0)}, "crossvit.CrossVit",
             attention=3, left=2, patches=2, why=(BY_HAND,)),
    timm_row("twins_svt_small", 64, {"img_size": 64, "depths": (2, 1), "embed_dims": (32, 32),
             "num_heads": (1, 2), "sr_ratios": (4, 2), "wss": (4, 4), "mlp_ratios": (2, 2)},
             "twins.Twins", attention=3, patches=1),
    timm_row("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}, attention=4, patches_left=1, why=(PADDED,)),
    timm_row("hiera_tiny_224", 64, {"img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 16},
             attention=4, patches_left=1, why=(PADDED,)),
    timm_row("volo_d1", 32, {"img_size": 32, "layers": (1, 1), "embed_dims": (32, 32),
             "num_heads": (2, 2), "downsamples": (True, False),
             "outlook_attention": (True, False), "stem_hidden_dim": 16, "use_aux_head": False,
             "post_layers": ("ca",)}, "volo.VOLO",
             attention=1, left=2, patches=1, patches_left=1, why=(PADDED, BY_HAND)),
    timm_row("pit_ti", 32, {"img_size": 32, "base_dims": (16, 16),
             "depth": (1, 1), "heads": (2, 4), "mlp_ratio": 2}, "pit.PoolingVisionTransformer",
             attention=2, patches_left=1, why=(OVERLAPPING,)),
    timm_row("tiny_vit_5m", 64, STAGES | {"window_sizes": (4, 4, 4, 2)}, "tiny_vit.TinyVit",
             attention=3, patches_left=2, why=(PADDED,)),
    timm_row("davit_tiny", 64, STAGES, "davit.DaVit",
             attention=4, left=4, patches=1, patches_left=1, why=(PADDED, BY_HAND)),
    timm_row("mobilevit_xxs", 64, None, attention=9, patches_left=1, why=(PADDED,)),
    Row("timm", "maxvit_nano_rw_256", maxxvit("M", 64), image(64), attention=2, patches_left=1,
        why=(PADDED,)),
    Row("timm", "coatnet_0_rw_224", maxxvit("T", 32), image(32), attention=1, patches_left=1,
        why=(PADDED,)),
    Row("timm", "resnet50_clip", resnet_clip, image(224), attention=1, patches_left=1,
        why=(PADDED,)),
)  # fmt: skip


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 4, 64, 96, num_classes=10)


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 32, [1, 1], [2, 4], [4, 4], num_classes=10)


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10)


TORCHVISION = (
    Row("torchvision", "vit_b_16", torchvision_vit, image(32), attention=2, patches=1),
    Row("torchvision", "swin_t", torchvision_swin, image(32), left=2, patches=1, why=(BY_HAND,)),
    Row("torchvision", "convnext_tiny", torchvision_convnext, image(32), patches=2),
)


def clip(**vision: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        image = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16}
        text = CLIPTextCfg(context_length=16, vocab_size=64, width=48, heads=4, layers=2)
        return CLIP(32, CLIPVisionCfg(**image | vision), text)

    return make


def both_towers(size: int) -> Callable[[nn.Module, torch.dtype], Tensor]:
    def run(model: Any, dtype: torch.dtype) -> Tensor:
        words = torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(1))
        words[:, 9] = 63  # the end, which is read
        pixels = numbers(2, 3, size, size, dtype=dtype)
        return torch.stack((model.encode_image(pixels), model.encode_text(words)))

    return run


OPEN_CLIP = (
    Row("open_clip", "ViT-B-32", clip(), both_towers(32), attention=4, patches=1),
    Row("open_clip", "ViT with attentional pooling", clip(attentional_pool=True,
        attn_pooler_heads=4, attn_pooler_queries=4), both_towers(32), attention=5, patches=1),
    Row("open_clip", "RN50", clip(image_size=64, layers=(1, 1, 1, 1), width=16, head_width=32),
        both_towers(64), attention=3, patches_left=1, why=(PADDED,)),
)  # fmt: skip


def diffusion(kind: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**config)

    return make


def denoise(*shape: int, prompt: tuple[str, ...] = (), **others: Any):
    """Calls a model with noise, its step, and states of a prompt under the names given."""

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        states = {name: numbers(2, 7, 32, dtype=dtype, seed=5) for name in prompt}
        step = {} if others.get("timestep", True) is None else {"timestep": torch.tensor([3, 7])}
        rest = {k: v(dtype) if callable(v) else v for k, v in others.items() if k != "timestep"}
        return model(numbers(*shape, dtype=dtype), **step, **states, **rest).sample

    return run


PROMPT = ("encoder_hidden_states",)
BLOCKS = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8}
BLOCKS |= {"block_out_channels": (32, 64)}
HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = HEADS | {"sample_size": 8, "patch_size": 2, "in_channels": 4}
TEXT = {"joint_attention_dim": 32, "caption_projection_dim": 32}

DIFFUSERS = (
    Row("diffusers", "UNet2DConditionModel", diffusion("UNet2DConditionModel", **BLOCKS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8),
        denoise(2, 4, 16, 16, prompt=PROMPT), attention=8),
    Row("diffusers", "UNet2DModel", diffusion("UNet2DModel", **BLOCKS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D")), denoise(2, 3, 16, 16), attention=4),
    Row("diffusers", "AutoencoderKL", diffusion("AutoencoderKL", norm_num_groups=8,
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2), denoise(2, 3, 16, 16, timestep=None),
        attention=2),
    Row("diffusers", "DiTTransformer2DModel", diffusion("DiTTransformer2DModel", **LATENTS,
        out_channels=8, norm_num_groups=8), denoise(2, 4, 8, 8, class_labels=torch.tensor([1, 2])),
        attention=2, patches=1),
    Row("diffusers", "PixArtTransformer2DModel", diffusion("PixArtTransformer2DModel", **LATENTS,
        out_channels=8, cross_attention_dim=32, caption_channels=32),
        denoise(2, 4, 8, 8, prompt=PROMPT,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3])),
        attention=4, patches=1),
    Row("diffusers", "SD3Transformer2DModel", diffusion("SD3Transformer2DModel", **LATENTS, **TEXT,
        out_channels=4, pooled_projection_dim=32), denoise(2, 4, 8, 8, prompt=PROMPT,
        pooled_projections=lambda dtype: numbers(2, 32, dtype=dtype, seed=6)),
        attention=2, patches=1),
    Row("diffusers", "CogVideoXTransformer3DModel", diffusion("CogVideoXTransformer3DModel",
        **HEADS, in_channels=4, out_channels=4, patch_size=2, time_embed_dim=8, text_embed_dim=32,
        sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=7),
        denoise(2, 2, 4, 8, 8, prompt=PROMPT), attention=2, patches=1),
    Row("diffusers", "SanaTransformer2DModel", diffusion("SanaTransformer2DModel", in_channels=4,
        **HEADS, sample_size=8, out_channels=4, num_cross_attention_heads=2, caption_channels=32,
        cross_attention_head_dim=16, cross_attention_dim=32), denoise(2, 4, 8, 8, prompt=PROMPT),
        attention=2),
)  # fmt: skip

# These call attention through a registry of functions, of which torch's is the default.
DISPATCHED = (
    Row("diffusers", "FluxTransformer2DModel", diffusion("FluxTransformer2DModel", patch_size=1,
        in_channels=4, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8)), denoise(2, 16, 4, prompt=PROMPT,
        pooled_projections=lambda dtype: numbers(2, 32, dtype=dtype, seed=6),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3)), attention=2),
    Row("diffusers", "WanTransformer3DModel", diffusion("WanTransformer3DModel", num_layers=2,
        num_attention_heads=2, attention_head_dim=12, patch_size=(1, 2, 2), in_channels=4,
        out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, rope_max_seq_len=32),
        denoise(2, 4, 2, 8, 8, prompt=PROMPT), attention=4, patches=1),
    Row("diffusers", "LTXVideoTransformer3DModel", diffusion("LTXVideoTransformer3DModel", **HEADS,
        in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=32),
        denoise(2, 16, 8, prompt=PROMPT, encoder_attention_mask=torch.tensor([[1] * 7, [1] * 4 +
        [0] * 3]), num_frames=1, height=4, width=4), attention=4),
    Row("diffusers", "QwenImageTransformer2DModel", diffusion("QwenImageTransformer2DModel",
        **HEADS, in_channels=16, out_channels=4, patch_size=2, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6)), denoise(2, 16, 16, prompt=PROMPT, img_shapes=[[(1, 4, 4)]] * 2,
        encoder_hidden_states_mask=torch.ones(2, 7, dtype=torch.bool)), attention=2),
)  # fmt: skip

EVERY = TIMM + TORCHVISION + OPEN_CLIP + DIFFUSERS + DISPATCHED


def rows() -> list[tuple[str, str, str, str, str]]:
    """For documentation: library, model, attention and patch embeddings swapped, and why not all.

    The tests hold every row to a report, a parity test and a count of the kernels that run.
    """

    def share(swapped: int, left: int) -> str:
        return f"{swapped} of {swapped + left}" if swapped + left else "none in it"

    return [
        (
            row.library,
            row.name,
            share(row.attention, row.left),
            share(row.patches, row.patches_left),
            "; ".join(row.why),
        )
        for row in EVERY
    ]
