"""Pretraining on unlabelled text, images and sound: the next token over all of them.

Beside documents of one kind there are those that show an image or a sound and go on with the codes
of its clean form. They need no label, and teach the embedders before any question is asked.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.models.chat_format import Document, add_audio, add_codes, add_image
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import digits as seen
from mmkernels.training import speech
from mmkernels.training.digits import COLOURS
from mmkernels.training.examples import Material

# Kind of document -> its share.
SHARES = {"text": 0.1, "image": 0.1, "audio": 0.1, "seen": 0.45, "heard": 0.25}


@dataclass
class Pretraining:
    """Documents of a pretraining stage; an instance is a stage's `documents`.

    Attributes:
        model: whose tokenizer, vocabulary and codecs are used.
        material: images, recordings and their codes.
        text: (tokens,) a corpus.
        seed: of all chance.
        count: documents of a micro-batch.
        text_tokens: tokens of a document of text.
    """

    model: MultimodalModel
    material: Material
    text: Tensor
    seed: int
    count: int = 64
    text_tokens: int = 64

    def __call__(self, step: int, micro: int) -> list[Document]:
        """The documents of a micro-batch."""
        generator = seeded(self.seed, step, micro)
        shares = torch.tensor(list(SHARES.values()))
        kinds = torch.multinomial(shares, self.count, replacement=True, generator=generator)
        counts = kinds.bincount(minlength=len(SHARES)).tolist()
        documents = []
        for make, count in zip(_MAKERS, counts, strict=True):
            documents += make(self, count, generator)
        return documents


def seeded(seed: int, step: int, micro: int) -> torch.Generator:
    """A generator of its own for each micro-batch of each step."""
    # Of a seed a generator takes the lowest 32 bits alone, so all three have to be mixed into them.
    mixed = hashlib.sha256(f"{seed} {step} {micro}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:4], "little"))


def _text(of: Pretraining, count: int, generator: torch.Generator) -> list[Document]:
    begins = torch.randint(len(of.text) - of.text_tokens, (count,), generator=generator)
    documents = []
    for begin in begins.tolist():
        document = Document()
        document.add(of.text[begin : begin + of.text_tokens].tolist(), True)
        documents.append(document)
    return documents


def _images(of: Pretraining, count: int, generator: torch.Generator) -> list[Document]:
    return [_coded(of, "image_codes", codes) for codes in _drawings(of, count, generator)[0]]


def _sounds(of: Pretraining, count: int, generator: torch.Generator) -> list[Document]:
    return [_coded(of, "audio_codes", codes) for codes in _sayings(of, count, generator)[0]]


def _seen(of: Pretraining, count: int, generator: torch.Generator) -> list[Document]:
    """Pictures, each followed by the codes of a clean drawing of it.

    A digit fills its picture as it fills the drawing, so each code is that of one patch: what to
    look at is soon found, and with it what a patch shows.
    """
    if not count:
        return []
    codes, rows, colours = _drawings(of, count, generator)
    pictures = seen.render_whole(of.material.digits.images[rows], colours, generator=generator)
    documents = []
    for picture, drawn in zip(pictures, codes, strict=True):
        document = Document()
        add_image(document, of.model.vocabulary, picture, of.model.config.image.patch_size)
        add_codes(document, of.model.vocabulary, "image_codes", drawn, True)
        documents.append(document)
    return documents


def _heard(of: Pretraining, count: int, generator: torch.Generator) -> list[Document]:
    """Sounds as another voice and room make them, each followed by the codes of the recording."""
    if not count:
        return []
    codes, index = _sayings(of, count, generator)
    bank = of.material.speech
    mels, lengths = speech.augment(bank.mels[index], bank.lengths[index], generator)
    documents = []
    for mel, length, said in zip(mels, lengths.tolist(), codes, strict=True):
        document = Document()
        add_audio(document, of.model.vocabulary, mel[:length])
        add_codes(document, of.model.vocabulary, "audio_codes", said, True)
        documents.append(document)
    return documents


def _drawings(
    of: Pretraining, count: int, generator: torch.Generator
) -> tuple[list[list[int]], Tensor, Tensor]:
    assert of.material.drawings is not None
    rows = torch.randint(len(of.material.digits.labels), (count,), generator=generator)
    colours = torch.randint(len(COLOURS), (count,), generator=generator)
    return of.material.drawings[rows, colours].tolist(), rows, colours


def _sayings(
    of: Pretraining, count: int, generator: torch.Generator
) -> tuple[list[list[int]], Tensor]:
    assert of.material.sayings is not None
    index = torch.randint(len(of.material.sayings), (count,), generator=generator)
    return [list(of.material.sayings[i]) for i in index.tolist()], index


def _coded(of: Pretraining, kind: str, codes: list[int]) -> Document:
    document = Document()
    add_codes(document, of.model.vocabulary, kind, codes, True)
    return document


# In the order of SHARES.
_MAKERS: tuple[Callable[[Pretraining, int, torch.Generator], list[Document]], ...] = (
    _text, _images, _sounds, _seen, _heard,
)  # fmt: skip
