"""A server in a thread of this process, and requests to it."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from mmkernels.serving.engine import Engine
from mmkernels.serving.server import Settings, create_app
from tests.serving import small

PATH = "/v1/chat/completions"


class Running:
    """A server on a free port of 127.0.0.1."""

    def __init__(self, engine: Engine, port: int) -> None:
        self.engine, self.port = engine, port
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the body, as JSON if it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data: Any = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            if found.get("content-type", "").startswith("application/json"):
                data = json.loads(data)
            return response.status, found, data

    def post(self, body: object, **headers: str) -> tuple[int, dict[str, str], Any]:
        """A chat request; `body` is made JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", PATH, data, sent)

    def ask(self, question: str, **fields: Any) -> str:
        """The text of an answer."""
        status, _, body = self.post({"messages": small.user(question), **fields})
        assert status == 200, body
        return body["choices"][0]["message"]["content"]

    def until(self, what: str, value: int, seconds: float = 20.0) -> None:
        """Waits until a number of the engine is `value`."""
        end = time.monotonic() + seconds
        while self.engine.stats()[what] != value:
            assert time.monotonic() < end, f"{what}: {self.engine.stats()}"
            time.sleep(0.01)


@contextlib.contextmanager
def serve(settings: Settings | None = None, **sizes: Any) -> Iterator[Running]:
    """Runs a server; `sizes` are the arguments of `Engine`, by default with the small model."""
    if "model" not in sizes:
        sizes["model"] = small.model()
    engine = Engine(**{"context": 400, **sizes})
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(engine, settings), log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(engine, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        listening.close()
