"""`python -m mmkernels chat`: questions on the command line, from a pipe and from a terminal."""

import io
import json
import sys

import pytest

for library in ("PIL", "tokenizers", "safetensors"):
    pytest.importorskip(library)

from mmkernels import __main__ as cli  # noqa: E402 (after the skips, as its neighbours)
from mmkernels.models import audio, images  # noqa: E402
from mmkernels.serving import load  # noqa: E402
from tests.serving import small  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    small.model().save_pretrained(path)
    return path


@pytest.fixture
def chat(folder, tmp_path):
    def run(*arguments):
        return cli.main(["chat", "--model", str(folder), "--out", str(tmp_path), *arguments])

    return run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_question(chat, capsys):
    assert chat("hello") == 0
    assert capsys.readouterr() == (small.text_of("hello") + "\n", "")


def test_a_picture_and_a_sound_go_with_it(chat, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(small.png())
    (tmp_path / "b.wav").write_bytes(small.wav())
    files = ["--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / "b.wav")]
    assert chat(*files, "--max-tokens", "4", "hello") == 0
    assert capsys.readouterr().err == ""


def test_answers_become_files_and_none_is_written_over(chat, capsys, tmp_path):
    for _ in range(2):
        assert chat("draw") == 0
    assert chat("say") == 0
    for name in ("answer-1.png", "answer-2.png"):
        assert images.read_image((tmp_path / name).read_bytes()).shape == (3, 32, 32)
    assert len(audio.read_wav(tmp_path / "answer-1.wav")) > 0
    out = capsys.readouterr().out
    assert out.splitlines()[1] == f"Here: [{tmp_path / 'answer-2.png'}]  There."


def test_lines_of_a_pipe(chat, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\ncount\n"))
    assert chat("--memory", "0") == 0
    assert capsys.readouterr().out == f"{small.text_of('hello')}\n{small.text_of('count')}\n"


def test_a_terminal(chat, capsys, monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(small.png())
    lines = iter(
        [
            "/help",
            f"/image {tmp_path / 'a.png'}",
            "/audio nothing.wav",
            "hello",
            f"/save {tmp_path / 'said.json'}",
            "/new",
            "hello",
            "/quit",
            "never read",
        ]
    )
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat() == 0
    out, err = capsys.readouterr()
    assert "/save FILE" in out and "a.png goes with the next question" in out
    assert err == "nothing.wav: No such file or directory\n"
    assert out.endswith(small.text_of("hello") + "\n")
    user, assistant = json.loads((tmp_path / "said.json").read_text())
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert assistant["role"] == "assistant"


def test_ctrl_c_ends_an_answer_and_not_the_conversation(chat, capsys, monkeypatch):
    from mmkernels.serving.client import Client

    asked = []
    real = Client.chat

    def interrupted(self, **options):
        asked.append(options)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(self, **options)

    monkeypatch.setattr(Client, "chat", interrupted)
    lines = iter(["count", "hello"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert chat() == 0
    out = capsys.readouterr().out
    assert "(stopped)" in out and small.text_of("hello") in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--image", "nothing.png", "hello"), 2, "nothing.png"),
        (("--temperature", "9", "hello"), 1, "temperature is 9"),
        (("--model", "nothing", "hello"), 2, "there is no model 'nothing'"),
        (("--url", "http://127.0.0.1:9", "hello"), 1, "cannot be reached"),
        (("--url", "nowhere", "hello"), 2, "base_url is 'nowhere'"),
    ],
)
def test_what_goes_wrong_is_one_line(chat, arguments, code, words, capsys):
    assert chat(*arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmkernels chat: ") and words in line


def test_a_file_that_is_no_picture(chat, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    assert chat("--image", str(tmp_path / "a.png"), "hello") == 1
    assert "cannot be read" in capsys.readouterr().err


def test_missing_packages_are_named(chat, capsys, monkeypatch):
    monkeypatch.setattr(load, "NEEDS", {"no_such_module": "a-package"})
    monkeypatch.setattr("mmkernels.serving.chat.NEEDS", load.NEEDS)
    assert chat("hello") == 2
    assert "pip install a-package" in capsys.readouterr().err
