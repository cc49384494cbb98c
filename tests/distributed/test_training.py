"""Does a run that is spread over processes learn what it learns in one, and go on in another?"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training import checkpoints
from mmkernels.training.finetune import Finetuning
from mmkernels.training.loop import Settings, Trainer, read_log
from mmkernels.training.pretrain import Pretraining
from mmkernels.training.recipes import LOOK, SHARES
from mmkernels.training.stages import Stage
from mmkernels.training.world import Plan, World, whole
from tests.distributed import world
from tests.training import small

PLANS = {
    "FSDP": Plan(dp=2),
    "DDP": Plan(dp=2, ddp=True),
    "sequence, DDP": Plan(sp=2, ddp=True),
    "tensor": Plan(tp=2),
    "FSDP, sequence": Plan(dp=2, sp=2),
    "FSDP, tensor": Plan(dp=2, tp=2),
    "sequence, tensor": Plan(sp=2, tp=2),
}
STEPS = 6


def model() -> MultimodalModel:
    """`small.model` with heads that two processes can share."""
    torch.manual_seed(0)
    config = small.model_config(len(small.tokenizer()))
    sizes = replace(config.decoder, num_attention_heads=4, num_key_value_heads=2)
    return MultimodalModel(replace(config, decoder=sizes), small.tokenizer()).eval()


def trainer(run: Path, plan: Plan) -> Trainer:
    os.environ["WORLD_SIZE"] = str(plan.size)
    made, material = model(), small.material()
    words = torch.tensor(small.tokenizer().encode(small.TEXT))
    stages = [
        Stage("pretrain", 2, Pretraining(made, material, words, 0, 4), 2e-3, 1, accumulate=2),
        Stage("look", 1, Finetuning(made, material, LOOK, 0, 3), 2e-3, 1, final=1.0),
        Stage("finetune", 3, Finetuning(made, material, SHARES, 0, 8), 2e-3, 2),
    ]
    settings = Settings(run, torch.device("cpu"), torch.float32, 1e9, save_every=1e9)
    return Trainer(made, stages, settings, World(plan))


def train(run: Path, plan: Plan, until: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights and moments after so many steps; goes on from a checkpoint, if there is one."""
    trained = trainer(run, plan)
    trained.resume()
    trained.run(until)
    tensors = dict(trained.model.own_weights())
    tensors |= checkpoints.optimizer_tensors(trained.optimizer, trained.names)
    return {name: whole(x).clone() for name, x in tensors.items()}


def together(run: Path, plan: Plan, until: int = STEPS) -> dict[str, torch.Tensor]:
    if plan.size == 1:
        return train(run, plan, until)
    results = world.run(plan.size, train, run, plan, until)
    for other in results[1:]:
        for name, x in other.items():
            torch.testing.assert_close(x, results[0][name], rtol=0, atol=0)
    return results[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    return train(run, Plan()), read_log(run)


def assert_close(got, run, alone):
    expected, log = alone
    assert got.keys() == expected.keys()
    for line, wanted in zip(read_log(run), log, strict=True):
        for key in ("step", "stage", "rate", "tokens", "learned"):
            assert line[key] == wanted[key], key
        for key in ("loss", "norm"):
            assert line[key] == pytest.approx(wanted[key], rel=2e-3), (key, line["step"])
    for name, x in expected.items():
        if not name.endswith("|step"):
            # Adam turns a rounding error of a small gradient into a step of another size.
            error = (got[name] - x).norm() / (x.norm() + 1e-12)
            assert error < 2e-2, (name, float(error))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_it_learns_the_same(plan, tmp_path, alone):
    assert_close(together(tmp_path, plan), tmp_path, alone)


@pytest.mark.parametrize(
    "first, then",
    [
        (Plan(dp=2), Plan(dp=2, sp=2)),
        (Plan(dp=2, sp=2), Plan()),
        (Plan(), Plan(dp=2)),
        (Plan(sp=2, tp=2), Plan(dp=2, ddp=True)),
    ],
    ids=str,
)
def test_it_goes_on_with_other_numbers(first, then, tmp_path, alone):
    """Within a stage, whose moments are still needed."""
    together(tmp_path, first, 4)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    assert_close(together(tmp_path, then), tmp_path, alone)


def test_it_goes_on_exactly(tmp_path):
    """The same processes: to the bit, though checkpoints are written while training goes on."""
    straight = together(tmp_path / "straight", Plan(dp=2))
    together(tmp_path / "stopped", Plan(dp=2), 4)
    stopped = together(tmp_path / "stopped", Plan(dp=2))
    for name, x in straight.items():
        assert torch.equal(stopped[name], x), name


def test_wrong_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"needs 4 processes, and there are 3; .*torchrun"):
        World(Plan(dp=2, sp=2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="leave --ddp out"):
        World(Plan(dp=2, tp=2, ddp=True))


def unsplittable(run: Path) -> str:
    os.environ["WORLD_SIZE"] = "2"
    try:
        Trainer(small.model(), [], Settings(run, torch.device("cpu"), torch.float32, 1e9),
                World(Plan(tp=2)))  # fmt: skip
    except ValueError as error:
        return str(error)
    return "no error"


def test_heads_that_do_not_divide(tmp_path):
    for message in world.run(2, unsplittable, tmp_path):
        assert "num_attention_heads" in message and "--tp is 2" in message
