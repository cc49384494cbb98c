"""A server that is asked over HTTP, with nothing but the standard library."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

from mmkernels.serving.errors import BadRequest, Overloaded, ServingError, TimedOut


class Server:
    """A server with OpenAI's interface.

    Args:
        base_url: as "http://127.0.0.1:8000", with or without "/v1".
        api_key: what it wants to see; None: nothing.
        timeout: seconds to wait for it.

    Raises:
        ValueError: base_url is no http address.
    """

    def __init__(self, base_url: str, api_key: str | None, timeout: float) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url is {base_url!r}; it must begin with http://, as http://127.0.0.1:8000"
            )
        self.url = base_url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.timeout = timeout

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer; errors as of `Client.chat`."""
        with self._open(body) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer; errors as of `Client.chat`."""
        with self._open(body) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if data:
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise _error(0, chunk)
                    yield chunk
        raise ServingError(f"{self.url} closed the connection before the answer was whole")

    def _open(self, body: dict[str, Any]) -> HTTPResponse:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, self.headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
            return response
        except urllib.error.HTTPError as error:
            with error:
                try:
                    said = json.load(error)
                except ValueError:
                    said = {"error": {"message": f"{self.url} answered {error.code}"}}
            raise _error(error.code, said) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServingError(f"{self.url} cannot be reached: {reason}") from error


def _error(status: int, said: dict[str, Any]) -> ServingError:
    error = said.get("error") or {}
    about = (str(error.get("message")), error.get("param"), error.get("code"))
    if status == 429:
        return Overloaded(*about)
    if error.get("code") == "timeout":
        return TimedOut(*about)
    if 400 <= status < 500:
        return BadRequest(*about, status=status)
    return ServingError(*about)
