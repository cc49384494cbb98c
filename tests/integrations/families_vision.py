"""Encoders of images, alone or beside one of text, and of sound."""

from typing import Any

import torch
from torch import Tensor

from tests.integrations.families_text import config
from tests.integrations.family import Family, Inputs, Served, numbers, padding, tokens

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = {"image_size": 32, "patch_size": 8}  # 16 patches
WORDS = SMALL | {"vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0}
WORDS |= {"bos_token_id": 1, "eos_token_id": 2}


def images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return numbers(batch, 3, height, width)


def pair(name: str, vision: Any = IMAGE, **options: Any) -> Any:
    """The configuration of a model of text and images."""
    return config(name, text_config=WORDS, vision_config=SMALL | vision, **options)


def both_embeddings(outputs: Any) -> Tensor:
    return torch.stack((outputs.image_embeds, outputs.text_embeds))


def naflex() -> Inputs:
    """Patches of images of mixed size, cut out and padded to one number."""
    return {
        "input_ids": tokens(),
        "pixel_values": numbers(2, 16, 8 * 8 * 3),
        "pixel_attention_mask": padding("right", (16, 6), 16),
        "spatial_shapes": torch.tensor([[4, 4], [2, 3]]),
    }


def cut_images() -> Inputs:
    """Two images padded to one size; Pixtral cuts the padding off and packs the rest."""
    return {"pixel_values": images(2, 32, 48), "image_sizes": torch.tensor([[32, 48], [24, 16]])}


def speech() -> Inputs:
    return {"input_values": numbers(2, 400), "attention_mask": padding("right", (400, 250), 400)}


PHOTO = {"images": lambda: {"pixel_values": images()}}
CAPTIONED = {
    "images": lambda: {"input_ids": tokens(), "pixel_values": images()},
    "right padding": lambda: {
        "input_ids": tokens(),
        "attention_mask": padding("right"),
        "pixel_values": images(),
    },
}

VISION_FAMILIES = [
    Family(
        "ViT",
        "ViTForImageClassification",
        config("ViT", **SMALL, **IMAGE, num_labels=10),
        PHOTO
        | {
            "larger images": lambda: {
                "pixel_values": images(2, 40, 56),
                "interpolate_pos_encoding": True,
            }
        },
        Served(2, patches=1),
    ),
    Family(
        "CLIP",
        "CLIPModel",
        pair("CLIP", projection_dim=16),
        CAPTIONED,
        Served(4, patches=1),
        output=both_embeddings,
    ),
    Family(
        "SigLIP",
        "SiglipModel",
        pair("Siglip"),
        CAPTIONED,
        Served(4, left=1, patches=1),
        output=both_embeddings,
    ),
    Family(
        "SigLIP 2, NaFlex",
        "Siglip2Model",
        pair("Siglip2", vision={"patch_size": 8, "num_patches": 16}),
        {"mixed sizes": naflex},
        Served(4, left=1),
        output=both_embeddings,
    ),
    Family(
        "DINOv2",
        "Dinov2Model",
        config("Dinov2", **SMALL, **IMAGE),
        PHOTO | {"larger images": lambda: {"pixel_values": images(2, 40, 56)}},
        Served(2, patches=1),
    ),
    Family(
        "DINOv3 ViT",
        "DINOv3ViTModel",
        config("DINOv3ViT", **SMALL, **IMAGE, num_register_tokens=4),
        PHOTO,
        Served(2, patches=1),
    ),
    Family(
        "Pixtral",
        "PixtralVisionModel",
        config("PixtralVision", **SMALL, image_size=48, patch_size=8, head_dim=16),
        PHOTO | {"mixed sizes": cut_images},
        Served(2, patches=1),
    ),
    Family(
        "AST",
        "ASTForAudioClassification",
        config(
            "AST", **SMALL, patch_size=8, frequency_stride=5, time_stride=5, max_length=32,
            num_mel_bins=16, num_labels=10,
        ),
        {"spectrogram": lambda: {"input_values": numbers(2, 32, 16)}},
        Served(2, patches=1),
    ),
    Family(
        "Wav2Vec2",
        "Wav2Vec2Model",
        config(
            "Wav2Vec2", **SMALL, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
            feat_extract_norm="layer", vocab_size=128,
        ),
        {"plain": lambda: {"input_values": numbers(2, 400)}, "right padding": speech},
        Served(2, patches_left=1),
    ),
]  # fmt: skip
