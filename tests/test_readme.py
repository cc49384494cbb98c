"""Does the documentation run: every python block, what it is said to print, commands, links?"""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from mmkernels import masks
from mmkernels._core import registry, triton_runtime
from tools.generated import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Libraries that a block may need and a machine may lack.
OPTIONAL = {"transformers", "timm", "sklearn", "tokenizers", "safetensors", "PIL"}
CHEAP = {"python -m mmkernels"}  # commands that are run here


class Block(NamedTuple):
    """A fenced block, and the one after it."""

    where: str
    language: str
    code: str
    following: tuple[str, str]


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        fences = [*FENCE.finditer(text), None]
        for fence, after in itertools.pairwise(fences):
            line = text.count("\n", 0, fence.start()) + 1
            # What is printed follows at once.
            near = after is not None and not text[fence.end() : after.start()].strip()
            following = (after[1], after[2]) if near else ("", "")
            found.append(Block(f"{page.name}:{line}", fence[1], fence[2], following))
    return found


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


@pytest.mark.parametrize("block", of("python"), ids=lambda block: block.where)
def test_python_block(block, monkeypatch):
    monkeypatch.setattr(registry, "_table", dict(registry._table))  # a block may add a backend
    # A reader has triton, and not its interpreter.
    monkeypatch.setattr(triton_runtime, "import_error", lambda: None)
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: False)
    code = compile(block.code, block.where, "exec")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    language, expected = block.following
    if language == "text":
        assert printed.getvalue().rstrip() == expected.rstrip()
    else:
        assert printed.getvalue() == "", "show what it prints in a text block right after it"


def commands() -> list[str]:
    lines = (line for block in of("console") for line in block.code.splitlines())
    return [line.partition("#")[0].strip() for line in lines]


@pytest.mark.parametrize("command", sorted(CHEAP))
def test_cheap_command(command):
    assert command in commands()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    program, *arguments = command.split()
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "attention_forward" in done.stdout


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    texts = [page.read_text() for page in PAGES]
    code = [line for text in texts for line in re.findall(r"`(make [^`\n]+)`", text)] + commands()
    targets = {line.split()[1] for line in code if line.startswith("make ")}
    missing = {
        target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)
    }
    assert targets
    assert not missing


def test_every_example_of_the_mask_table_is_a_mask():
    examples = re.findall(r"\| `(masks\..+)` \|$", PAGES[0].read_text(), re.MULTILINE)
    bounds = {"start": torch.tensor([0, 1]), "end": torch.tensor([2, 2])}
    assert len(examples) == 8
    for example in examples:
        assert isinstance(
            eval(example, {"masks": masks, "torch": torch, **bounds}), masks.IntervalMask
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_pages_are_short(page):
    """150 lines, without what is generated."""
    text = re.sub(r"<!-- begin .*?<!-- end ", "", page.read_text(), flags=re.DOTALL)
    assert text.count("\n") <= 150
