"""Does the official client of OpenAI talk to the server: text, images, sounds, streams, errors?"""

import base64
import json

import pytest

for library in ("openai", "fastapi", "uvicorn", "PIL", "tokenizers"):
    pytest.importorskip(library)

import openai  # noqa: E402 (may be absent)

from mmkernels.models import audio, images  # noqa: E402
from mmkernels.serving.server import Settings  # noqa: E402
from tests.serving import small  # noqa: E402
from tests.serving.running import serve  # noqa: E402

KEY = "a secret"


@pytest.fixture(scope="module")
def running():
    with serve(Settings(api_key=KEY)) as server:
        yield server


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def ask(client, *content, **options):
    return client.chat.completions.create(model="small", messages=small.user(*content), **options)


def test_text(client):
    answer = ask(client, "hello")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == small.text_of("hello")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_images_and_sounds_are_taken(client):
    plain = ask(client, "hello").usage.prompt_tokens
    both = ask(client, "hello", small.image_part(small.png()), small.audio_part(small.wav()))
    # 16 patches of a picture of 32 × 32 pixels, and half a second of 40 ms each.
    assert both.usage.prompt_tokens == plain + 16 + 13
    assert isinstance(both.choices[0].message.content, str)


def test_stream_is_the_answer_in_pieces(client):
    chunks = list(ask(client, "accents", stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == small.text_of("accents")
    assert len([text for text in texts if text]) > 5
    assert chunks[-1].usage.completion_tokens > 5 and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


def drawn(message) -> bytes:
    (part,) = message["images"]
    return base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))


def test_an_answer_has_a_picture(client):
    message = ask(client, "draw", extra_body={"media_temperature": 0}).choices[0].message
    assert message.content == small.text_of("draw")
    import torch

    wanted = small.model().image_codec.decode(torch.tensor([small.IMAGE_CODES]))[0]
    assert torch.equal(images.read_image(drawn(message.model_dump())), wanted)


def test_an_answer_has_a_sound(client):
    message = ask(client, "say", extra_body={"media_temperature": 0}).choices[0].message
    assert message.content == ""
    waveform = audio.read_wav(base64.b64decode(message.audio.data))
    # A code stands for four frames of 10 ms; the last frame is a moment.
    frames = 4 * len(small.AUDIO_CODES)
    assert len(waveform) == (frames - 1) * audio.HOP


@pytest.mark.parametrize(("question", "kind"), [("draw", "images"), ("say", "audio")])
def test_stream_has_the_same_picture_and_sound(client, question, kind):
    settings = {"extra_body": {"media_temperature": 0}}
    whole = ask(client, question, **settings).choices[0].message.model_dump()[kind]
    chunks = ask(client, question, stream=True, **settings)
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
    (found,) = [delta[kind] for delta in deltas if delta.get(kind)]
    if kind == "images":
        assert found == whole
    else:
        assert found["data"] == whole["data"]


@pytest.mark.parametrize("question", ["draw", "say"])
def test_an_answer_can_be_sent_back(client, question):
    settings = {"extra_body": {"media_temperature": 0}}
    first = ask(client, question, **settings).choices[0].message
    messages = [*small.user(question), first, *small.user("hello")]
    again = client.chat.completions.create(model="small", messages=messages, **settings)
    assert again.usage.prompt_tokens > 40
    dumped = [*small.user(question), first.model_dump(), *small.user("hello")]
    assert json.dumps(dumped)
    same = client.chat.completions.create(model="small", messages=dumped, **settings)
    assert same.choices[0].message.content == again.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "mmkernels"
    with pytest.raises(openai.NotFoundError, match="there is 'small'"):
        client.models.retrieve("gpt-4")


def test_errors_are_those_of_the_client(client, running):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=small.user("hello"))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hello", n=2)
    assert (caught.value.param, caught.value.code) == ("n", "unsupported_value")
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong") as other,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        ask(other, "hello")
