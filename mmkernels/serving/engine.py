"""Continuous batching: one thread owns the model and answers many conversations at once.

Conversations join the running batch as soon as a row is free, and leave it when they are done; no
one waits for the longest answer. What an answer says does not depend on what runs beside it.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models",
OSDI 2022.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.serving.answer import Answer, Event
from mmkernels.serving.errors import Closing, Overloaded, ServingError, TimedOut
from mmkernels.serving.slots import Job, Slots

LOG = logging.getLogger("mmkernels.serving")
# New conversations are read at most so many tokens at a time, so that running answers go on.
PREFILL_TOKENS = 2048


class Engine:
    """Answers conversations; safe to call from any thread.

    Args:
        model: in evaluation mode; nothing else may use it while the engine lives.
        name: the model's, as requests say it.
        slots: conversations that are answered at the same time.
        queue: those that may wait beside them.
        context: tokens of a conversation with its answer; None: at most 1024.
        timeout: seconds that an answer may take, from its admission.

    Raises:
        ValueError: a number is not positive, or context is beyond the model's longest sequence.
    """

    def __init__(
        self,
        model: MultimodalModel,
        *,
        name: str | None = None,
        slots: int = 32,
        queue: int = 128,
        context: int | None = None,
        timeout: float = 120.0,
    ) -> None:
        longest = model.config.decoder.max_position_embeddings
        context = min(1024, longest) if context is None else context
        for what, value in (("slots", slots), ("context", context), ("timeout", timeout)):
            if value <= 0:
                raise ValueError(f"Engine: {what} is {value}; it must be positive")
        if queue < 0:
            raise ValueError(f"Engine: queue is {queue}; it must be 0 or more")
        self.model, self.name = model, name or model.config.name
        self.slots, self.queue, self.context, self.timeout = slots, queue, context, timeout
        self._slots = Slots(model, slots, context)
        self._waiting: collections.deque[Job] = collections.deque()
        self._admitted = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mmkernels-engine", daemon=True)
        self._thread.start()

    def admit(self) -> "Ticket":
        """A place for one conversation; close it when its answer is not wanted any more.

        Raises:
            Overloaded: all places are taken.
            Closing: the engine is shutting down.
        """
        with self._wake:
            if self._closing:
                raise Closing("the server is shutting down", code="shutting_down")
            if self._admitted >= self.slots + self.queue:
                raise Overloaded(
                    f"{self._admitted} requests are being answered or waiting, which is the most; "
                    "try again soon",
                    code="overloaded",
                )
            self._admitted += 1
        return Ticket(self)

    def stats(self) -> dict[str, Any]:
        """Numbers of conversations: "running", "waiting", "admitted"; and how many there may be."""
        with self._wake:
            return {
                "running": len(self._slots.jobs),
                "waiting": len(self._waiting),
                "admitted": self._admitted,
                "slots": self.slots,
                "queue": self.queue,
            }

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Fails what is still being answered, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _enter(self, job: Job) -> None:
        with self._wake:
            if self._closing:
                raise Closing("the server is shutting down", code="shutting_down")
            self._waiting.append(job)
            self._wake.notify_all()

    def _release(self) -> None:
        with self._wake:
            self._admitted -= 1

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._waiting or self._slots.jobs):
                    self._wake.wait()
                if self._closing:
                    break
                joining = self._next_to_join()
            self._advance(joining)
        jobs = [*self._slots.jobs, *self._waiting]
        self._fail(jobs, Closing("the server shut down before the answer was whole"))
        self._slots.jobs.clear()
        self._waiting.clear()

    def _next_to_join(self) -> list[Job]:
        self._sweep_waiting()
        joining: list[Job] = []
        free = self._slots.size - len(self._slots.jobs)
        longest = 0
        while self._waiting and len(joining) < free:
            longest = max(longest, len(self._waiting[0].document))
            if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _sweep_waiting(self) -> None:
        """Drops those that nobody waits for, and those that have waited too long."""
        now = time.monotonic()
        late = [job for job in self._waiting if now > job.deadline]
        self._fail(late, self._too_late())
        gone = {job for job in self._waiting if job.cancelled} | set(late)
        if gone:
            self._waiting = collections.deque(job for job in self._waiting if job not in gone)

    def _advance(self, joining: list[Job]) -> None:
        if self._slots.jobs:
            try:
                self._slots.step()
            except Exception as error:  # those in the batch fail; the engine goes on
                self._fail(self._slots.jobs, error)
                self._slots.jobs.clear()
        if joining:
            self._join(joining)
        now = time.monotonic()
        for row in reversed(range(len(self._slots.jobs))):
            job = self._slots.jobs[row]
            if not job.answer.done and not job.cancelled and now > job.deadline:
                self._fail([job], self._too_late())
                job.cancelled = True
            if job.answer.done or job.cancelled:
                self._slots.leave(row)

    def _join(self, jobs: list[Job]) -> None:
        """Adds jobs to the batch; where one cannot be read, the others are."""
        begin = len(self._slots.jobs)
        try:
            self._slots.join(jobs)
        except Exception as error:
            del self._slots.jobs[begin:]
            if len(jobs) == 1:
                self._fail(jobs, error)
                return
            for job in jobs:
                self._join([job])

    def _too_late(self) -> TimedOut:
        return TimedOut(
            f"the answer was not whole after {self.timeout:g} seconds; ask for fewer tokens, or "
            "try again when fewer others ask",
            code="timeout",
        )

    @staticmethod
    def _fail(jobs: "collections.abc.Iterable[Job]", error: Exception) -> None:
        for job in jobs:
            job.tell(error)


class Ticket:
    """A place in an engine, for one conversation.

    Args:
        engine: whose.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deadline = time.monotonic() + engine.timeout
        self._job: Job | None = None
        self._open = True

    def begin(
        self, document: Document, answer: Answer, tell: Callable[[Event | Exception], None]
    ) -> None:
        """Lets the conversation be answered.

        Args:
            document: it; must fit into the engine's context with the answer.
            answer: what is to be made.
            tell: is called from the engine's thread with every event, the last of which is an `End`
                or an exception. It must not block. If it raises, the answer is given up.

        Raises:
            Closing: the engine is shutting down.
        """

        def safely(event: Event | Exception) -> None:
            if not job.cancelled:
                try:
                    tell(event)
                except Exception:  # who asked is gone
                    job.cancelled = True

        job = self._job = Job(document, answer, self.deadline, safely)
        self.engine._enter(job)

    def close(self) -> None:
        """Gives the place back; an answer that is still being made is given up."""
        if self._open:
            self._open = False
            if self._job is not None:
                self._job.cancelled = True
            self.engine._release()

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_serving_error(error: Exception) -> ServingError:
    """An error as one that can be told to whoever asked; what it does not tell is logged."""
    if isinstance(error, ServingError):
        return error
    LOG.error("the model failed", exc_info=error)
    return ServingError("the model failed; the server's log says how", code="model_error")
