"""Does the server keep its head: many clients, too many, slow answers, clients that leave?"""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

for library in ("openai", "fastapi", "uvicorn", "PIL", "tokenizers"):
    pytest.importorskip(library)

import openai  # noqa: E402 (may be absent)

from mmkernels.serving.server import Settings  # noqa: E402
from tests.serving import small  # noqa: E402
from tests.serving.running import PATH, serve  # noqa: E402

CLIENTS = 64


@pytest.fixture
def held():
    model = small.Held()
    yield model
    model.go.set()


def test_64_clients_get_the_answers_that_they_get_alone():
    questions = list(small.ANSWERS)
    asked = [questions[i % len(questions)] for i in range(CLIENTS)]
    parts = [
        [small.image_part(small.png())] if i % 3 else [small.audio_part(small.wav())]
        for i in range(CLIENTS)
    ]

    def ask(client, i, stream):
        content = [asked[i]] if i % 2 else [*parts[i], asked[i]]
        options = {"model": "small", "messages": small.user(*content), "seed": i, "max_tokens": 60}
        if not stream:
            message = client.chat.completions.create(**options).choices[0].message.model_dump()
            return message["content"], len(message.get("images", ()))
        deltas = [
            chunk.choices[0].delta.model_dump()
            for chunk in client.chat.completions.create(**options, stream=True)
        ]
        text = "".join(delta.get("content") or "" for delta in deltas)
        return text, sum(len(delta.get("images") or ()) for delta in deltas)

    with (
        serve(slots=16) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        alone = [ask(client, i, False) for i in range(CLIENTS)]
        together = list(threads.map(lambda i: ask(client, i, i % 4 == 0), range(CLIENTS)))
        assert together == alone
        assert alone[1][0] == small.text_of(asked[1])
        server.until("admitted", 0)


def test_requests_beyond_the_queue_are_put_off(held):
    body = {"messages": small.user("hello")}
    sizes = {"name": "small", "slots": 2, "queue": 3}
    with serve(model=held, **sizes) as server, ThreadPoolExecutor(5) as threads:
        taken = [threads.submit(server.post, body) for _ in range(5)]
        server.until("admitted", 5)
        status, headers, answer = server.post(body)
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["code"] == "overloaded"
        assert answer["error"]["type"] == "rate_limit_error"
        assert server.request("GET", "/healthz")[2]["admitted"] == 5
        held.go.set()
        assert [future.result()[0] for future in taken] == [200] * 5
        assert server.ask("hello") == small.text_of("hello")


def test_the_official_client_tries_again_after_429(held):
    with serve(model=held, name="small", slots=1, queue=0) as server:
        first = threading.Thread(target=server.ask, args=("hello",))
        first.start()
        server.until("running", 1)
        threading.Timer(0.5, held.go.set).start()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=5) as client:
            answer = client.chat.completions.create(model="small", messages=small.user("hello"))
        assert answer.choices[0].message.content == small.text_of("hello")
        first.join()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(held, stream):
    with serve(model=held, name="small", slots=1, timeout=0.3) as server:
        threading.Timer(0.6, held.go.set).start()
        status, _, answer = server.post({"messages": small.user("hello"), "stream": stream})
        if stream:  # it had begun
            assert status == 200
            *_, last = answer.decode().strip().split("\n\n")
            answer = json.loads(last.removeprefix("data: "))
        else:
            assert status == 504
        assert answer["error"]["code"] == "timeout" and "0.3 seconds" in answer["error"]["message"]
        server.until("admitted", 0)
        assert server.ask("hello", max_tokens=2) == small.text_of("hello")[:2]


def test_one_who_waits_too_long(held):
    with serve(model=held, name="small", slots=1, timeout=0.4) as server:
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(server.post, {"messages": small.user("hello")}) for _ in "ab"]
            server.until("admitted", 2)
            time.sleep(0.5)
            held.go.set()
            assert [future.result()[0] for future in both] == [504, 504]
        server.until("admitted", 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_place_back(held, stream):
    body = json.dumps({"messages": small.user("count"), "stream": stream}).encode()
    with serve(model=held, name="small", slots=1, queue=0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        server.until("running", 1)
        if stream:
            assert connection.getresponse().status == 200
        connection.close()
        server.until("admitted", 0)
        steps = held.steps
        held.go.set()
        server.until("running", 0)
        # The answer has 42 tokens; it was given up long before.
        assert held.steps <= steps + 2


def test_a_model_that_fails_fails_its_answers_alone(monkeypatch):
    with serve() as server:
        model = small.model()
        monkeypatch.setattr(model, "prefill", lambda *_: 1 / 0)
        status, _, answer = server.post({"messages": small.user("hello")})
        assert (status, answer["error"]["code"]) == (500, "model_error")
        assert "ZeroDivision" not in answer["error"]["message"]
        monkeypatch.undo()
        assert server.ask("hello") == small.text_of("hello")


def test_a_server_that_stops_says_so(held):
    with serve(model=held, name="small") as server, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.post, {"messages": small.user("hello")})
        server.until("running", 1)
        threading.Timer(0.3, held.go.set).start()
        server.engine.close()
        status, _, answer = asked.result()
        assert (status, "shut down" in answer["error"]["message"]) == (503, True)
        assert server.request("GET", "/healthz")[0] == 503
        assert server.post({"messages": small.user("hello")})[0] == 503


def test_an_api_key():
    with serve(Settings(api_key="sécret")) as server:
        body = {"messages": small.user("hello")}
        key = "sécret".encode().decode("latin-1")
        for sent in ({}, {"Authorization": "Bearer secret"}, {"Authorization": f"Basic {key}"}):
            status, headers, answer = server.post(body, **sent)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert server.request("GET", "/v1/models")[0] == 401
        assert server.request("GET", "/healthz")[0] == 200
        assert server.post(body, Authorization=f"Bearer {key}")[0] == 200
