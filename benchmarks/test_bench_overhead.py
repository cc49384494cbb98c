"""What a call of mmkernels.attention costs beyond torch's SDPA where there is little to compute."""

import pytest
import torch
import torch.nn.functional as F

import mmkernels as mm
from benchmarks.environment import SEED
from benchmarks.timing import clock, interleaved, summary
from mmkernels import testing

pytestmark = pytest.mark.benchmark(timer=clock)

REPEATS, CALLS = 5, 5000
QUICK_REPEATS, QUICK_CALLS = 2, 50

# Mode -> microseconds that a call may add; None: reported only.
LIMITS = {"forward": 25, "forward that records a graph": 45, "forward + backward": None}


@pytest.mark.parametrize("mode", LIMITS)
def test_overhead(benchmark, quick, mode):
    repeats, calls = (QUICK_REPEATS, QUICK_CALLS) if quick else (REPEATS, CALLS)
    qkv = testing.make_qkv(1, 16, 16, 4, 4, 32, seed=SEED)
    transposed = [x.transpose(1, 2) for x in qkv]
    if mode != "forward":
        for x in (*qkv, *transposed):
            x.requires_grad_()
    dout = torch.randn_like(qkv[0])
    dout_transposed = dout.transpose(1, 2)
    torch.testing.assert_close(
        mm.attention(*qkv), F.scaled_dot_product_attention(*transposed).transpose(1, 2)
    )

    # Two plain loops, since a call of a function in between would count as overhead.
    def ours() -> None:
        for _ in range(calls):
            mm.attention(*qkv)

    def sdpa() -> None:
        for _ in range(calls):
            F.scaled_dot_product_attention(*transposed)

    def ours_backward() -> None:
        for _ in range(calls):
            torch.autograd.grad(mm.attention(*qkv), qkv, dout)

    def sdpa_backward() -> None:
        for _ in range(calls):
            out = F.scaled_dot_product_attention(*transposed)
            torch.autograd.grad(out, transposed, dout_transposed)

    backward = mode == "forward + backward"
    pair = (ours_backward, sdpa_backward) if backward else (ours, sdpa)
    loops = interleaved(dict(zip(("mmkernels", "SDPA"), pair, strict=True)), repeats)
    times = {name: [t / calls for t in loop] for name, loop in loops.items()}
    benchmark.extra_info.update(
        kind="overhead",
        mode=mode,
        dtype="float32",
        shape="B1 H4 S16 D32",
        calls=calls,
        added_us=1e6 * (min(times["mmkernels"]) - min(times["SDPA"])),
        best_us={name: 1e6 * min(t) for name, t in times.items()},
        target=LIMITS[mode],
        ours=summary(times["mmkernels"]),
        peers={"SDPA": summary(times["SDPA"])},
    )
    clock.replay(benchmark, times["mmkernels"])
