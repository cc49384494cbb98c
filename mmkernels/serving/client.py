"""Chat from Python, in the shape of OpenAI's chat completions: in process, or with a server.

from mmkernels.serving.client import Client

client = Client()
answer = client.chat(messages=[{"role": "user", "content": "What is four plus nine?"}])
print(answer["choices"][0]["message"]["content"])
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from mmkernels.serving import remote
from mmkernels.serving.engine import Engine, as_serving_error
from mmkernels.serving.load import open_model
from mmkernels.serving.parts import plain
from mmkernels.serving.protocol import Limits
from mmkernels.serving.service import Prepared, Service

__all__ = ["Client"]

Message = Mapping[str, Any]


class Client:
    """Asks a model in this process, or one behind a server.

    A model in this process is loaded when it is first asked; one client may be asked from many
    threads, whose conversations are then answered together.

    Args:
        model: name or folder of the model; None: the one that comes with the package, or that of
            the server.
        base_url: a server's address, as "http://127.0.0.1:8000"; None: ask in this process.
        api_key: what the server wants to see.
        timeout: seconds that an answer may take.
        limits: how large requests in this process may be.

    Raises:
        ValueError: base_url is no http address.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.timeout, self.limits = model, timeout, limits
        self._server = remote.Server(base_url, api_key, timeout) if base_url else None
        self._services: dict[str, Service] = {}
        self._loading = threading.Lock()

    @overload
    def chat(
        self,
        *,
        messages: Sequence[Message],
        model: str | Path | None = None,
        models: str | Sequence[str] | None = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> dict[str, Any]: ...

    @overload
    def chat(
        self,
        *,
        messages: Sequence[Message],
        model: str | Path | None = None,
        models: str | Sequence[str] | None = None,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[dict[str, Any]]: ...

    def chat(
        self,
        *,
        messages: Sequence[Message],
        model: str | Path | None = None,
        models: str | Sequence[str] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Asks for an answer.

        Args:
            messages: dicts with "role" and "content", a text or a list of parts: {"type": "text",
                "text": str}, OpenAI's "image_url" (a data URI) and "input_audio", and for
                convenience {"type": "image", "image": x} and {"type": "audio", "audio": x}, where x
                is what `parts.image_bytes` and `parts.audio_bytes` take: a path, bytes, a tensor...
            model: name or folder of the model; None: the client's.
            models: in its place, a name, or several of which the first that is there answers.
            stream: give chunks as they come.
            options: temperature, media_temperature, top_k, top_p, max_tokens, seed, stop,
                modalities, stream_options: as of a request to the server.

        Returns:
            The answer, with ["choices"][0]["message"]["content"], and where the model drew or spoke
            ["images"] and ["audio"] in the message; with `stream` an iterator of chunks.

        Raises:
            BadRequest: the request cannot be answered as it is; the message says why.
            ServingError: it could be, but was not: `Overloaded`, `TimedOut` and others.
            ValueError: there is no such model, or an image or a sound is nothing of the kind.
            TypeError: likewise of a type.
        """
        if model is not None and models is not None:
            raise ValueError("model and models are both given; give one of them")
        body = {**options, "messages": plain(messages), "stream": stream}
        wanted = models if models is not None else model if model is not None else self.model
        if self._server is not None:
            if wanted is not None:
                body["models" if not isinstance(wanted, str | Path) else "model"] = _names(wanted)
            return self._server.stream(body) if stream else self._server.ask(body)
        with self._loading:
            service = self._service(wanted)
        prepared = service.prepare(body)
        return _stream(service, prepared) if stream else _ask(service, prepared)

    def load(self) -> None:
        """Loads a model of this process now, so that the first answer need not wait for it.

        Raises:
            ValueError: there is no such model.
        """
        if self._server is None:
            with self._loading:
                self._service(self.model)

    def close(self) -> None:
        """Ends what runs in this process; a later question starts it anew."""
        while self._services:
            self._services.popitem()[1].engine.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _service(self, wanted: str | Path | Sequence[str] | None) -> Service:
        names = [wanted] if wanted is None or isinstance(wanted, str | Path) else list(wanted)
        for name in names:
            if str(name) in self._services:
                return self._services[str(name)]
        errors = []
        for name in names:
            try:
                title, model = open_model(name)
            except ValueError as error:
                errors.append(error)
                continue
            engine = Engine(model, name=title, timeout=self.timeout)
            self._services[str(name)] = Service(engine, self.limits)
            return self._services[str(name)]
        raise errors[0] if errors else ValueError("models is empty; it must name a model")


def _names(wanted: str | Path | Sequence[str]) -> str | list[str]:
    return str(wanted) if isinstance(wanted, str | Path) else [str(name) for name in wanted]


def _stream(service: Service, prepared: Prepared) -> Iterator[dict[str, Any]]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with service.engine.admit() as ticket:
        reply = service.begin(ticket, prepared, events.put)
        yield reply.first_chunk()
        while reply.end is None:
            event = events.get()
            if isinstance(event, Exception):
                raise as_serving_error(event)
            yield reply.chunk(reply.add(event))
    if prepared.options.include_usage:
        yield reply.usage_chunk()


def _ask(service: Service, prepared: Prepared) -> dict[str, Any]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with service.engine.admit() as ticket:
        reply = service.begin(ticket, prepared, events.put)
        while reply.end is None:
            event = events.get()
            if isinstance(event, Exception):
                raise as_serving_error(event)
            reply.add(event)
    return reply.response()
