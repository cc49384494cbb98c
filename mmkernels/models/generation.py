"""Answers, token by token: what may come next, sampling, and batches of conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.models.batch import Batch
from mmkernels.models.cache import KVCache
from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Vocabulary

__all__ = ["Sampling", "generate", "stream"]

# Codes of an image: 4 × 4 patches of 8 × 8 pixels.
IMAGE_CODES = 16
# A sound ends after 1.6 seconds at the latest.
MAX_AUDIO_CODES = 40


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: most tokens of an answer.
        temperature: of text; 0 takes the likeliest token.
        media_temperature: of the codes of images and sounds, of which the likeliest are no good.
        top_k: only that many of the likeliest; 0: all.
        top_p: only the likeliest that together have this probability.
        seed: of this answer; the same seed and conversation give the same answer.

    Raises:
        ValueError: a number is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    media_temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        for name, least, most in (
            ("max_tokens", 1, 1 << 20),
            ("temperature", 0.0, 10.0),
            ("media_temperature", 0.0, 10.0),
            ("top_k", 0, 1 << 20),
            ("top_p", 1e-9, 1.0),
            ("seed", -(1 << 63), (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must lie in [{least:g}, {most:g}]")


class Grammar:
    """What may come next in one answer: text, or the codes of an image or a sound.

    Args:
        vocabulary: that of the model.
        end: the id that ends an answer.
    """

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        self.vocabulary, self.end = vocabulary, end
        self.open: int | None = None  # the mark of the image or sound that is being made
        self.codes = 0
        self.ended = False

    def ranges(self) -> list[tuple[int, int]]:
        """The ids that may come next, as half-open ranges."""
        v = self.vocabulary
        if self.open is None:
            text = [(0, v.text_size)]
            starts = ((v.image_start, v.image_codes), (v.audio_start, v.audio_codes))
            return text + [(start, start + 1) for start, codes in starts if codes]
        if self.open == v.image_start:
            if self.codes == IMAGE_CODES:
                return [(v.image_end, v.image_end + 1)]
            return [(v.first_image_code, v.first_image_code + v.image_codes)]
        end = [(v.audio_end, v.audio_end + 1)]
        codes = [(v.first_audio_code, v.first_audio_code + v.audio_codes)]
        if self.codes == 0:
            return codes
        return end if self.codes == MAX_AUDIO_CODES else codes + end

    def advance(self, token: int) -> None:
        """Takes note of the token that was chosen."""
        v = self.vocabulary
        if self.open is not None:
            if token in (v.image_end, v.audio_end):
                self.open = None
            else:
                self.codes += 1
        elif v.marks and token in (v.image_start, v.audio_start):
            self.open, self.codes = token, 0
        self.ended = token == self.end


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        grammar: what may come next.
        sampling: how.
    """

    def __init__(self, grammar: Grammar, sampling: Sampling) -> None:
        self.grammar, self.sampling = grammar, sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.count = 0

    @property
    def done(self) -> bool:
        """Whether the answer has ended, or is as long as it may be."""
        return self.grammar.ended or self.count >= self.sampling.max_tokens

    def choose(self, logits: Tensor) -> int:
        """The next token, by its logits (V,) on the CPU."""
        sampling = self.sampling
        allowed = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        for begin, end in self.grammar.ranges():
            allowed[begin:end] = logits[begin:end].float()
        media = self.grammar.open is not None
        temperature = sampling.media_temperature if media else sampling.temperature
        if temperature:
            # In float64 with the largest at 0, so that no temperature is too low.
            token = self._sample((allowed - allowed.max()).double() / temperature)
        else:
            token = int(allowed.argmax())
        self.grammar.advance(token)
        self.count += 1
        return token

    def _sample(self, logits: Tensor) -> int:
        sampling = self.sampling
        if 0 < sampling.top_k < len(logits):
            least = logits.topk(sampling.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities, order = logits.softmax(0).sort(descending=True, stable=True)
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= sampling.top_p] = 0.0
        return int(order[torch.multinomial(probabilities, 1, generator=self.generator)])


def stream(
    model: MultimodalModel, prompts: Sequence[Document], samplings: Sequence[Sampling]
) -> Iterator[list[int | None]]:
    """Answers several conversations at once.

    Args:
        model: in evaluation mode.
        prompts: conversations that end with the beginning of an answer.
        samplings: one for each.

    Yields:
        The next token of each answer; None where it has ended. The mark that ends it is the last.

    Raises:
        ValueError: there is no prompt, not one sampling for each, or a prompt with its answer is
            longer than the model's longest sequence.
    """
    if not prompts or len(prompts) != len(samplings):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(samplings)} samplings; there must be one "
            "sampling for each prompt, and at least one prompt"
        )
    batch = Batch.of([[prompt] for prompt in prompts]).to(model.device)
    most = max(sampling.max_tokens for sampling in samplings)
    dtype = model.decoder.embed_tokens.weight.dtype
    capacity = batch.ids.shape[1] + most
    longest = model.config.decoder.max_position_embeddings
    if capacity > longest:
        raise ValueError(
            f"a prompt has {batch.ids.shape[1]} tokens and an answer may have {most}; together at "
            f"most {longest} fit into the model. Shorten the prompt or lower max_tokens"
        )
    cache = KVCache(model.config.decoder, len(prompts), capacity, dtype, model.device)
    choosers = [
        Chooser(Grammar(model.vocabulary, model.tokenizer.end), sampling) for sampling in samplings
    ]
    logits = model.prefill(batch, cache)
    while True:
        rows = logits.cpu()
        column = [
            None if chooser.done else chooser.choose(row)
            for chooser, row in zip(choosers, rows, strict=True)
        ]
        yield column
        if all(chooser.done for chooser in choosers):
            return
        logits = model.decode(
            torch.tensor([token or 0 for token in column], device=model.device), cache
        )


def generate(
    model: MultimodalModel, prompts: Sequence[Document], samplings: Sequence[Sampling]
) -> list[list[int]]:
    """Answers several conversations at once.

    Args:
        model: as of `stream`.
        prompts: likewise.
        samplings: likewise.

    Returns:
        The tokens of each answer, without the mark that ends it.

    Raises:
        ValueError: as of `stream`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for column in stream(model, prompts, samplings):
        for answer, token in zip(answers, column, strict=True):
            if token is not None and token != model.tokenizer.end:
                answer.append(token)
    return answers
