"""The conversations that are answered at the same time: one row of the cache for each."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mmkernels.models.batch import Batch
from mmkernels.models.cache import KVCache
from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.serving.answer import Answer, Event


@dataclass(eq=False)
class Job:
    """One conversation and what hears of its answer.

    Attributes:
        document: the conversation, which ends with the beginning of an answer.
        answer: that answer.
        deadline: the time of `time.monotonic` by which it must be whole.
        tell: called with every event, and with the error where it fails.
        token: the one that was chosen last.
        cancelled: nobody waits for it any more.
    """

    document: Document
    answer: Answer
    deadline: float
    tell: Callable[[Event | Exception], None]
    token: int = field(default=-1, init=False)
    cancelled: bool = field(default=False, init=False)

    def choose(self, logits: torch.Tensor) -> None:
        """Takes the next token and tells what it adds; where that fails, the others go on."""
        try:
            self.token, events = self.answer.next(logits)
        except Exception as error:
            self.tell(error)
            self.cancelled = True
            return
        for event in events:
            self.tell(event)


class Slots:
    """Rows of a cache; those in use are always the first ones.

    Args:
        model: in evaluation mode.
        size: number of rows.
        context: tokens of a conversation with its answer.

    Attributes:
        jobs: the job of each row in use.
    """

    def __init__(self, model: MultimodalModel, size: int, context: int) -> None:
        self.model, self.size, self.context = model, size, context
        self.cache = self._cache(size, context)
        self.jobs: list[Job] = []

    def join(self, jobs: Sequence[Job]) -> None:
        """Reads new conversations and chooses the first token of each; there must be rows free."""
        batch = Batch.of([[job.document] for job in jobs]).to(self.model.device)
        cache = self._cache(len(jobs), batch.ids.shape[1])
        rows = self.model.prefill(batch, cache).float().cpu()
        begin = len(self.jobs)
        self.cache.take(torch.arange(begin, begin + len(jobs), device=self.model.device), cache)
        self.jobs.extend(jobs)
        for job, logits in zip(jobs, rows, strict=True):
            job.choose(logits)

    def step(self) -> None:
        """One more token for every job."""
        count = len(self.jobs)
        # The rows in use as a cache of their own, which shares the memory of the whole.
        view = copy.copy(self.cache)
        view.k, view.v = self.cache.k[:, :count], self.cache.v[:, :count]
        view.lengths, view.adapted = self.cache.lengths[:count], self.cache.adapted[:count]
        ids = torch.tensor([job.token for job in self.jobs], device=self.model.device)
        rows = self.model.decode(ids, view).float().cpu()
        self.cache.lengths[:count] = view.lengths
        for job, logits in zip(self.jobs, rows, strict=True):
            job.choose(logits)

    def leave(self, row: int) -> None:
        """Frees a row; the last one in use takes its place."""
        last = len(self.jobs) - 1
        if row != last:
            filled = int(self.cache.lengths[last])
            for x in (self.cache.k, self.cache.v):
                x[:, row, :filled] = x[:, last, :filled]
            self.cache.lengths[row] = self.cache.lengths[last]
            self.cache.adapted[row] = self.cache.adapted[last]
            self.jobs[row] = self.jobs[last]
        self.jobs.pop()

    def _cache(self, rows: int, context: int) -> KVCache:
        dtype = self.model.decoder.embed_tokens.weight.dtype
        return KVCache(self.model.config.decoder, rows, context, dtype, self.model.device)
