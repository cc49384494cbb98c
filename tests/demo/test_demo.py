"""The demo's parts on small inputs, and (slow) the whole of it."""

import importlib.util
import os
import re
import sys

import pytest

from mmkernels import demo
from mmkernels.demo import measure, prompts, report

SECTIONS = [
    report.Section(
        title="Language model",
        about="How it was measured.",
        header=("attention", "time, s"),
        rows=[("eager", "2.00"), ("mmkernels", "1.00 (0.90–1.10)")],
        bars={"time, s": {"eager": 2.0, "mmkernels": 1.0}, "peak memory, MiB": {}},
        text="> **A question**\n>\n> An answer",
    ),
    report.Section(
        title="Vision transformer",
        about="Also.",
        header=("attention",),
        rows=[("eager",)],
        bars={"time, s": {"eager": 3.0}},
        failures=["the logits differ"],
    ),
]


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    path = report.write(tmp_path / "new", SECTIONS, report.environment(), seconds=65.4)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "new" / "report.md"
    assert "in 65 s" in text
    assert re.search(r"torch \d", text)
    assert text.index("## Language model") < text.index("An answer") < text.index("## Vision")
    assert "| mmkernels | 1.00 (0.90–1.10) |" in text
    assert "**FAILED**: the logits differ" in text
    (plot,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (path.parent / plot).read_bytes().startswith(b"\x89PNG")


def test_spread():
    assert measure.spread([0.5]) == "0.50"
    assert measure.spread([3.0, 1.0, 2.25], digits=1) == "2.2 (1.0–3.0)"


def test_fresh_process():
    assert measure.in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        measure.in_fresh_process(int, "x")


def test_peak_rise():
    def work():
        bytearray(b"x" * (64 << 20))  # freed at once; the peak remains

    rise = measure.peak_rise(work)
    assert rise is None if sys.platform != "linux" else 60 < rise < 200


class Tokenizer:
    """One token a word."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": text.split()})

    def apply_chat_template(self, messages, add_generation_prompt):
        return {"input_ids": [word for message in messages for word in message["content"].split()]}


def test_long_prompt_is_long_enough_and_asks():
    for tokens in (100, 3000):
        prompt = prompts.long_prompt(Tokenizer(), tokens)
        assert tokens < len(prompt) < tokens + 400
        assert " ".join(prompt).endswith(prompts.QUESTION)


def test_missing_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setattr(
        demo, "NEEDS", {"os": "os", "no_such": "no-such", "nor_this": "--no-deps x"}
    )
    with pytest.raises(ModuleNotFoundError) as caught:
        demo.main([])
    assert str(caught.value).endswith("pip install no-such && pip install --no-deps x")
    assert caught.value.name is None


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in demo.NEEDS), reason="needs its packages"
)
def test_whole_demo(tmp_path, capfd):
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("| mmkernels |") == 3
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The capital of France is Paris" in text
