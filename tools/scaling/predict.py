"""One training step on many GPUs: what each sends, holds and waits for, and the best split.

Predictions, not measurements.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log2

from mmkernels.distributed.volume import head_split
from tools.scaling import assumptions as a
from tools.scaling import attention
from tools.scaling.plan import Plan

# All-reduces of activations in a layer: two in each forward run, two in the backward pass.
REDUCES = 2 * (a.FORWARDS + 1)
# Collectives of a layer's parameters: gathered for both passes, gradients scattered.
COLLECTIVES = 3


@dataclass(frozen=True)
class Prediction:
    """What follows from a plan, for each GPU and one step.

    Attributes:
        plan: how the step is split.
    """

    plan: Plan

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes by what they carry."""
        plan = self.plan
        shards = plan.dp * plan.sp
        forward, backward = (attention.sent(plan, back) for back in (False, True))
        moved = a.PARAMETERS * ((COLLECTIVES - 1) * a.ITEM + a.SUM)
        # A sum is sent twice: as parts, then whole.
        summed = 2 * plan.rows * a.WIDTH * a.ITEM
        return {
            "attention": a.LAYERS * (a.FORWARDS * forward + backward),
            "parameters": moved / plan.tp * (shards - 1) / shards,
            "activations": a.LAYERS * REDUCES * summed * (plan.tp - 1) / plan.tp,
        }

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes by what they hold, in the backward pass of a layer."""
        plan, sizes = self.plan, self.plan.sizes
        heads = sizes.heads * a.HEAD_DIM
        # Input, two norms, two results; q, out, k, v; gate, up, their product.
        layer = 5 * a.WIDTH + 2 * heads + sizes.kv_elements + 3 * a.FFN // plan.tp
        if plan.form == "ring":
            # k and v that are here and that arrive, and this step's dk and dv; their sums as they
            # come, with this step's, and on their way. Of q, this step's dq and the sum.
            keys = 3 * sizes.kv_elements * (a.ITEM + a.SUM)
            moving = plan.rows * (keys + heads * (a.ITEM + a.SUM))
        else:
            shares = head_split(sizes.heads, sizes.kv_heads, plan.sp)
            of_share = max(2 * share.heads + 2 * len(share.kv_heads) for share in shares)
            # q, out, k and v of all positions, with their gradients.
            moving = 2 * a.POSITIONS * of_share * a.HEAD_DIM * a.ITEM
        return {
            "states": a.STATE * a.PARAMETERS / plan.gpus,
            # The largest unit, the next one, and a gradient before it is scattered.
            "gathered": a.HEAD_PARAMETERS / plan.tp * (2 * a.ITEM + a.SUM),
            "checkpoints": a.LAYERS * plan.rows * a.WIDTH * a.ITEM,
            # With their gradients.
            "layer": 2 * plan.rows * layer * a.ITEM,
            "buffers": moving if plan.sp > 1 else 0,
            "logits": 2 * min(plan.rows, a.LOGIT_ROWS) * a.VOCABULARY / plan.tp * a.SUM,
        }

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by what they go to."""
        plan = self.plan
        shards = plan.dp * plan.sp
        forward, backward = (attention.seconds(plan, back) for back in (False, True))
        # Each GPU of a node fetches a part through its own adapter; NVLink spreads it.
        link = a.NVLINK if plan.gpus <= a.NODE else min(a.NVLINK, a.NODE // plan.tp * a.NETWORK)
        # Rounds of a collective grow with the logarithm of its members; a sum goes there and back.
        gathering = a.LATENCY * a.LAYERS * COLLECTIVES * log2(shards)
        summing = a.LATENCY * a.LAYERS * REDUCES * 2 * log2(plan.tp)
        products = _product_flops(plan, a.FORWARDS) / (a.PEAK_FLOPS * a.MATMUL_SHARE)
        return {
            "attention": a.LAYERS * (a.FORWARDS * forward + backward),
            # Parameters travel while others are multiplied with.
            "products": max(products, self.sent["parameters"] / link + gathering),
            "activations": self.sent["activations"] / a.NVLINK + summing,
        }

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def bytes_held(self) -> float:
        """Bytes at the fullest moment."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU holds it."""
        return self.bytes_held <= a.MEMORY * a.MEMORY_SHARE

    @property
    def efficiency(self) -> float:
        """Seconds of the kernels alone, evenly split, over those of the step."""
        kernels = _attention_flops(self.plan, a.FORWARDS) / a.ATTENTION_SHARE
        kernels += _product_flops(self.plan, a.FORWARDS) / a.MATMUL_SHARE
        return kernels / a.PEAK_FLOPS / self.step

    @property
    def of_peak(self) -> float:
        """FLOPs that the model needs, none of them twice, over what the peak is in a step."""
        needed = _attention_flops(self.plan, 1) + _product_flops(self.plan, 1)
        return needed / a.PEAK_FLOPS / self.step


def _attention_flops(plan: Plan, forwards: int) -> float:
    """FLOPs of a GPU's even share of attention in a step."""
    forward, backward = (
        attention.flops(attention.VISIBLE, a.HEADS, back) for back in (False, True)
    )
    return a.LAYERS * (forwards * forward + backward) / (plan.sp * plan.tp)


def _product_flops(plan: Plan, forwards: int) -> float:
    """FLOPs of a GPU's products with parameters in a step; logits are computed once."""
    layers = a.LAYERS * a.LAYER_PARAMETERS * (forwards + 2)
    return 2 * plan.rows * (layers + a.HEAD_PARAMETERS * 3) / plan.tp


def plans(gpus: int, form: str, sequences: int) -> list[Plan]:
    """Every split in powers of two.

    Args:
        gpus: all of them, a power of two.
        form: "ring" or "all_to_all"; the latter takes no more ranks than a GPU has query heads.
        sequences: of the step, at most.

    Returns:
        The plans, perhaps none.

    Raises:
        ValueError: `gpus` is no power of two.
    """
    if gpus < 1 or gpus & (gpus - 1):
        raise ValueError(f"plans: gpus is {gpus}; splits are in powers of two, so it must be one")
    found = []
    for tp in (1, 2, 4, a.NODE):
        ranks = gpus // tp
        for sp in (2**power for power in range(ranks.bit_length())):
            most = a.POSITIONS // a.LEAST_ROWS if form == "ring" else a.HEADS // tp
            if sp <= most and ranks // sp <= sequences:
                found.append(Plan(form, ranks // sp, sp, tp))
    return found


def best(gpus: int, form: str, sequences: int) -> Prediction | None:
    """The split that takes least time a sequence; where none fits, the one that needs least memory.

    Args:
        gpus: all of them, a power of two.
        form: "ring" or "all_to_all".
        sequences: of the step, at most.

    Returns:
        What is predicted for it; None if no split has few enough sequences.
    """
    predictions = [Prediction(plan) for plan in plans(gpus, form, sequences)]
    fitting = [prediction for prediction in predictions if prediction.fits]
    if fitting:
        return max(fitting, key=lambda prediction: prediction.efficiency)
    return min(predictions, key=lambda prediction: prediction.bytes_held, default=None)
