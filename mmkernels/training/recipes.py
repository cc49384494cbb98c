"""What each preset is trained on and for how long."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Task -> its share of the conversations: of the stage that learns to look, and of all tasks.
LOOK = {"see": 1.0}
SHARES = {
    "see": 1.5, "hear": 1.0, "read": 1.0, "sum": 1.0, "same": 0.7, "describe": 1.0, "draw": 0.7,
    "say": 0.7, "talk": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained.

    Attributes:
        preset: the model's name in `models.config`.
        codec_steps: optimizer steps of each codec; 0 where there are none.
        judge_steps: of the judge of speech.
        pretrain_steps: of the first stage; 0: none.
        look_steps: of the second, which asks about large digits only: seeing is slow to begin.
        finetune_steps: of the last.
        pretrain_rate: peak learning rate.
        finetune_rate: likewise.
        pretrain_documents: of a step.
        finetune_questions: of a step.
        shares: task -> its share of the conversations.
        evaluated: questions of each task in the evaluation.
        vocabulary: text ids to learn.
        accumulate: micro-batches of a step, each with so many documents or questions.
        checkpointing: compute the decoder's layers again in the backward pass, to save memory.
    """

    preset: str
    codec_steps: int = 1500
    judge_steps: int = 400
    pretrain_steps: int = 250
    look_steps: int = 250
    finetune_steps: int = 2000
    pretrain_rate: float = 1e-3
    finetune_rate: float = 2e-3
    pretrain_documents: int = 64
    finetune_questions: int = 96
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    evaluated: int = 400
    vocabulary: int = 1024
    accumulate: int = 1
    checkpointing: bool = False


TINY = Recipe("tiny")
_SMOL_TASKS = ("see", "hear", "sum", "same", "describe")
SMOL = Recipe(
    "smol",
    codec_steps=0,
    pretrain_steps=0,
    look_steps=0,
    finetune_steps=2000,
    finetune_rate=1e-3,
    finetune_questions=64,
    shares={task: SHARES[task] for task in _SMOL_TASKS},
    evaluated=200,
)
QUICK = {
    "tiny": replace(
        TINY,
        # Two tasks, in small steps and many: what is slow to begin wants steps, not documents.
        codec_steps=150,
        judge_steps=0,
        pretrain_steps=250,
        look_steps=150,
        finetune_steps=300,
        pretrain_documents=24,
        finetune_questions=32,
        shares={"see": 1.0, "hear": 1.0},
        evaluated=60,
    ),
    "smol": replace(SMOL, judge_steps=0, finetune_steps=60, finetune_questions=16, evaluated=20),
}
FULL = {"tiny": TINY, "smol": SMOL}
