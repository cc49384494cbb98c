"""Does bad input get a 4xx that says what is wrong, and does the server live on?"""

import base64
import io
import json
import socket
import struct
import zlib

import pytest

for library in ("fastapi", "uvicorn", "PIL", "tokenizers"):
    pytest.importorskip(library)

from mmkernels.serving.protocol import Limits  # noqa: E402 (its neighbours need libraries)
from mmkernels.serving.server import Settings  # noqa: E402
from tests.serving import small  # noqa: E402
from tests.serving.running import PATH, serve  # noqa: E402

BODY_BYTES = 1 << 20


@pytest.fixture(scope="module")
def server():
    limits = Limits(body_bytes=BODY_BYTES, images=2, sounds=2, text_chars=500, max_tokens=50)
    with serve(Settings(limits=limits, body_timeout=1.0)) as running:
        yield running


@pytest.fixture(autouse=True)
def lives_on(server):
    yield
    assert server.ask("hello") == small.text_of("hello")
    server.until("admitted", 0)


def refused(server, body, status=400, **headers):
    got, _, answer = server.post(body, **headers)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


def bomb() -> bytes:
    """A PNG of 30000 × 30000 pixels in a few hundred kilobytes."""

    def chunk(kind, data):
        size, check = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", size) + kind + data + struct.pack(">I", check)

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(30_000)) for _ in range(2000)) + packed.flush()
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (small.png()[:70], "broken or cut off"),
        (b"no picture at all", "cannot be read"),
        (b"", "cannot be read"),
        (bomb(), "pixels"),
    ],
    ids=["cut off", "text", "empty", "bomb"],
)
def test_broken_pictures(server, picture, words):
    error = refused(server, {"messages": small.user("hello", small.image_part(picture))})
    assert words in error["message"] and error["code"] == "invalid_image"
    assert error["param"] == "messages[0].content[1].image_url"


def float_wav(value: float) -> bytes:
    samples = struct.pack("<f", value) * 4000
    head = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", len(body) + len(samples)) + body + samples


@pytest.mark.parametrize(
    ("sound", "words"),
    [
        (float_wav(0.0), "silent"),
        (float_wav(float("nan")), "NaN"),
        (b"RIFF\x00\x00\x00\x00WAVE", "no format chunk"),
        (b"ID3 an mp3", "no WAV file"),
        (small.wav(0.0), "no samples"),
        (small.wav(31.0), "seconds"),
    ],
    ids=["silence", "nan", "no format", "mp3", "no samples", "long"],
)
def test_broken_sounds(server, sound, words):
    error = refused(server, {"messages": small.user("hello", small.audio_part(sound))})
    assert words in error["message"] and error["code"] == "invalid_audio"
    assert error["param"] == "messages[0].content[1].input_audio"


