"""Are the bytes that attention sends those of the formulas, for collectives and the system?"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels.distributed import all_to_all_attention, ring_attention, volume
from tests.distributed import world
from tests.distributed.problems import FORMS, Problem

CALLS = {"ring_attention": ring_attention, "all_to_all_attention": all_to_all_attention}
# The system also counts what gloo writes before each message.
HEADERS = 64 * 1024
COUNTER = Path("/proc/self/io")


class Counted(TorchDispatchMode):
    """Bytes that all-to-alls send to other ranks, and in which order collectives and kernels come.

    A transfer is "sent" where it is started, and "waited" where its result is needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.order = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "_c10d_functional::all_to_all_single":
            x, _, send, _ = args
            own = send[torch.distributed.get_rank()]
            self.bytes += (sum(send) - own) * x.element_size()
            self.order.append("sent")
        elif name == "_c10d_functional::wait_tensor":
            self.order.append("waited")
        elif name in ("mmkernels::attention_forward", "mmkernels::attention_backward"):
            self.order.append("attention")
        return func(*args, **(kwargs or {}))


def written() -> int:
    """Bytes that this process has written to files and sockets."""
    lines = dict(line.split(": ") for line in COUNTER.read_text().splitlines())
    return int(lines["wchar"])


def passes(problem: Problem, counting: bool) -> list:
    """Of the forward and of the backward pass: bytes sent, and the order of events."""
    rank, device = torch.distributed.get_rank(), world.device_type(problem.ranks)
    mesh, layout = init_device_mesh(device, (problem.ranks,)), problem.make_layout()
    whole = problem.inputs()
    q, k, v = (layout.shard(whole[x], rank).to(device).requires_grad_() for x in ("q", "k", "v"))
    dout = layout.shard(whole["dout"], rank).to(device)
    out = CALLS[problem.form](q, k, v, mesh, layout)  # connections are made by the first call
    out.backward(dout)
    torch.distributed.barrier()
    seen: list = []

    def counted(act):
        mode: AbstractContextManager = Counted() if counting else nullcontext()
        before = written() if not counting else 0
        with mode as counts:
            result = act()
        seen.append((counts.bytes, counts.order) if counting else (written() - before, None))
        return result

    out = counted(lambda: CALLS[problem.form](q, k, v, mesh, layout, return_lse=problem.lse))
    if problem.lse:
        loss = sum(x.float().sum() for x in out)
        counted(lambda: loss.backward())
    else:
        counted(lambda: out.backward(dout))
    return seen


def formulas(problem: Problem) -> list[list[int]]:
    sizes = volume.Sizes(
        problem.batch, tuple(problem.make_layout().lengths), problem.heads, problem.kv_heads,
        problem.head_dim, problem.value_dim, problem.dtype.itemsize, problem.lse,
    )  # fmt: skip
    form = problem.form.removesuffix("_attention")
    return [getattr(volume, f"{form}_{part}")(sizes) for part in ("forward", "backward")]


PROBLEMS = {
    "even": {"layout": "zigzag", "seqlen": 64, "lse": False},
    "unequal": {"layout": "unequal", "lse": True},
    "bfloat16, wide values": {"dtype": torch.bfloat16, "value_dim": 24, "lse": False},
    "uneven heads": {"heads": 9, "kv_heads": 3, "lse": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_collectives_send_what_the_formulas_say(form, ranks, kind):
    problem = Problem(form, ranks=ranks, **PROBLEMS[kind])
    measured = world.run(ranks, passes, problem, True)
    for index, expected in enumerate(formulas(problem)):
        assert [seen[index][0] for seen in measured] == expected


@pytest.mark.skipif(not COUNTER.exists(), reason="the system counts no bytes of a process")
@pytest.mark.skipif(world.device_type(2) == "cuda", reason="NCCL writes to no sockets here")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_system_counts_the_same(form, ranks):
    """Each process's writes, as the kernel counts them: no byte more than headers."""
    problem = Problem(form, ranks=ranks, seqlen=4096, heads=8, kv_heads=4, head_dim=64,
                      value_dim=64, batch=1, lse=False)  # fmt: skip
    measured = world.run(ranks, passes, problem, False)
    for index, expected in enumerate(formulas(problem)):
        for seen, wanted in zip(measured, expected, strict=True):
            assert wanted > 20 * HEADERS
            assert wanted <= seen[index][0] <= wanted + HEADERS


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ring_sends_while_it_attends(ranks):
    """Each step's transfer is started before its attention, and waited for behind it."""
    for forward, backward in world.run(ranks, passes, Problem("ring_attention", ranks=ranks), True):
        step = ["sent", "attention", "waited"]
        assert forward[1] == step * (ranks - 1) + ["attention"]
        # Behind the first step, gradients travel beside the keys.
        order = "".join(event[0] for event in backward[1])
        first, middle, last = "sasw", "sawsw", "awsw"
        assert order == first + middle * (ranks - 2) + last
