"""Does the harness of Triton launches compile, run and record them as a GPU would?"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels._core.triton_runtime import KNOWN_GPUS, emulate, launch
from tests.triton_harness import (
    Launch,
    compile_launch,
    ptxsim_launcher,
    recording_launcher,
    resources,
    signature_of,
)

pytestmark = pytest.mark.compiled
OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit
def softmax(p_x, p_out, p_keep, size, stride, scale, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    o_x = tl.program_id(0) * stride + columns
    inside = columns < size
    if p_keep is not None:
        inside = inside & tl.load(p_keep + columns, inside, other=False)
    x = tl.load(p_x + o_x, inside, other=-float("inf")).to(tl.float32) * scale
    x = tl.exp(x - tl.max(x, 0))
    tl.store(p_out + tl.program_id(0) * size + columns, x / tl.sum(x, 0), columns < size)


@triton.jit
def matmul(p_a, p_b, p_out, K, stride_a, stride_b, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The out (BLOCK, BLOCK) = a (BLOCK, K) @ b (BLOCK, K).T."""
    rows, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(p_a + rows[:, None] * stride_a + k + ks[None, :])
        b = tl.load(p_b + rows[:, None] * stride_b + k + ks[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(p_out + rows[:, None] * BLOCK + rows[None, :], acc)


@triton.jit
def scores(desc_q, desc_k, p_out, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Sums over all keys j of q_i k_j times k_j: two products with one tile of keys."""
    b, h = tl.program_id(0), tl.program_id(1)
    q = desc_q.load([b, 0, h, 0]).reshape(BLOCK, HEAD_DIM)
    acc = tl.zeros((BLOCK, HEAD_DIM), tl.float32)
    for n in range(0, desc_k.shape[1].to(tl.int32), BLOCK):
        k = desc_k.load([b, n, h, 0]).reshape(BLOCK, HEAD_DIM)
        acc = tl.dot(tl.dot(q, k.T).to(k.dtype), k, acc)
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    p_out += (b * tl.num_programs(1) + h) * BLOCK * HEAD_DIM
    tl.store(p_out + rows[:, None] * HEAD_DIM + columns[None, :], acc)


@triton.jit
def scores_made_on_device(p_x, p_out, size, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    desc = tl.make_tensor_descriptor(p_x, [size, HEAD_DIM], [HEAD_DIM, 1], [BLOCK, HEAD_DIM])
    x = desc.load([tl.program_id(0) * BLOCK, 0])
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], x * 2)


@triton.jit
def one_word_past_the_end(p_x, size):
    tl.store(p_x + size, 1.0)


@pytest.fixture
def emulated() -> Iterator:
    """Sends launches to the emulator of a GPU, and returns its list of results."""

    def start(arch: str) -> list:
        launcher = ptxsim_launcher(KNOWN_GPUS[arch])
        emulate(launcher)
        return launcher.run.results

    yield start
    emulate(None)


def softmax_call(size: int = 100) -> tuple[dict, Tensor]:
    x, out = torch.randn(3, size + 28)[:, 4 : size + 4], torch.empty(3, size)
    arguments = {"p_x": x, "p_out": out, "p_keep": torch.arange(size) % 3 > 0, "size": size}
    wanted = (x * 0.5).masked_fill(~arguments["p_keep"], -torch.inf).softmax(1)
    return {**arguments, "stride": x.stride(0), "scale": 0.5, "BLOCK": 128}, wanted


def matmul_call(dtype: torch.dtype = torch.bfloat16, k: int = 128) -> tuple[dict, Tensor]:
    a, b = torch.randn(64, 2, k).to(dtype)[:, 1], torch.randn(64, k + 8).to(dtype)[:, 8:]
    strides = {"stride_a": a.stride(0), "stride_b": b.stride(0), "BLOCK": 64, "BLOCK_K": 64}
    out = torch.empty(64, 64)
    return {"p_a": a, "p_b": b, "p_out": out, "K": k, **strides}, a.float() @ b.float().T


def scores_call(head_dim: int) -> tuple[dict, Tensor]:
    """Over 2 batches, 100 keys and 3 heads; the last tile of keys is not full."""
    q = torch.randn(2, 64, 3, head_dim).mul(0.2).bfloat16()
    k = torch.randn(2, 100, 3, 2 * head_dim).mul(0.2).bfloat16()[..., head_dim:]
    p = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()).bfloat16().float()
    block = [1, 64, 1, head_dim]
    arguments = {
        "desc_q": TensorDescriptor.from_tensor(q, block),
        "desc_k": TensorDescriptor.from_tensor(k, block),
        "p_out": torch.empty(2, 3, 64, head_dim),
    }
    wanted = torch.einsum("bhqk,bkhd->bhqd", p, k.float())
    return {**arguments, "BLOCK": 64, "HEAD_DIM": head_dim}, wanted


def test_signature_is_specialised_as_by_triton():
    arguments, _ = softmax_call()
    signature, constexprs, attrs = signature_of(softmax, {**arguments, "p_keep": None, "stride": 1})
    assert signature == {
        **dict.fromkeys(["p_x", "p_out"], "*fp32"),
        **dict.fromkeys(["p_keep", "stride", "BLOCK"], "constexpr"),
        **{"size": "i32", "scale": "fp32"},
    }
    assert constexprs == {(2,): None, (4,): 1, (6,): 128}
    assert attrs[0,] == attrs[1,] == [["tt.divisibility", 16]]
    assert not attrs[3,]
    shifted = {**arguments, "p_x": arguments["p_x"][:, 1:], "size": 1 << 40, "stride": 128}
    signature, _, attrs = signature_of(softmax, shifted)
    assert (signature["p_keep"], signature["size"]) == ("*u1", "i64")
    assert not attrs[0,] and attrs[4,] == [["tt.divisibility", 16]]


def test_signature_of_a_descriptor_and_of_a_launch_that_lacks_one():
    arguments, _ = scores_call(64)
    assert signature_of(scores, arguments)[0]["desc_q"] == "tensordesc<bf16[1, 64, 1, 64]>"
    del arguments["desc_k"], arguments["p_out"]
    with pytest.raises(TypeError, match="scores: the launch lacks desc_k, p_out"):
        signature_of(scores, arguments)


@pytest.mark.parametrize("arch", KNOWN_GPUS)
def test_every_target_compiles_and_reports(arch):
    arguments, _ = matmul_call()
    found = resources(compile_launch(matmul, OPTIONS, arguments, arch))
    assert 0 < found.shared <= KNOWN_GPUS[arch].shared
    assert found.registers > 16 and found.stack == found.local == 0
    assert (found.hgmma, found.tma) == (arch == "sm_90", False)


def test_spills_are_seen():
    arguments = {**matmul_call()[0], "BLOCK": 256}
    assert resources(compile_launch(matmul, OPTIONS, arguments, "sm_90")).stack > 1000


def test_one_compilation_for_launches_that_differ_in_values_only():
    first, second = matmul_call(k=128)[0], matmul_call(k=256)[0]
    compiled = compile_launch(matmul, OPTIONS, first, "sm_90")
    assert compile_launch(matmul, OPTIONS, {**second, "stride_a": 64}, "sm_90") is compiled
    assert compile_launch(matmul, {**OPTIONS, "num_stages": 2}, first, "sm_90") is not compiled


def test_recorder_keeps_launches_and_runs_none():
    arguments, _ = softmax_call()
    launcher = recording_launcher(KNOWN_GPUS["sm_80"])
    emulate(launcher)
    launch(softmax, (3,), **OPTIONS, **arguments)
    emulate(None)
    assert launcher.run.launches == [Launch(softmax, (3,), OPTIONS, arguments)]
    assert arguments["p_out"].isnan().all()
    assert resources(launcher.run.launches[0].compile("sm_120")).shared > 0


@pytest.mark.ptxsim
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_emulated_softmax_of_a_view(arch, emulated):
    results = emulated(arch)
    arguments, wanted = softmax_call()
    launch(softmax, (3,), **OPTIONS, **arguments)
    torch.testing.assert_close(arguments["p_out"], wanted)
    assert [r.kernel for r in results] == ["softmax"] and results[0].result["mufu_lanes"] > 0


@pytest.mark.ptxsim
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_matmul(arch, dtype, emulated):
    results = emulated(arch)
    arguments, wanted = matmul_call(dtype)
    launch(matmul, (1,), **OPTIONS, **arguments)
    torch.testing.assert_close(arguments["p_out"], wanted, rtol=1e-4, atol=1e-4)
    flops = 2 * 64 * 64 * 128
    assert results[0].result["mma_flops"] == flops
    assert results[0].result.pipes(flops)["useful share of MMA FLOPs"] == 1


@pytest.mark.ptxsim
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_emulated_products_of_four_dimensional_tiles(head_dim, emulated):
    results = emulated("sm_90")
    arguments, wanted = scores_call(head_dim)
    launch(scores, (2, 3), **OPTIONS, **arguments)
    torch.testing.assert_close(arguments["p_out"], wanted, rtol=1e-2, atol=1e-2)
    assert results[0].result["tma_ld_bytes"] == 6 * 3 * 64 * head_dim * 2
    found = resources(compile_launch(scores, OPTIONS, arguments, "sm_90"))
    assert found.hgmma and found.tma


@pytest.mark.ptxsim
def test_emulated_descriptor_made_in_the_kernel(emulated):
    emulated("sm_90")
    x, out = torch.randn(100, 64), torch.empty(128, 64)
    sizes = {"size": 100, "BLOCK": 64, "HEAD_DIM": 64}
    launch(scores_made_on_device, (2,), **OPTIONS, p_x=x, p_out=out, **sizes)
    torch.testing.assert_close(out[:100], x * 2)
    assert not out[100:].any()


@pytest.mark.ptxsim
def test_emulator_refuses_a_write_past_the_end(emulated):
    emulated("sm_80")
    x = torch.zeros(32)
    with pytest.raises(AssertionError, match="out-of-bounds"):
        launch(one_word_past_the_end, (1,), **OPTIONS, p_x=x, size=32)


@pytest.mark.ptxsim
def test_empty_grid_launches_nothing(emulated):
    results = emulated("sm_90")
    arguments, _ = softmax_call()
    launch(softmax, (0,), **OPTIONS, **arguments)
    assert arguments["p_out"].isnan().all() and not results
