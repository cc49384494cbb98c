"""A random model with everything in it, and conversations of every kind for it."""

import torch
from torch import Tensor

from mmkernels.models.chat_format import Document
from mmkernels.models.config import (
    MEL_PATCH,
    CodecConfig,
    DecoderConfig,
    EmbedderConfig,
    ModelConfig,
)
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer

TEXTS = (
    "What digit do you see? It is a seven.",
    "What do you hear? Someone says four.",
    "How much is that together? Seven plus four is eleven.",
)
LEVELS = (3, 5)


def tokenizer() -> Tokenizer:
    """300 ids, learned from a few sentences."""
    return Tokenizer.train(TEXTS, 300)


def config(text_size: int, *, codecs: bool = True, **changes: object) -> ModelConfig:
    """Sizes of a small model; `changes` are of the whole model's configuration."""
    codes = 15 if codecs else 0
    codec = {"levels": LEVELS, "hidden_size": 8, "num_layers": 1}
    values: dict = {
        "name": "small",
        "decoder": DecoderConfig(
            vocab_size=text_size + (4 + 2 * codes if codecs else 0),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
        ),
        "image": EmbedderConfig(
            3, (8, 8), hidden_size=32, num_layers=1, num_heads=2, mean=0.1, std=0.3
        ),
        "audio": EmbedderConfig(1, MEL_PATCH, hidden_size=32, num_layers=1, num_heads=2),
        "image_codec": CodecConfig(3, (8, 8), **codec) if codecs else None,
        "audio_codec": CodecConfig(1, MEL_PATCH, **codec) if codecs else None,
    }
    return ModelConfig(**{**values, **changes})


def build(*, codecs: bool = True, **changes: object) -> MultimodalModel:
    """A model of seed 0 whose attention and answers are far from uniform, in evaluation mode."""
    torch.manual_seed(0)
    text = tokenizer()
    model = MultimodalModel(config(len(text), codecs=codecs, **changes), text)
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
            if name.endswith("lora_b"):
                parameter.normal_()
    return model.eval()


def image(rows: int = 2, columns: int = 2, seed: int = 0) -> Tensor:
    """uint8 (3, 8 rows, 8 columns)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, 8 * rows, 8 * columns), generator=generator).to(torch.uint8)


def mel(patches: int = 3, seed: int = 0) -> Tensor:
    """A log-mel (4 patches, 40)."""
    return torch.randn(4 * patches, 40, generator=torch.Generator().manual_seed(seed))


def part(content: object) -> dict:
    """A part of a message: of a text, an image (3 dimensions) or a log-mel (2)."""
    if isinstance(content, str):
        return {"type": "text", "text": content}
    assert isinstance(content, Tensor)
    kind = "image" if content.ndim == 3 else "audio"
    return {"type": kind, kind: content}


def user(*content: object) -> dict:
    """A message of a user."""
    return {"role": "user", "content": [part(x) for x in content]}


def assistant(*content: object) -> dict:
    """A message of the assistant; parts that are dicts stay as they are."""
    return {
        "role": "assistant",
        "content": [x if isinstance(x, dict) else part(x) for x in content],
    }


def conversations() -> list[list[dict]]:
    """Text alone; an image; a sound; both in two turns; two images side by side and codes."""
    drawn = {"type": "image_codes", "codes": [code % 15 for code in range(16)]}
    said = {"type": "audio_codes", "codes": [3, 1, 4]}
    return [
        [user("What digit?"), assistant("Seven.")],
        [user(image(2, 3, 1), "What do you see?"), assistant("It is a four.")],
        [user("Hear: ", mel(5, 2)), assistant("Someone says four.")],
        [
            user("See ", image(1, 2, 3), " and hear ", mel(2, 4)),
            assistant("Seven plus four"),
            user(image(3, 1, 5)),
            assistant("is eleven.", said),
        ],
        [user(image(1, 1, 6), image(2, 1, 7), mel(1, 8)), assistant(drawn, "That.")],
    ]


def documents(model: MultimodalModel) -> list[Document]:
    """`conversations` in a model's tokens; those with codes only where it has them."""
    found = conversations() if model.vocabulary.marks else conversations()[:3]
    return [model.document(messages) for messages in found]
