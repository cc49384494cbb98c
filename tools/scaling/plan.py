"""How a training step is split over GPUs."""

from dataclasses import dataclass

from mmkernels.distributed.volume import Sizes
from tools.scaling import assumptions as a

FORMS = ("ring", "all_to_all")


@dataclass(frozen=True)
class Plan:
    """How many GPUs share what. A rank is tp GPUs of a node, which share its heads and widths.

    Attributes:
        form: "ring" or "all_to_all".
        dp: sequences in the step, one a group of sp ranks.
        sp: ranks that hold one sequence, in equal parts.
        tp: GPUs of a rank.

    Raises:
        ValueError: the form is unknown, or the sequence, the kv heads or the GPUs of a node do not
            divide so.
    """

    form: str
    dp: int
    sp: int
    tp: int

    def __post_init__(self) -> None:
        """Refuses what is no plan."""
        if self.form not in FORMS:
            raise ValueError(f"Plan: form is {self.form!r}; it must be one of {FORMS}")
        if a.POSITIONS % self.sp:
            raise ValueError(f"Plan: sp is {self.sp}; it must divide {a.POSITIONS} positions")
        if a.KV_HEADS % self.tp or a.NODE % self.tp:
            raise ValueError(
                f"Plan: tp is {self.tp}; it must divide {a.KV_HEADS} kv heads and the {a.NODE} "
                "GPUs of a node"
            )

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.dp * self.sp * self.tp

    @property
    def rows(self) -> int:
        """Positions of a rank."""
        return a.POSITIONS // self.sp

    @property
    def near(self) -> int:
        """Ranks of one sequence that share a node."""
        return min(self.sp, a.NODE // self.tp)

    @property
    def sizes(self) -> Sizes:
        """One attention call, of which each GPU of a rank computes and sends an equal part."""
        return Sizes(
            batch=1,
            shards=(self.rows,) * self.sp,
            heads=a.HEADS // self.tp,
            kv_heads=a.KV_HEADS // self.tp,
            head_dim=a.HEAD_DIM,
            value_dim=a.HEAD_DIM,
            itemsize=a.ITEM,
        )
