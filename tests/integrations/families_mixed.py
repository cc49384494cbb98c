"""Models that read images or sound together with text."""

from typing import Any

import torch
import transformers

from tests.integrations.families_text import ALTERNATING, TEXT, WINDOW
from tests.integrations.families_vision import IMAGE, SMALL, images
from tests.integrations.family import Family, Inputs, Served, numbers, tokens

PLACEHOLDER = 3  # stands where a token of an image goes


def dialogue(*images_in_row: list[int], padded: bool = False) -> Inputs:
    """Rows of text around images of the given numbers of tokens.

    Args:
        *images_in_row: for each row, the tokens of each of its images; alike in sum.
        padded: every row but the first begins with three tokens of padding.
    """
    ids = []
    for row, sizes in enumerate(images_in_row):
        pieces = [tokens(1, 4, seed=row)[0]]
        for index, size in enumerate(sizes):
            pieces += [torch.full((size,), PLACEHOLDER), tokens(1, 3, seed=10 * row + index)[0]]
        ids.append(torch.cat(pieces))
    real = torch.ones(len(ids), len(ids[0]), dtype=torch.long)
    if padded:
        real[1:, :3] = 0
    input_ids = torch.stack(ids).masked_fill(real == 0, 0)
    return {"input_ids": input_ids, "attention_mask": real}


def seen(padded: bool = False, tokens_of_image: int = 16, **more: Any) -> Inputs:
    """A batch of two, with an image each."""
    return (
        dialogue([tokens_of_image], [tokens_of_image], padded=padded)
        | {"pixel_values": images()}
        | more
    )


def both(make: Any) -> dict[str, Any]:
    return {"images": make, "images, left padding": lambda: make(padded=True)}


def typed(padded: bool = False) -> Inputs:
    """Gemma 3: the tokens of an image see each other."""
    inputs = seen(padded, tokens_of_image=4)
    return inputs | {"token_type_ids": (inputs["input_ids"] == PLACEHOLDER).long()}


def prefixed(padded: bool = False) -> Inputs:
    """PaliGemma: all but the last two tokens are the prefix. Transformers 4 asks for labels."""
    inputs = seen(padded)
    suffix = torch.zeros_like(inputs["input_ids"])
    suffix[:, -2:] = 1
    return inputs | {"token_type_ids": suffix, "labels": inputs["input_ids"].clone()}


def framed(padded: bool = False) -> Inputs:
    """Idefics 3: an axis of images; the lower half of the second is padding."""
    inputs = seen(padded, tokens_of_image=4)
    shown = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    shown[1, :, 16:] = False
    return inputs | {
        "pixel_values": inputs["pixel_values"][:, None],
        "pixel_attention_mask": shown,
    }


def qwen(padded: bool = False) -> Inputs:
    """Images of mixed size, two of them in one row."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 6]])
    inputs = dialogue([4, 4], [11], padded=padded)
    # Of the second row eleven placeholders only six are an image's, the others are text.
    ids = inputs["input_ids"]
    ids[1, 10:15] = tokens(1, 5, seed=7)[0]
    kinds = (ids == PLACEHOLDER).int()
    extra = {"mm_token_type_ids": kinds} if transformers.__version__ >= "5" else {}
    patches = numbers(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    return inputs | {"pixel_values": patches, "image_grid_thw": grid} | extra


def listened() -> Inputs:
    return {"input_features": numbers(2, 8, 32), "decoder_input_ids": tokens(length=9)}


def composite(name: str, text: Any, vision: Any, **options: Any) -> Any:
    """The configuration of a model made of two."""
    return lambda: getattr(transformers, name + "Config")(
        text_config=text(), vision_config=vision(), **options
    )


def siglip() -> Any:
    return transformers.SiglipVisionConfig(**SMALL, **IMAGE, vision_use_head=False)


def qwen_config(name: str, **vision: Any) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    vision |= {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2}
    text = TEXT | {"rope_scaling": rope}
    return lambda: getattr(transformers, name + "Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=PLACEHOLDER,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )


MIXED_FAMILIES = [
    Family(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        composite(
            "Gemma3",
            lambda: transformers.Gemma3TextConfig(
                **TEXT, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=4
            ),
            siglip,
            mm_tokens_per_image=4,
            image_token_index=PLACEHOLDER,
        ),
        both(typed),
        Served(4, patches=1),
    ),
    Family(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        composite(
            "PaliGemma",
            lambda: transformers.GemmaConfig(**TEXT),
            lambda: transformers.SiglipVisionConfig(
                **SMALL, **IMAGE, vision_use_head=False, projection_dim=64
            ),
            image_token_index=PLACEHOLDER,
            projection_dim=64,
        ),
        both(prefixed),
        Served(4, patches=1),
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        composite(
            "Llava",
            lambda: transformers.LlamaConfig(**TEXT),
            lambda: transformers.CLIPVisionConfig(**SMALL, **IMAGE),
            image_token_index=PLACEHOLDER,
            vision_feature_layer=-1,
        ),
        both(seen),
        Served(4, patches=1),
    ),
    *(
        Family(
            name,
            f"{model}ForConditionalGeneration",
            composite(
                model,
                lambda: transformers.LlamaConfig(**TEXT),
                lambda kind=model: getattr(transformers, kind + "VisionConfig")(**SMALL, **IMAGE),
                image_token_id=PLACEHOLDER,
                scale_factor=2,
            ),
            both(framed),
            Served(4, patches=1),
        )
        for name, model in (("Idefics 3", "Idefics3"), ("SmolVLM", "SmolVLM"))
    ),
    Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        qwen_config("Qwen2VL", embed_dim=32, hidden_size=64),
        both(qwen),
        Served(4, patches=1),
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        qwen_config(
            "Qwen2_5_VL", hidden_size=32, out_hidden_size=64, intermediate_size=48,
            window_size=16, fullatt_block_indexes=[1],
        ),
        both(qwen),
        Served(4, patches=1),
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            vocab_size=128, num_mel_bins=8, d_model=64, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_source_positions=16, max_target_positions=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        {"plain": listened},
        Served(6),
        generates=lambda: {"input_features": numbers(2, 8, 32)},
    ),
]  # fmt: skip
