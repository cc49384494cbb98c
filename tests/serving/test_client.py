"""`Client`: the same answers in process and from a server, and what is at hand as parts."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import pytest

for library in ("fastapi", "uvicorn", "PIL", "tokenizers", "safetensors"):
    pytest.importorskip(library)

import numpy as np  # noqa: E402 (after the skips, as its neighbours)
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from mmkernels.models import audio, images  # noqa: E402
from mmkernels.serving.client import Client  # noqa: E402
from mmkernels.serving.errors import BadRequest, Overloaded, ServingError  # noqa: E402
from mmkernels.serving.parts import audio_bytes, image_bytes, plain  # noqa: E402
from mmkernels.serving.server import Settings  # noqa: E402
from tests.serving import small  # noqa: E402
from tests.serving.running import serve  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    small.model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder):
    with Client(folder) as client:
        yield client


@pytest.fixture(scope="module")
def remote():
    with serve(Settings(api_key="key")) as server, Client(None, server.url, api_key="key") as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def client(request):
    return request.getfixturevalue(request.param)


def message(response):
    return response["choices"][0]["message"]


def test_text(client):
    response = client.chat(messages=[{"role": "user", "content": "hello"}])
    assert message(response)["content"] == small.text_of("hello")
    assert (response["model"], response["object"]) == ("small", "chat.completion")


def test_stream(client):
    chunks = list(client.chat(messages=small.user("count"), stream=True, max_tokens=30))
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len(texts) > 10 and small.text_of("count").startswith("".join(texts))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_pictures_and_sounds_in_and_out(client, tmp_path):
    (tmp_path / "a.png").write_bytes(small.png())
    (tmp_path / "b.wav").write_bytes(small.wav())
    parts = [
        {"type": "image", "image": tmp_path / "a.png"},
        {"type": "audio", "audio": str(tmp_path / "b.wav")},
    ]
    response = client.chat(messages=small.user(*parts, "hello"))
    alone = client.chat(messages=small.user("hello"))
    assert response["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"] + 16 + 13
    drawn = message(client.chat(messages=small.user("draw"), media_temperature=0))
    data = base64.b64decode(drawn["images"][0]["image_url"]["url"].partition(",")[2])
    assert images.read_image(data).shape == (3, 32, 32)
    said = message(client.chat(messages=small.user("say")))
    assert len(audio.read_wav(base64.b64decode(said["audio"]["data"]))) > 100
    again = [*small.user("draw"), drawn, *small.user("say"), said, *small.user("hello")]
    assert client.chat(messages=again)["usage"]["prompt_tokens"] > 60


def test_a_seed_repeats_an_answer(client):
    def draw(**options):
        return message(client.chat(messages=small.user("say"), media_temperature=2, **options))

    assert draw(seed=1)["audio"]["data"] == draw(seed=1)["audio"]["data"]
    assert len({draw(seed=seed)["audio"]["data"] for seed in range(12)}) > 1


def test_models_by_name(client, folder):
    for names in ({"models": "small"}, {"models": ["nothing", "small"]}, {"model": "small"}):
        if client._server is None:
            names = {
                kind: str(folder) if isinstance(value, str) else ["nothing", str(folder)]
                for kind, value in names.items()
            }
        assert client.chat(messages=small.user("hello"), **names)["model"] == "small"
    with pytest.raises(ValueError, match="there is no model 'nothing'"):
        client.chat(messages=small.user("hello"), model="nothing")
    with pytest.raises(ValueError, match="both given"):
        client.chat(messages=small.user("hello"), model="a", models=["b"])


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client, stream):
    with pytest.raises(BadRequest, match="temperature is 9") as caught:
        list(client.chat(messages=small.user("hello"), stream=stream, temperature=9))
    assert (caught.value.status, caught.value.param) == (400, "temperature")


def test_many_threads_ask_one_client(client):
    with ThreadPoolExecutor(12) as threads:
        asked = list(small.ANSWERS)[:3] * 8
        answers = threads.map(lambda q: client.chat(messages=small.user(q)), asked)
        assert [message(a)["content"] for a in answers] == [small.text_of(q) for q in asked]


def test_a_client_can_be_closed_and_asked_again(folder):
    client = Client(folder)
    for _ in range(2):
        assert message(client.chat(messages=small.user("hello")))["content"]
        client.close()


def test_errors_of_a_server():
    with serve(Settings(api_key="key"), slots=1, queue=0) as server:
        with pytest.raises(BadRequest, match="API key") as caught:
            Client(base_url=server.url).chat(messages=small.user("hello"))
        assert caught.value.status == 401
        with server.engine.admit(), pytest.raises(Overloaded):
            Client(base_url=f"{server.url}/v1/", api_key="key").chat(messages=small.user("hello"))
        address = server.url
    with pytest.raises(ServingError, match="cannot be reached"):
        Client(base_url=address).chat(messages=small.user("hello"))
    with pytest.raises(ValueError, match="base_url is 'localhost:1'"):
        Client(base_url="localhost:1")


PIXELS = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)


@pytest.mark.parametrize(
    "picture",
    [
        PIXELS,
        PIXELS.permute(1, 2, 0),
        PIXELS.permute(1, 2, 0).numpy(),
        Image.fromarray(PIXELS.permute(1, 2, 0).contiguous().numpy()),
        images.write_png(PIXELS),
    ],
    ids=["tensor", "channels last", "numpy", "pillow", "bytes"],
)
def test_pictures_at_hand(picture):
    assert torch.equal(images.read_image(image_bytes(picture)), PIXELS)


def test_a_grey_picture():
    grey = images.read_image(image_bytes(PIXELS[1].numpy()))
    assert torch.equal(grey, PIXELS[1].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        (PIXELS.float(), TypeError),
        (PIXELS[:2], ValueError),
        (PIXELS[None], ValueError),
        (object(), TypeError),
    ],
)
def test_no_pictures(picture, error):
    with pytest.raises(error, match="image"):
        image_bytes(picture)


def test_sounds_at_hand():
    wave = np.sin(np.arange(16_000) / 20).astype(np.float32) / 2
    read = audio.read_wav(audio_bytes(wave, 16_000))
    assert len(read) == 8000
    assert torch.allclose(read[100:-100], torch.from_numpy(wave)[::2][100:-100], atol=1e-2)
    with pytest.raises(ValueError, match="audio is"):
        audio_bytes(torch.zeros(2, 8))


def test_the_kind_of_a_picture_is_told():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    (said,) = plain(small.user({"type": "image", "image": file.getvalue()}))
    assert said["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
