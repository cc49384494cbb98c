"""Training of the codecs, on unlabelled drawings and recordings."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.generators import AudioCodec, Codec, ImageCodec
from mmkernels.training import digits
from mmkernels.training.digits import COLOURS, Digits
from mmkernels.training.speech import SpeechBank


def train_image_codec(
    codec: ImageCodec, images: Digits, *, steps: int, seed: int, batch: int = 64
) -> Iterator[tuple[int, float]]:
    """Learns drawings of digits.

    Args:
        codec: trained in place.
        images: of which drawings are made; their labels are not looked at.
        steps: of the optimizer.
        seed: of all chance.
        batch: drawings of a step.

    Yields:
        (step, loss).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        index = torch.randint(len(images.images), (batch,), generator=generator)
        colours = torch.randint(len(COLOURS), (batch,), generator=generator)
        return digits.drawing(images.images[index], colours).float() / 255

    yield from _train(codec, draw, steps)


def train_audio_codec(
    codec: AudioCodec, bank: SpeechBank, *, steps: int, seed: int, batch: int = 64
) -> Iterator[tuple[int, float]]:
    """Learns recordings; arguments as of `train_image_codec`."""
    generator = torch.Generator().manual_seed(seed)
    frames = codec.config.patch_size[1]

    def draw() -> Tensor:
        index = torch.randint(len(bank.mels), (batch,), generator=generator)
        # One clip's length for all: a sound ends where its codes end, and most of a bank's frames
        # are the silence after that.
        length = int(bank.lengths[index[0]]) // frames * frames
        return bank.mels[index, :length].transpose(1, 2)[:, None]

    yield from _train(codec, draw, steps)


def _train(
    codec: Codec,
    draw: Callable[[], Tensor],
    steps: int,
) -> Iterator[tuple[int, float]]:
    optimizer = torch.optim.AdamW(codec.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    codec.train()
    for step in range(steps):
        x = draw()
        rebuilt = codec(x)
        loss = F.l1_loss(rebuilt, x) + F.mse_loss(rebuilt, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield step, loss.item()
    codec.eval()
