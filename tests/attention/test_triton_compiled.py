"""Does what the table of configurations picks compile for every GPU, fit it, and run unspilled?"""

import importlib.metadata
import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from mmkernels._core import tuning
from mmkernels._core.triton_runtime import KNOWN_GPUS
from tests import triton_rows
from tests.triton_rows import (
    CAREFUL,
    DECODE_VARIANTS,
    FUNCTIONS,
    VARIANTS,
    Row,
    report,
    rows,
)

pytestmark = pytest.mark.compiled
slow = pytest.mark.slow
bf16, fp32 = torch.bfloat16, torch.float32
HEAD_DIMS = [64, 80, 96, 128, 256]


class Excuse(NamedTuple):
    """How many spills the row's loops may have, at most, and why."""

    spills: int
    reason: str


# By the row's name; what is not here spills nothing.
SPILLS_ALLOWED: dict[str, Excuse] = {
    "sm_90 forward D128 bfloat16 mask": Excuse(
        2, "2 in 2048 clocks of products; 64 keys need 40 % more instructions"
    ),
    "sm_90 backward_keys D256 bfloat16 mask": Excuse(
        7, "dk and dv alone take half of all registers"
    ),
    "sm_90 backward_queries D256 bfloat16 mask": Excuse(
        1, "one address in the loop over ragged tiles"
    ),
    # IEEE float32 keeps operands in registers, and 16 x 16 is the smallest tile that there is.
    **{
        f"{arch} forward D256 float32 mask": Excuse(1, "the smallest tile")
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
    },
    **{
        f"{arch} backward_queries D256 float32 mask": Excuse(16, "the smallest tile")
        for arch in ("sm_80", "sm_86", "sm_89", "sm_90")
    },
}
# The table is for this compiler; others may spill where it does not.
SPILLS_KNOWN = importlib.metadata.version("triton").startswith("3.8.")


def is_quick(row: Row) -> bool:
    """Is it in the normal run: one GPU of each family, in the dtype of most models."""
    archs = row.arch in ("sm_80", "sm_90", "sm_120")
    return archs and row.dtype == bf16 and row.head_dim != 96 and (row.masked or not row.has_bias)


ROWS = rows([arch for arch in KNOWN_GPUS if arch.startswith("sm_")], [bf16, fp32], HEAD_DIMS)
AMD_ROWS = rows(["gfx942"], [bf16, fp32], HEAD_DIMS)


def marked(which: list[Row]) -> list:
    return [pytest.param(row, marks=() if is_quick(row) else slow, id=str(row)) for row in which]


def misfits(row: Row) -> list[str]:
    """What of the row's code does not fit the GPU or the estimate."""
    found = report(row)
    limits = {"the GPU": KNOWN_GPUS[row.arch].shared, "the estimate": found.estimate}
    taken = found.resources.shared
    return [f"{taken} bytes of shared memory, {most} in {of}"
            for of, most in limits.items() if taken > most]  # fmt: skip


def loops_expected(row: Row) -> int:
    """Tiles that all rows see in full and ragged ones have a loop each, where there are both."""
    return 1 if row.kernel in ("backward_bias", "decode") else 2


@pytest.mark.parametrize("row", marked(ROWS))
def test_the_table_compiles_fits_and_spills_nothing(row, record_property):
    found = report(row)
    for loop in found.loops:
        record_property("reloads in a loop", loop.reloads)
    wrong = misfits(row)
    if len(found.loops) != loops_expected(row):
        wrong.append(f"{len(found.loops)} loops with products")
    if (found.careful is not None) != (row.kernel in CAREFUL and (row.masked or row.has_bias)):
        wrong.append("the loop for NaN is not there, or there without a need")
    allowed = SPILLS_ALLOWED[str(row)].spills if str(row) in SPILLS_ALLOWED else 0
    if SPILLS_KNOWN:
        wrong += [f"a loop with {x.spills} spills" for x in found.loops if x.spills > allowed]
    if row.arch == "sm_90" and row.dtype == bf16 and row.kernel != "decode":
        if not found.resources.hgmma:
            wrong.append("no products of four warps")
        one_tile = tuning.split_dim(row.head_dim)[1] == 0
        if found.resources.tma != (one_tile and row.kernel != "backward_bias"):
            wrong.append("copies by tensor maps" if found.resources.tma else "no tensor maps")
    assert not wrong, f"{row}, {row.config}: {'; '.join(wrong)}\n{found}"


@pytest.mark.parametrize("kernel", FUNCTIONS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_no_row_is_cut_down_on_the_gpu_that_it_is_for(arch, kernel):
    """An estimate that is too high would make small tiles of those that were chosen."""
    table = tuning.TABLE[tuning.family(KNOWN_GPUS[arch])][kernel]
    got = [Row(arch, kernel, width, bf16, True).config for width in tuning.WIDTHS]
    fields = slice(1, None) if kernel == "decode" else slice(None)  # BLOCK_M is the call's
    assert [config[fields] for config in got] == [config[fields] for config in table]


@pytest.mark.parametrize("row", marked(AMD_ROWS))
def test_the_table_compiles_and_fits_on_amd(row):
    assert not misfits(row)


@pytest.mark.skipif(not SPILLS_KNOWN, reason="the table is for Triton 3.8")
@pytest.mark.parametrize("name", [pytest.param(x, marks=slow) for x in SPILLS_ALLOWED])
def test_no_excuse_is_out_of_date(name):
    row = next(row for row in ROWS if str(row) == name)
    assert max(loop.spills for loop in report(row).loops) == SPILLS_ALLOWED[name].spills


QUICK_VARIANTS = [("forward", "bias"), ("backward_keys", "bias"), ("decode", "pages")]


def variants() -> list:
    """All kernels with everything that changes their code."""
    pairs = [("forward", variant) for variant in VARIANTS]
    pairs += [
        (kernel, variant)
        for kernel in ("backward_keys", "backward_queries")
        for variant in VARIANTS
        if variant != "sinks"
    ]
    pairs += [("decode", variant) for variant in DECODE_VARIANTS]
    every = [
        Row(arch, kernel, dim, bf16, True, variant)
        for kernel, variant in pairs
        for arch in ("sm_80", "sm_90")
        for dim in (64, 128)
    ]
    quick = [Row("sm_90", kernel, 64, bf16, True, variant) for kernel, variant in QUICK_VARIANTS]
    return [pytest.param(row, marks=() if row in quick else slow, id=str(row)) for row in every]


@pytest.mark.parametrize("row", variants())
def test_the_variants_compile_and_fit(row, record_property):
    """Spills are only noted: tiles are chosen for the plain kernels."""
    for loop in report(row).loops:
        record_property("spills in a loop", loop.spills)
    assert not misfits(row)


@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_a_row_is_of_the_kernel_and_configuration_that_it_says(kernel):
    row = Row("sm_80", kernel, 64, bf16, True)
    launch = triton_rows.launch_of(row)
    assert launch.kernel.__name__ == FUNCTIONS[kernel]
    config = report(row).config
    assert config == row.config._replace(
        BLOCK_M=config.BLOCK_M if kernel == "decode" else row.config.BLOCK_M
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_heads_of_72_are_copied_in_vectors(arch):
    """Their strides are multiples of 8, which Triton does not see by itself."""
    launch = triton_rows.launch_of(Row(arch, "forward", 72, bf16, True))
    ptx = launch.compile(arch).asm["ptx"]
    assert "cp.async" in ptx and not re.search(r"ld\.global\S*\.b16", ptx)
