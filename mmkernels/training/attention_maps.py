"""Where an answer looked: attention from its words to the image and the sound that it read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.attention.interval import IntervalMask
from mmkernels.models.batch import Batch
from mmkernels.models.chat_format import Document
from mmkernels.models.kernels import EAGER, eager_attention
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training.examples import Example, Material, make


@torch.no_grad()
def weights(model: MultimodalModel, document: Document) -> Tensor:
    """Attention of the decoder over a document: (layers, heads, tokens, tokens)."""
    found: list[Tensor] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5
        scores = scores.float().masked_fill(~mask.to_dense()[:, None], -torch.inf)
        if scores.shape[-1] == len(document):  # of the decoder, not of a tower
            found.append(scores.softmax(-1)[0])
        return eager_attention(q, k, v, mask)

    with _kernels(model, EAGER._replace(attention=recorded)):
        model.hidden(Batch.of([[document]]).to(model.device))
    return torch.stack(found[-model.config.decoder.num_hidden_layers :])


@contextmanager
def _kernels(model: MultimodalModel, kernels: Any) -> Iterator[None]:
    before, model.kernels = model.kernels, kernels
    try:
        yield
    finally:
        model.kernels = before


def plot(model: MultimodalModel, material: Material, path: Path, count: int = 3) -> None:
    """Sums: for each word of the answer, what it looked at, over the picture and the sound.

    A row is one question: the picture, the spectrogram, then the attention of the words for the
    digit seen, the digit heard and their sum, mean over layers and heads.
    """
    from matplotlib.figure import Figure

    examples = make(["sum"] * count, material, torch.Generator().manual_seed(7))
    figure = Figure(figsize=(11, 2.6 * count), layout="constrained")
    grid = figure.subplots(count, 8, squeeze=False)
    for row, example in zip(grid, examples, strict=True):
        _row(row, model, example)
    figure.savefig(path, dpi=110)


def _row(row: Any, model: MultimodalModel, example: Example) -> None:
    document = model.document(example.messages)
    mean = weights(model, document).mean((0, 1)).cpu()
    ids = torch.tensor(document.ids)
    seen = (ids == model.vocabulary.image_patch).nonzero()[:, 0]
    heard = (ids == model.vocabulary.audio_patch).nonzero()[:, 0]
    image, mel = document.images[0], document.audios[0][0]
    row[0].imshow(image.permute(1, 2, 0))
    row[0].set_title(example.answer[0]["text"], fontsize=8, loc="left")
    row[1].imshow(mel, origin="lower", aspect="auto")
    words = example.answer[0]["text"].split()
    # What is attended to while a word is chosen: the token before it looks.
    places = _places(model, document, (words[0], words[2], words[4].rstrip(".")))
    for column, place in enumerate(places):
        picture, sound = row[2 + 2 * column], row[3 + 2 * column]
        patches = mean[place, seen].view(1, 1, image.shape[1] // 8, image.shape[2] // 8)
        picture.imshow(image.permute(1, 2, 0), alpha=0.35)
        picture.imshow(torch.nn.functional.interpolate(patches, scale_factor=8)[0, 0], alpha=0.65)
        picture.set_title(f"for “{(words[0], words[2], words[4])[column]}”", fontsize=8)
        sound.bar(range(len(heard)), mean[place, heard])
        sound.set_xlabel("40 ms each", fontsize=7)
    for axes in row:
        axes.set_xticks([])
        axes.set_yticks([])


def _places(model: MultimodalModel, document: Document, words: tuple[str, ...]) -> list[int]:
    """For each word, looked up in their order, the token from which it is predicted."""
    place, found = document.learned.index(True), []
    for word in words:
        while not word.startswith(
            model.tokenizer.decode(document.ids[place : place + 1]).strip()[:3] or "?"
        ):
            place += 1
        found.append(place - 1)
        place += 1
    return found
