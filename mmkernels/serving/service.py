"""From a request's body to a conversation in the engine: what client and server have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmkernels.models.chat_format import Document
from mmkernels.serving.answer import Answer, Event
from mmkernels.serving.conversation import messages_of
from mmkernels.serving.engine import Engine, Ticket
from mmkernels.serving.errors import BadRequest
from mmkernels.serving.protocol import Limits, Options, body_of, options_of
from mmkernels.serving.reply import Reply


@dataclass(frozen=True)
class Prepared:
    """A request that can be answered.

    Attributes:
        options: what it asks for besides its messages.
        document: its messages, in tokens.
    """

    options: Options
    document: Document


class Service:
    """An engine that is asked in OpenAI's form.

    Args:
        engine: what answers.
        limits: how large requests may be.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.engine, self.limits = engine, limits or Limits()

    def prepare(self, request: bytes | Mapping[str, Any]) -> Prepared:
        """Checks a request and reads its images and sounds; takes a moment, waits for nothing.

        Args:
            request: its body, as bytes of JSON or as the object that they hold.

        Raises:
            BadRequest: it cannot be answered as it is; the message says why.
        """
        body = body_of(request) if isinstance(request, bytes) else request
        options = options_of(body, self.limits)
        if options.models and self.engine.name not in options.models:
            raise BadRequest(
                f"there is no model {options.models[0]!r} here; there is {self.engine.name!r}",
                "model",
                "model_not_found",
                status=404,
            )
        model = self.engine.model
        if "messages" not in body:
            raise BadRequest("messages is missing; it must be a list of messages", "messages")
        messages = messages_of(body["messages"], model, self.limits)
        document = model.document(messages, add_generation_prompt=True)
        room = self.engine.context - len(document)
        if room < (options.max_tokens or 1):
            asked = f" and {options.max_tokens} of the answer" if options.max_tokens else ""
            raise BadRequest(
                f"the conversation has {len(document)} tokens{asked}; together they may have "
                f"{self.engine.context}. Send less, or ask for fewer",
                "messages",
                "context_length_exceeded",
            )
        sampling = replace(options.sampling, max_tokens=min(options.sampling.max_tokens, room))
        return Prepared(replace(options, sampling=sampling), document)

    def begin(
        self, ticket: Ticket, prepared: Prepared, tell: Callable[[Event | Exception], None]
    ) -> Reply:
        """Lets a request be answered; `tell` is as of `Ticket.begin`, whose errors are raised."""
        model, options = self.engine.model, prepared.options
        answer = Answer(
            model.tokenizer, model.vocabulary, options.sampling, options.stop, options.modalities
        )
        ticket.begin(prepared.document, answer, tell)
        return Reply(model, self.engine.name, len(prepared.document))
