"""The assembler's code of a compiled Triton kernel: which loops do the products, what spills there.

Spilled registers outside of these loops cost next to nothing, in them they cost every round, so a
kernel's stack size says little. Needs triton.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends import nvidia

_TENSOR_CORES = r"(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b"  # of wgmma, mma.sync and tcgen05
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")
# IEEE float32 has no tensor cores: fewer FMAs than this in a loop are no product of tiles.
_FEW_FMAS = 64


class Loop(NamedTuple):
    """Instructions in one innermost loop that multiplies tiles.

    Attributes:
        products: on tensor cores or, in IEEE float32, FMAs.
        special: of the unit for exponentials and reciprocals.
        spills: stores of registers to local memory.
        reloads: loads from there; alone they are loop invariants, spilled once before.
        instructions: all.
    """

    products: int
    special: int
    spills: int
    reloads: int
    instructions: int


def disassembled(compiled: Any) -> str:
    """The SASS of a kernel from `compile_launch`, with labels."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "nvdisasm"
        done = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout


def _parsed(sass: str) -> tuple[list[str], dict[str, int]]:
    """All instructions, and by label the index of the one that follows it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if (label := _LABEL.match(line.strip())) is not None:
            labels[label[1]] = len(code)
        elif (instruction := _INSTRUCTION.search(line)) is not None:
            code.append(instruction[1])
    return code, labels


def _spans(code: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of every loop, by the branches that go back.

    Blocks behind the last EXIT wait for an mbarrier out of line: their branches back are returns.
    """
    last = max(at for at, text in enumerate(code) if re.search(r"\bEXIT\b", text))
    ends: dict[int, int] = {}
    for at, text in enumerate(code[: last + 1]):
        target = _BRANCH.search(text)
        if target is not None and (start := labels[target[1]]) <= at:
            ends[start] = at  # the last one of those to the same start
    return sorted(ends.items())


def _count(code: list[str], pattern: str) -> int:
    return sum(re.search(rf"\b{pattern}", text) is not None for text in code)


def _products(code: list[str]) -> int:
    fmas = _count(code, r"FFMA2?\b")
    return _count(code, _TENSOR_CORES) or (fmas if fmas >= _FEW_FMAS else 0)


def product_loops(sass: str) -> list[Loop]:
    """The innermost loops that multiply tiles, in the order of the code."""
    code, labels = _parsed(sass)
    tensor_cores = _count(code, _TENSOR_CORES) > 0
    count = (lambda part: _count(part, _TENSOR_CORES)) if tensor_cores else _products
    spans = [(a, b) for a, b in _spans(code, labels) if count(code[a : b + 1]) > 0]
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    return [
        Loop(
            count(part), _count(part, r"MUFU\b"), _count(part, r"STL\b"), _count(part, r"LDL\b"),
            len(part),
        )
        for part in (code[a : b + 1] for a, b in inner)
    ]  # fmt: skip
