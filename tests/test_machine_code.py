"""The checks of compiled kernels themselves: that they pass what is right and see what is wrong."""

import pytest

from tests import machine_code

STAND_IN = """
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"
using namespace mmkernels;

// A producer copies one tile, a warpgroup multiplies it by itself.
__global__ void __launch_bounds__(256, 1)
    product(const __grid_constant__ CUtensorMap map, float* out) {
  extern __shared__ __align__(1024) __half tile[];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= WARPGROUP) {
    give_registers<24>();
    if (threadIdx.x == WARPGROUP) {
      barrier_arrive_expect(full, 8192);
      tma_load(tile, map, full, 0, 0, 0, 0);
    }
    return;
  }
  take_registers<240>();
  float d[32] = {};
  barrier_wait(full, 0);
  const uint64_t operand = k_major(shared_address(tile));
  wgmma_fence();
  wgmma<__half, Major::K>(d, operand, operand, false);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}
"""


WRONG = {
    "registers": ("(256, 1)", "(256)", "(C7508)"),
    "no setmaxnreg": ("(256, 1)", "(256)", "no USETMAXREG"),
    "read early": ("  wgmma_wait<0>();", "  d[0] *= 2;\n  wgmma_wait<0>();", "(C7517)"),
    "read in the group": ("  wgmma_commit();", "  d[0] *= 2;\n  wgmma_commit();", "(C7517)"),
    "no fence": ("  wgmma_fence();", "", "without a wgmma.fence"),
    "no commit": ("  wgmma_commit();", "", "without a wgmma.commit_group"),
    "no wait": ("  wgmma_wait<0>();", "  wgmma_wait<1>();", "without a wgmma.wait_group 0"),
    "no copy": ("      tma_load(tile, map, full, 0, 0, 0, 0);", "", "no UTMALDG"),
    "local memory": ("out[threadIdx.x * 32 + i]", "out[int(d[threadIdx.x % 32])]", "local="),
}


@pytest.mark.nvcc
@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_what_is_wrong_with_a_hopper_kernel_is_seen(wrong, tmp_path):
    pytest.importorskip("triton", reason="its package holds cuobjdump")
    written, instead, fault = WRONG.get(wrong, ("", "", ""))
    assert written in STAND_IN
    source = tmp_path / "stand_in.cu"
    source.write_text(STAND_IN.replace(written, instead, 1))
    code = machine_code.compiled(source, "90a", tmp_path)
    found = machine_code.faults(code) + machine_code.hopper_faults(code)
    assert any(fault in each for each in found) if wrong else found == []


GROUP = "wgmma.fence.sync.aligned;\n{ wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1}; }\n"
GROUP += "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ret;", None),
        (GROUP + WAIT, None),
        (f"{GROUP}$L: {GROUP}{WAIT.replace('0', '1')}@%p bra $L;{WAIT}", None),
        (GROUP + GROUP.replace("wgmma.fence", "// ") + WAIT, "wgmma.fence before"),
        (GROUP.replace("wgmma.commit_group", "// ") + WAIT, "before its group's"),
        (GROUP.replace("wgmma.commit_group", "// ") + GROUP + WAIT, "before the next wgmma.fence"),
        (GROUP.replace("wgmma.commit_group", "// "), "wgmma.commit_group behind"),
        (WAIT + GROUP, "wgmma.wait_group 0 behind"),
        (GROUP + WAIT.replace("0", "1"), "wgmma.wait_group 0 behind"),
        (f"{GROUP}wgmma.commit_group.sync.aligned;{WAIT}", "without a product"),
    ],
)
def test_products_are_fenced_committed_and_waited_for(body, fault):
    kernels = [
        f".visible .entry {name}(\n.param .u64 x\n){{ {text} }}\n"
        for name, text in (("other", GROUP + WAIT), ("this", body), ("last", ""))
    ]
    found = machine_code.wgmma_faults("".join(kernels))
    assert all(each.startswith("this: ") for each in found)
    assert any(fault in each for each in found) if fault else not found


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("mbarrier.init a; mbarrier.init b; fence.mbarrier_init; bar.sync 0;", None),
        ("mbarrier.init a; bar.sync 0;", "TMA may not know"),
        ("mbarrier.init a; fence.mbarrier_init; mbarrier.init b;", "TMA may not know"),
        ("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;", None),
        ("cp.async.bulk.wait_group.read 0; cp.async.bulk.commit_group;", "may outlast"),
        ("barrier.arrive 1, 2; barrier.sync 1, 2;", None),
        ("barrier.arrive 1, 2;", "nobody waits"),
    ],
)
def test_fences_and_waits_are_there(body, fault):
    found = machine_code.order_faults(f".visible .entry this(){{ {body} }}")
    assert [fault in each for each in found] == [True] if fault else not found
