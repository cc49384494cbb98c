"""The model over HTTP, as OpenAI's chat completions, with a page to try it on.

POST /v1/chat/completions    an answer, whole or as a stream of server-sent events
GET  /v1/models              what answers
GET  /healthz                whether it does, and how many are waiting
GET  /                       the page
"""

import asyncio
import hmac
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mmkernels.serving.engine import Engine
from mmkernels.serving.errors import BadRequest, Overloaded, ServingError
from mmkernels.serving.http_body import read_body
from mmkernels.serving.page import add_page
from mmkernels.serving.protocol import Limits
from mmkernels.serving.service import Service
from mmkernels.serving.streaming import Listener, Stream, add

# Threads that read images and sounds. Few, for a large picture takes memory while it is read.
_READERS = ThreadPoolExecutor(2, "mmkernels-reader")


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        api_key: what requests must show as `Authorization: Bearer …`; None: nothing.
        limits: how large requests may be.
        body_timeout: seconds within which a request's body must have come.
    """

    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    body_timeout: float = 30.0


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The application for an ASGI server.

    Args:
        engine: what answers; whoever made it closes it after the server has ended.
        settings: how the server behaves.
    """
    settings = settings or Settings()
    service = Service(engine, settings.limits)
    app = FastAPI(title="mmkernels", docs_url=None, redoc_url=None, openapi_url=None)
    keyed = [Depends(_key_check(settings.api_key))]
    created = int(time.time())
    model = {"id": engine.name, "object": "model", "created": created, "owned_by": "mmkernels"}

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request) -> Response:
        return await _chat(request, service, settings)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}", dependencies=keyed)
    async def one_model(name: str) -> dict[str, Any]:
        if name != engine.name:
            raise BadRequest(
                f"there is no model {name!r} here; there is {engine.name!r}",
                "model",
                "model_not_found",
                status=404,
            )
        return model

    @app.get("/healthz")
    async def health() -> JSONResponse:
        alive = engine.alive
        body = {"status": "ok" if alive else "down", "model": engine.name, **engine.stats()}
        return JSONResponse(body, 200 if alive else 503)

    add_page(app)
    app.add_exception_handler(ServingError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


async def _chat(request: Request, service: Service, settings: Settings) -> Response:
    with ExitStack() as stack:
        ticket = stack.enter_context(service.engine.admit())
        data = await read_body(request, settings.limits.body_bytes, settings.body_timeout)
        prepared = await asyncio.get_running_loop().run_in_executor(_READERS, service.prepare, data)
        listener = stack.enter_context(Listener(request.receive))
        reply = service.begin(ticket, prepared, listener.tell)
        if prepared.options.stream:
            first = await listener.next()  # an error before it still has a status of its own
            return Stream(stack.pop_all(), listener, reply, first, prepared.options.include_usage)
        while reply.end is None:
            await add(reply, await listener.next())
        return JSONResponse(reply.response())


def _key_check(api_key: str | None) -> Any:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which arrive as latin-1.
        same = hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise BadRequest(
                "this server wants an API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
            )

    return check


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_dict(), error.status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    said = BadRequest(message, status=error.status_code).to_dict()
    return JSONResponse(said, error.status_code, dict(error.headers or {}))


async def _on_bug(_: Request, error: Exception) -> Response:
    """The server's log has the trace; who asked gets no insides."""
    return JSONResponse(ServingError("the server failed", code="internal_error").to_dict(), 500)
