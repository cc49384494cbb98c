"""`python -m mmkernels serve` as a process: it says where it is, answers, and stops when told."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

for library in ("fastapi", "uvicorn", "PIL", "tokenizers", "safetensors"):
    pytest.importorskip(library)

from mmkernels import __main__ as cli  # noqa: E402 (after the skips, as its neighbours)
from tests.serving import small  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    small.model().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_until_it_is_told_to_stop(folder, how):
    command = [sys.executable, "-m", "mmkernels", "serve", "--port", "0", "--model", str(folder)]
    environment = {**os.environ, "MMKERNELS_API_KEY": "key", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*command, "--context", "300"], env=environment, **pipes) as process:
        try:
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", said)):
                line = process.stdout.readline()
                assert line, said
                said += line
            body = json.dumps({"messages": small.user("hello")}).encode()
            headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
            request = urllib.request.Request(f"{found[0]}/v1/chat/completions", body, headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
            assert answer["choices"][0]["message"]["content"] == small.text_of("hello")
            process.send_signal(how)
            assert process.wait(timeout=30) in (0, 130, -how)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--model", "nothing"], "there is no model 'nothing'"), (["--slots", "0"], "slots is 0")],
)
def test_what_goes_wrong_is_one_line(folder, arguments, words, capsys):
    assert cli.main(["serve", "--model", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmkernels serve: ") and words in line
