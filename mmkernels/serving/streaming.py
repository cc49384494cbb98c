"""An answer on its way to a connection: events from the engine's thread, and their stream."""

import asyncio
import json
from contextlib import ExitStack
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmkernels.serving.answer import Event, Media
from mmkernels.serving.engine import as_serving_error
from mmkernels.serving.errors import ServingError
from mmkernels.serving.reply import Reply


class Gone(ServingError):
    """Who asked has closed the connection; nobody reads the status, which is nginx's for it."""

    status = 499


class Listener:
    """Hears the events of an answer from the engine's thread, and of a closed connection."""

    def __init__(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._watch = asyncio.create_task(self._watch_connection(receive))

    def tell(self, event: Event | Exception) -> None:
        """Takes an event; called from the engine's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        """The next event; an error is raised."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise as_serving_error(event)
        return event

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.cancel()

    async def _watch_connection(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(Gone("the connection was closed"))


class Stream(Response):
    """Server-sent events of an answer; closes `stack` at its end."""

    def __init__(
        self, stack: ExitStack, listener: Listener, reply: Reply, first: Event, usage: bool
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._stack, self._listener, self._reply = stack, listener, reply
        self._first, self._usage = first, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events as they come."""

        async def say(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await say(self._reply.first_chunk())
            event = self._first
            while True:
                delta = await add(self._reply, event)
                await say(self._reply.chunk(delta))
                if self._reply.end is not None:
                    break
                event = await self._listener.next()
            if self._usage:
                await say(self._reply.usage_chunk())
            await say("[DONE]")
        except Gone:
            return
        except ServingError as error:
            await say(error.to_dict())
        finally:
            self._stack.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def add(reply: Reply, event: Event) -> dict[str, Any]:
    """What an event adds to a reply. Images and sounds are computed off the loop."""
    if not isinstance(event, Media):
        return reply.add(event)
    try:
        return await asyncio.to_thread(reply.add, event)
    except Exception as error:
        raise as_serving_error(error) from error
