"""Do the CUDA kernels move and compute no more than they must, as docs/cuda-kernels.md says?"""

import pytest
import torch

from mmkernels import testing
from tests import cuda_harness
from tools import cuda_pipes
from tools.cuda_pipes import Case
from tools.generated import replaced

emulated = [pytest.mark.nvcc, pytest.mark.ptxsim]


def forward(head_dim: int, length: int, arch: str):
    qkv = testing.make_qkv(1, length, length, 1, 1, head_dim, dtype=torch.bfloat16)
    tensors = [cuda_harness.on_device(x) for x in qkv]
    return cuda_harness.attention_forward(*tensors, arch=arch)[2]


# Bank conflicts of a launch's loads: the copy of out, whose rows are no whole number of 128 bytes.
@pytest.mark.parametrize(("head_dim", "conflicts"), [(64, 0), (128, 0), (80, 768), (96, 512)])
class TestPortableForward:
    pytestmark = emulated

    def test_nothing_is_moved_or_computed_twice(self, head_dim, conflicts):
        size, row_tiles = 1024, 8
        result = forward(head_dim, size, "sm_80")
        block_n = 64 if head_dim <= 80 else 48 if head_dim <= 96 else 32
        keys = -(-size // block_n) * block_n
        assert result["mma_flops"] == 4 * size * keys * head_dim
        assert result["lds_conflict"] <= conflicts and result["sts_conflict"] == 0
        row = head_dim * 2
        assert result["cpasync_bytes"] == size * row * (1 + 2 * row_tiles)
        assert result["gld_sectors"] <= 1.05 * result["cpasync_bytes"] / 32
        assert result["gst_sectors"] == size * (row + 4) / 32


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
class TestHopperForward:
    pytestmark = emulated

    def test_nothing_is_moved_or_computed_twice(self, head_dim):
        block_m = 192 if head_dim == 64 else 128
        size = 1152
        result = forward(head_dim, size, "sm_90a")
        assert result["mma_flops"] == 4 * size * size * head_dim
        assert result["lds_conflict"] == result["sts_conflict"] == 0
        row = -(-head_dim // 64) * 128  # in shared memory; TMA reads zeros beyond the head
        assert result["tma_ld_bytes"] == size * row * (1 + 2 * size // block_m)
        assert result["tma_st_bytes"] == size * row
        assert result["gst_sectors"] == size * 4 / 32, "lse"


# FlashAttention-3's forward kernel, counted in the same emulator: least useful share, most issue
# slots to the tensor cores' clocks, least ceiling and serial rate.
@pytest.mark.parametrize(
    ("case", "share", "issue", "ceiling", "serial"),
    [
        (Case("forward", "sm_90a", 128, 1024, "full"), 0.97, 0.89, 959, 634),
        (Case("forward", "sm_90a", 128, 1024, "causal"), 0.89, 0.82, 879, 579),
        (Case("forward", "sm_90a", 128, 2048, "full"), 0.97, 0.72, 959, 634),
        (Case("forward", "sm_90a", 128, 2048, "causal"), 0.94, 0.62, 931, 614),
        (Case("forward", "sm_90a", 64, 2048, "full"), 0.94, 1.03, 903, 460),
    ],
)
def test_the_hopper_kernel_asks_no_more_than_the_best_published_one(
    case, share, issue, ceiling, serial
):
    (line,) = (row for row in committed() if row[:5] == cells(case))
    figures = [float(x) for x in line[5:]]
    assert figures[0] >= share and figures[1] <= issue
    assert figures[4] >= ceiling and figures[5] >= serial


def committed() -> list[list[str]]:
    """The table's rows as they stand in the docs."""
    _, _, rest = cuda_pipes.PAGE.read_text().partition(f"<!-- begin {cuda_pipes.BLOCK} -->")
    lines = [line for line in rest.partition("<!-- end")[0].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == cuda_pipes.HEADER, "run python -m tools.cuda_pipes"
    return rows


def cells(case: Case) -> list[str]:
    """How a case's row begins."""
    names = [case.kernel, cuda_pipes.NAMES[case.arch]]
    return [*names, str(case.head_dim), str(case.length), case.mask]


def test_every_case_has_its_row():
    assert [row[:5] for row in committed()] == [cells(case) for case in cuda_pipes.CASES]


@pytest.mark.nvcc
@pytest.mark.ptxsim
@pytest.mark.parametrize("case", cuda_pipes.CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_case_counted_again_gives_the_same_row(case):
    if f", {cuda_pipes.compiler()};" not in cuda_pipes.PAGE.read_text():
        pytest.skip(f"the table was made with another compiler than {cuda_pipes.compiler()}")
    again = cuda_pipes.row(case)
    assert again in committed(), f"now {again}; run python -m tools.cuda_pipes"


def test_only_the_block_is_rewritten():
    page = cuda_pipes.PAGE.read_text()
    head, _, tail = page.partition(f"<!-- begin {cuda_pipes.BLOCK} -->")
    rewritten = replaced(page, cuda_pipes.BLOCK, "new")
    assert rewritten.startswith(head) and rewritten.endswith(tail.partition("<!-- end")[2])
