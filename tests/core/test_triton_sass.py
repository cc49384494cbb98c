"""Does the look at the assembler's code find the loops that multiply tiles, and only them?"""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.triton_harness import compile_launch
from tests.triton_sass import Loop, disassembled, product_loops

pytestmark = pytest.mark.compiled


def sass(*lines: str) -> str:
    """Text as the disassembler writes it; a line that ends in a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/       {line} ;"
        for n, line in enumerate(lines)
    )


NESTED = sass(
    ".L_x_0:",
    "MUFU.EX2 R1, R2",
    ".L_x_1:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "MUFU.EX2 R1, R2",
    "@P1 BRA `(.L_x_2)",
    "STL [R1+0x8], R3",
    ".L_x_2:",
    "LDL.LU R4, [R1+0x8]",
    "LDL R4, [R1+0xc]",
    "@!P0 BRA `(.L_x_1)",
    "STL [R1], R3",
    "@P0 BRA `(.L_x_0)",
    "@P2 EXIT",
    "EXIT",
    ".L_x_3:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
    "@!P0 BRA `(.L_x_3)",
    "BRA `(.L_x_1)",
)


def test_only_the_innermost_loop_counts_and_no_return_from_a_wait():
    assert product_loops(NESTED) == [
        Loop(products=1, special=1, spills=1, reloads=2, instructions=7)
    ]


def test_loops_without_products_are_left_out():
    adds = sass(".L_x_0:", "IADD3 R1, R1, 0x1, RZ", "@P0 BRA `(.L_x_0)", "EXIT")
    assert product_loops(adds) == []
    few = sass(".L_x_0:", *["FFMA R1, R2, R3, R1"] * 10, "@P0 BRA `(.L_x_0)", "EXIT")
    assert product_loops(few) == []
    many = sass(".L_x_0:", *["FFMA R1, R2, R3, R1"] * 100, "@P0 BRA `(.L_x_0)", "EXIT")
    assert [loop.products for loop in product_loops(many)] == [100]


def test_beside_tensor_cores_no_fma_is_a_product():
    mixed = sass(
        ".L_x_0:", *["FFMA R1, R2, R3, R1"] * 100, "@P0 BRA `(.L_x_0)",
        ".L_x_1:", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [loop.products for loop in product_loops(mixed)] == [1]


@triton.jit
def gram(p_x, p_out, size, BLOCK: tl.constexpr):
    """The out (BLOCK, BLOCK) = the sum of x.T x over tiles of `size` rows, then over columns."""
    o_row, o_col = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, size, BLOCK):
        x = tl.load(p_x + (first + o_row[:, None]) * BLOCK + o_col[None, :])
        acc = tl.dot(tl.trans(x), x, acc, input_precision="ieee")
    total = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(0, size):
        total += tl.load(p_x + row * BLOCK + o_col)
    tl.store(p_out + o_row[:, None] * BLOCK + o_col[None, :], acc + total[None, :])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_real_kernel_has_one(arch, dtype):
    x, out = torch.zeros(256, 64, dtype=dtype), torch.zeros(64, 64)
    arguments = {"p_x": x, "p_out": out, "size": 256, "BLOCK": 64}
    compiled = compile_launch(gram, {"num_warps": 4, "num_stages": 2}, arguments, arch)
    (loop,) = product_loops(disassembled(compiled))
    assert loop.products > 0 and loop.spills == loop.special == 0