HELLO = small.user("hello")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"messages": [', "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"temperature": NaN}', "NaN"),
        (b"[]", "array"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ({}, "messages is missing"),
        ({"messages": []}, "at least one"),
        ({"messages": "hello"}, "list"),
        ({"messages": ["hello"]}, "object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "system, developer, user, assistant"),
        ({"messages": [{"content": "x"}]}, "role is null"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": 7}]}, "text or a list"),
        ({"messages": [{"role": "user", "content": [7]}]}, "type is null"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, '"video"'),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": small.user(*["x" * 200] * 3)}, "500 characters"),
        ({"messages": HELLO * 200}, "128 are read"),
        ({"messages": small.user(*[small.image_part(small.png())] * 3)}, "2 images"),
        ({"messages": small.user(*[small.audio_part(small.wav())] * 3)}, "2 sounds"),
        ({"messages": small.user(small.image_part("@@@"))}, "not base64"),
        ({"messages": [{"role": "system", "content": [small.image_part("")]}]}, "of a system"),
        ({"messages": HELLO, "max_tokens": 51}, "from 1 to 50"),
        ({"messages": HELLO, "max_tokens": 0}, "from 1 to 50"),
        ({"messages": HELLO, "max_tokens": 1.5}, "whole number"),
        ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"messages": HELLO, "temperature": "hot"}, "number from 0 to 2"),
        ({"messages": HELLO, "temperature": True}, "number from 0 to 2"),
        (b'{"messages": [], "temperature": 1e999}', "number from 0 to 2"),
        ({"messages": HELLO, "top_p": 0}, "number from 0.001 to 1"),
        ({"messages": HELLO, "seed": 1 << 70}, "seed"),
        ({"messages": HELLO, "stop": ["a"] * 5}, "at most 4"),
        ({"messages": HELLO, "stop": ""}, "1 to 64"),
        ({"messages": HELLO, "n": 2}, "n is 2"),
        ({"messages": HELLO, "n": True}, "n is true"),
        ({"messages": HELLO, "stream": "yes"}, "true or false"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "modalities": ["audio"]}, '"text"'),
        ({"messages": HELLO, "modalities": ["text", "smell"]}, "smell"),
        ({"messages": HELLO, "audio": {"voice": "alloy", "format": "wav"}}, "one voice"),
        ({"messages": HELLO, "audio": {"format": "mp3"}}, "wav"),
        ({"messages": HELLO, "best_of": 3}, "best_of"),
        ({"messages": HELLO, "model": "small", "models": ["small"]}, "both given"),
        ({"messages": HELLO, "model": 7}, "name"),
    ],
)
def test_bad_requests_say_what_is_wrong(server, body, words):
    assert words in refused(server, body)["message"]


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "data:,x"])
def test_nothing_is_fetched(server, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    assert "data URI" in refused(server, {"messages": small.user(part)})["message"]


def test_a_conversation_longer_than_the_context(server):
    said = [{"role": "user", "content": "x" * 400}]
    error = refused(server, {"messages": said})
    assert error["code"] == "context_length_exceeded" and "400" in error["message"]


def test_harmless_fields_are_taken(server):
    fields = {"user": "me", "metadata": {"a": "b"}, "n": 1, "logprobs": False, "tools": None}
    assert server.ask("hello", **fields) == small.text_of("hello")


def test_the_body_must_be_declared_as_json(server):
    status, _, answer = server.request("POST", PATH, b"{}", {"Content-Type": "text/plain"})
    assert (status, answer["error"]["param"]) == (400, "Content-Type")
    assert "gzip" in refused(server, b"{}", Content_Encoding="gzip")["message"]


def test_a_body_that_is_too_large(server):
    error = refused(server, b" " * (2 * BODY_BYTES), 413)
    assert error["code"] == "request_too_large" and str(BODY_BYTES) in error["message"]


def raw(server, data: bytes) -> bytes:
    """What comes back for bytes on the line, until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(data)
        got = io.BytesIO()
        while piece := line.recv(65536):
            got.write(piece)
            if b"}}" in got.getvalue():
                break
        return got.getvalue()


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


def test_a_claim_of_two_gigabytes_is_refused_at_once(server):
    answer = raw(server, HEAD + b"Content-Length: 2147483648\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"claims 2147483648 bytes" in answer


def test_a_body_without_end_is_cut_off(server):
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    answer = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + 2 * piece + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come(server):
    answer = raw(server, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"within 1 seconds" in answer


def test_what_is_no_http(server):
    assert raw(server, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("GET", "/nothing", 404),
        ("GET", "/static/../server.py", 404),
        ("GET", "/static/%2e%2e%2fserver.py", 404),
        ("GET", "/v1/models/gpt-4", 404),
    ],
)
def test_other_paths(server, method, path, status):
    got, _, body = server.request(method, path)
    assert got == status and body["error"]["type"] == "invalid_request_error"


def test_an_earlier_answer_must_be_whole(server):
    for wrong, words in (
        ({"audio": {"id": "audio-1"}}, "must have data"),
        ({"images": ["x"]}, "image_url"),
        ({"images": "x"}, "list"),
        ({"images": [small.image_part(base64.b64encode(b"x").decode())]}, "cannot be read"),
    ):
        earlier = {"role": "assistant", "content": None, **wrong}
        body = json.dumps({"messages": [*HELLO, earlier, *HELLO]}).encode()
        assert words in refused(server, body)["message"]
