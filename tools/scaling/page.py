"""The predictions as tables for docs/scaling.md."""

from collections.abc import Sequence

from mmkernels._core.markdown import table
from tools.generated import ROOT, replaced
from tools.scaling import assumptions as a
from tools.scaling import attention, balance
from tools.scaling.plan import FORMS, Plan
from tools.scaling.predict import Prediction, best

PAGE = ROOT / "docs" / "scaling.md"
# As many sequences as GPUs allow, or a bounded number: numbers of GPUs where something changes.
WEAK = (1, 4, 8, 64, 1024, 16384)
BOUNDED = (64, 128, 256, 512, 1024, 4096, 16384)
STEP_HEADER = [
    "GPUs", "form", "dp × sp × tp", "sent: attention, parameters, activations, GB", "memory, GB",
    "step, s", "efficiency", "of peak",
]  # fmt: skip
LAYER_HEADER = [
    "tp", "sp", "positions a rank", "ring sends, GB", "ring, ms", "efficiency",
    "all_to_all sends, GB", "all_to_all, ms", "efficiency",
]  # fmt: skip
BALANCE_RANKS = (8, 64)
BOUNDS = {"slowest rank": balance.slowest, "ring in step": balance.in_step}
BALANCE_HEADER = ["mask", "order", *(f"P {n}: {name}" for n in BALANCE_RANKS for name in BOUNDS)]
# Shares of pairs hardly depend on the length.
BALANCE_ROWS = 1024


def assumed() -> str:
    """The numbers that all tables rest on."""
    return (
        "All tables are predictions, not measurements. "
        f"The model has {a.PARAMETERS / 1e9:.1f} G parameters, {a.LAYERS} layers of width "
        f"{a.WIDTH}, {a.HEADS} query and {a.KV_HEADS} kv heads of {a.HEAD_DIM}, MLPs of {a.FFN} "
        f"and a vocabulary of {a.VOCABULARY:,}; a context has {a.POSITIONS:,} positions, causal, "
        f"in zigzag order. A GPU has {a.PEAK_FLOPS / 1e12:.0f} TFLOP/s, of which kernels are "
        f"assumed to reach {a.MATMUL_SHARE} in products with parameters and {a.ATTENTION_SHARE} in "
        f"attention, {a.MEMORY / 1e9:.0f} GB, of which {a.MEMORY_SHARE} are used, and "
        f"{a.NVLINK / 1e9:.0f} GB/s to the other {a.NODE - 1} of its node, "
        f"{a.NETWORK / 1e9:.0f} GB/s to those of others; a transfer takes "
        f"{a.LATENCY * 1e6:.0f} µs more."
    )


def step_row(gpus: int, form: str, prediction: Prediction | None) -> list[str]:
    """What is predicted of a step, or why nothing is."""
    if prediction is None:
        why = f"cannot: more GPUs a sequence than the {a.HEADS} query heads"
        return [f"{gpus:,}", form, why, *[""] * (len(STEP_HEADER) - 3)]
    plan = prediction.plan
    row = [
        f"{gpus:,}",
        form,
        f"{plan.dp} × {plan.sp} × {plan.tp}",
        ", ".join(f"{sent / 1e9:,.0f}" for sent in prediction.sent.values()),
        f"{prediction.bytes_held / 1e9:.0f}",
    ]
    if not prediction.fits:
        usable = a.MEMORY * a.MEMORY_SHARE / 1e9
        return [*row, f"does not fit {usable:.0f} GB", "", ""]
    return [
        *row,
        f"{prediction.step:.1f}",
        f"{prediction.efficiency:.2f}",
        f"{prediction.of_peak:.2f}",
    ]


def steps(numbers: Sequence[int], sequences: int) -> str:
    """Whole steps on so many GPUs, of at most so many sequences."""
    rows = [step_row(gpus, form, best(gpus, form, sequences)) for gpus in numbers for form in FORMS]
    said = f"Predicted, not measured; at most {sequences:,} sequences in a step."
    return f"{said}\n\n{table(STEP_HEADER, rows)}"


def layer_cells(plan: Plan) -> list[str]:
    """Sent bytes, time and efficiency of one layer's attention, forward and backward."""
    sent = sum(attention.sent(plan, backward) for backward in (False, True))
    seconds = sum(attention.seconds(plan, backward) for backward in (False, True))
    alone = sum(
        attention.compute_seconds(attention.VISIBLE, a.HEADS, backward)
        for backward in (False, True)
    ) / (plan.sp * plan.tp)
    return [f"{sent / 1e9:.2f}", f"{seconds * 1e3:,.0f}", f"{alone / seconds:.2f}"]


def layers() -> str:
    """One layer's attention, split over more and more ranks."""
    rows = []
    for tp in (1, a.NODE):
        for sp in (4, 8, 16, 32, 64, 128, 256, 1024):
            cells = layer_cells(Plan("ring", 1, sp, tp))
            if sp <= a.HEADS // tp:
                cells += layer_cells(Plan("all_to_all", 1, sp, tp))
            else:
                cells += ["too few heads", "", ""]
            rows.append([str(tp), str(sp), f"{a.POSITIONS // sp:,}", *cells])
    network, nvlink = (
        " and ".join(f"{attention.least_rows(link, back):,.0f}" for back in (False, True))
        for link in (a.NETWORK, a.NVLINK)
    )
    said = (
        "Predicted, not measured: one layer, forward and backward, of one sequence. A step of the "
        "ring takes as long as its transfer, forward and backward, with "
        f"{network} positions a rank between nodes, {nvlink} inside one."
    )
    return f"{said}\n\n{table(LAYER_HEADER, rows)}"


def balances() -> str:
    """How evenly masks spread."""
    rows = []
    for name, mask in balance.MASKS.items():
        for layout in balance.LAYOUTS:
            cells = []
            for ranks in BALANCE_RANKS:
                work = balance.pairs(mask(BALANCE_ROWS), layout, ranks)
                cells += [f"{bound(work):.2f}" for bound in BOUNDS.values()]
            rows.append([name, layout, *cells])
    counted = f"Counted over {BALANCE_ROWS} positions, not measured; 1.00 is even."
    return f"{counted}\n\n{table(BALANCE_HEADER, rows)}"


def page() -> str:
    """What docs/scaling.md should be."""
    text = replaced(PAGE.read_text(), "assumptions", assumed())
    text = replaced(text, "predicted layers", layers())
    text = replaced(text, "predicted weak scaling", steps(WEAK, max(WEAK)))
    text = replaced(text, "predicted bounded batch", steps(BOUNDED, a.MAX_SEQUENCES))
    return replaced(text, "balance", balances())
