"""A run of three stages of the small model, and all that must be the same when it was stopped."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.training import checkpoints
from mmkernels.training.finetune import Finetuning
from mmkernels.training.loop import Settings, Trainer, read_log
from mmkernels.training.pretrain import Pretraining
from mmkernels.training.recipes import LOOK, SHARES
from mmkernels.training.stages import Stage
from tests.training import small

STEPS = 7
# After these steps a stage ends.
BORDERS = (2, 4, 7)


class Killed(BaseException):
    """What no code catches, as the end of the process."""


def trainer(run: Path, *, save_every: float = 0.0) -> Trainer:
    """A new one, with a new model."""
    model, material = small.model(), small.material()
    words = torch.tensor(small.tokenizer().encode(small.TEXT))
    stages = [
        Stage("pretrain", 2, Pretraining(model, material, words, 0, 4), 2e-3, 1, accumulate=2),
        Stage("look", 2, Finetuning(model, material, LOOK, 0, 4), 2e-3, 1, final=1.0),
        Stage("finetune", 3, Finetuning(model, material, SHARES, 0, 10), 2e-3, 2, accumulate=2),
    ]
    settings = Settings(run, torch.device("cpu"), torch.float32, 1e9, save_every)
    return Trainer(model, stages, settings)


def outcome(trained: Trainer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and moments, and the log but for times."""
    tensors = dict(trained.model.state_dict())
    tensors |= checkpoints.optimizer_tensors(trained.optimizer, trained.names)
    kept = ("step", "stage", "loss", "rate", "norm", "tokens", "learned")
    log = [{key: line[key] for key in kept} for line in read_log(trained.settings.run)]
    return {name: x.clone() for name, x in tensors.items()}, log


def assert_same(trained: Trainer, whole: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> None:
    """To the bit."""
    tensors, log = outcome(trained)
    assert log == whole[1]
    assert tensors.keys() == whole[0].keys()
    for name, x in tensors.items():
        assert torch.equal(x, whole[0][name]), name
