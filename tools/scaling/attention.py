"""One layer's attention: what a GPU sends, and how long it takes. Predictions, not measurements.

The mask is causal and the ring's order zigzag, so that all ranks have as many visible pairs of row
and key in every step.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from mmkernels.distributed import volume
from tools.scaling import assumptions as a
from tools.scaling.plan import Plan

FORMULAS = {
    ("ring", False): volume.ring_forward,
    ("ring", True): volume.ring_backward,
    ("all_to_all", False): volume.all_to_all_forward,
    ("all_to_all", True): volume.all_to_all_backward,
}
# Pairs of row and key that one sequence's causal mask leaves.
VISIBLE = a.POSITIONS * (a.POSITIONS + 1) // 2


def sent(plan: Plan, backward: bool) -> int:
    """Bytes that the GPU that sends most sends in one pass."""
    return max(FORMULAS[plan.form, backward](plan.sizes))


def flops(pairs: int, heads: int, backward: bool) -> float:
    """Two products of 2·D FLOPs a visible pair and head forward, five backward."""
    return 4 * a.HEAD_DIM * heads * pairs * (a.ATTENTION_BACKWARD if backward else 1)


def compute_seconds(pairs: int, heads: int, backward: bool) -> float:
    """Seconds of the kernels."""
    return flops(pairs, heads, backward) / (a.PEAK_FLOPS * a.ATTENTION_SHARE)


def seconds(plan: Plan, backward: bool) -> float:
    """Seconds of one pass, transfers included."""
    return _seconds(replace(plan, dp=1), backward)


def least_rows(link: float, backward: bool) -> float:
    """Positions a rank from which on a step's kernels take no less than its transfer.

    Latency is left out: S_r²/2 pairs against S_r positions of k and v, and of dk and dv.

    Args:
        link: bytes a second.
        backward: of which pass.
    """
    moved = a.KV_HEADS * 2 * a.HEAD_DIM * (a.ITEM + (a.SUM if backward else 0))
    return 2 * moved / link / compute_seconds(1, a.HEADS, backward)


@cache
def _seconds(plan: Plan, backward: bool) -> float:
    """Of one sequence, whatever others there are."""
    return (_ring if plan.form == "ring" else _all_to_all)(plan, backward)


def ring_steps(plan: Plan, backward: bool) -> Iterator[tuple[int, int]]:
    """Visible pairs that a rank computes in each step, and bytes that it sends meanwhile.

    dk and dv of a step are there when it ends, so that they travel during the next one, and those
    of the last step after it.
    """
    rows, sizes = plan.rows, plan.sizes
    inputs = rows * sizes.kv_elements * sizes.itemsize
    sums = rows * sizes.kv_elements * sizes.sum_itemsize if backward else 0
    for step in range(plan.sp):
        pairs = rows * (rows if step else rows + 1) // 2
        yield pairs, inputs * (step < plan.sp - 1) + sums * (step > 0)
    if backward and plan.sp > 1:
        yield 0, sums


def _ring(plan: Plan, backward: bool) -> float:
    """Each step lasts as long as the longer of compute and transfer."""
    sizes = plan.sizes
    link = a.NVLINK if plan.near == plan.sp else a.NETWORK
    summed = sizes.heads * a.HEAD_DIM + (sizes.kv_elements if backward else 0)
    # Every step but the first reads its result, and reads and writes the sum so far.
    merge = plan.rows * summed * (a.ITEM + 2 * a.SUM) / a.MEMORY_SPEED
    total = 0.0
    for step, (pairs, data) in enumerate(ring_steps(plan, backward)):
        compute = compute_seconds(pairs, sizes.heads, backward)
        compute += merge if pairs and step else 0.0
        total += max(compute, a.LATENCY + data / link if data else 0.0)
    return total


def _all_to_all(plan: Plan, backward: bool) -> float:
    """One exchange, attention over all positions, and one exchange."""
    sizes = plan.sizes
    shares = volume.head_split(sizes.heads, sizes.kv_heads, plan.sp)
    compute = compute_seconds(VISIBLE, max(share.heads for share in shares), backward)
    if plan.sp == 1:
        return compute
    data = sent(plan, backward)
    far = data * (plan.sp - plan.near) / (plan.sp - 1)
    # Both links are busy at once.
    return compute + 2 * a.LATENCY + max((data - far) / a.NVLINK, far / a.NETWORK)
