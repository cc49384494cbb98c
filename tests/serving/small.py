"""A model small enough to learn a few answers by heart in a second, and requests for it."""

import base64
import functools
import io
import threading
from typing import Any

import torch

from mmkernels.models import audio
from mmkernels.models.batch import Batch
from mmkernels.models.config import (
    MEL_PATCH,
    CodecConfig,
    DecoderConfig,
    EmbedderConfig,
    ModelConfig,
)
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer

IMAGE_CODES = [code % 15 for code in range(16)]
AUDIO_CODES = [3, 1, 4, 1, 5, 9, 2, 6]
# What a user says -> what the model has learned to answer.
ANSWERS = {
    "hello": [{"type": "text", "text": "Hi. What is your name?"}],
    "count": [{"type": "text", "text": "one two three four five six seven eight nine ten"}],
    "accents": [{"type": "text", "text": "café naïve — 七 🙂"}],
    "draw": [
        {"type": "text", "text": "Here: "},
        {"type": "image_codes", "codes": IMAGE_CODES},
        {"type": "text", "text": " There."},
    ],
    "say": [{"type": "audio_codes", "codes": AUDIO_CODES}],
}


def text_of(question: str) -> str:
    """The text that the model has learned to answer a question with."""
    return "".join(part.get("text", "") for part in ANSWERS[question])


@functools.cache
def model() -> MultimodalModel:
    """Knows `ANSWERS` by heart; whatever an image or a sound is, it says something."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["one two three hello what is your name"], 270)
    image_codec = CodecConfig(3, (8, 8), levels=(3, 5), hidden_size=8, num_layers=1)
    audio_codec = CodecConfig(1, MEL_PATCH, levels=(3, 5), hidden_size=8, num_layers=1)
    config = ModelConfig(
        name="small",
        decoder=DecoderConfig(
            vocab_size=len(tokenizer) + 4 + 15 + 15,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            qk_norm=True,
            max_position_embeddings=512,
        ),
        image=EmbedderConfig(3, (8, 8), hidden_size=32, num_layers=1, num_heads=1),
        audio=EmbedderConfig(1, MEL_PATCH, hidden_size=32, num_layers=1, num_heads=1),
        image_codec=image_codec,
        audio_codec=audio_codec,
    )
    made = MultimodalModel(config, tokenizer)
    rows = [
        [made.document([{"role": "user", "content": said}, {"role": "assistant", "content": told}])]
        for said, told in ANSWERS.items()
    ]
    batch = Batch.of(rows)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(120):
        loss = made.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return made.eval()


class Held:
    """The model, whose every step waits until it is let on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(model(), name)

    def decode(self, *arguments: Any) -> torch.Tensor:
        self.steps += 1
        assert self.go.wait(60)
        return model().decode(*arguments)


def user(*content: object) -> list[dict]:
    """Messages of one user, of texts and parts."""
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return [{"role": "user", "content": parts}]


def png(width: int = 32, height: int = 32) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    picture = Image.new("RGB", (width, height), (10, 10, 10))
    picture.paste((250, 250, 250), (width // 3, height // 4, width // 2, height // 2))
    picture.save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 0.5) -> bytes:
    time = torch.arange(int(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    return audio.write_wav(0.5 * torch.sin(2 * torch.pi * 440 * time))


def image_part(data: bytes | str) -> dict:
    coded = data if isinstance(data, str) else base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}}


def audio_part(data: bytes | str) -> dict:
    coded = data if isinstance(data, str) else base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": coded, "format": "wav"}}
