"""Is one step of training what it should be: gradients, clipping, decay, rate, FLOPs?"""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

for library in ("tokenizers", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(library)

from mmkernels.models.batch import IGNORED  # noqa: E402 (may be absent)
from mmkernels.models.chat_format import Document  # noqa: E402
from mmkernels.training.finetune import Finetuning  # noqa: E402
from mmkernels.training.loop import Settings, Trainer, read_log  # noqa: E402
from mmkernels.training.recipes import SHARES  # noqa: E402
from mmkernels.training.stages import Stage, pack  # noqa: E402
from tests.training import small  # noqa: E402


def conversations(count, seed=3):
    return Finetuning(small.model(), small.material(), SHARES, seed, count)(0, 0)


def unlearned():
    """A document without a token to learn."""
    document = Document()
    document.add(small.tokenizer().encode("seven"), False)
    return document


def step(run, micros, steps=1, dtype=torch.float32, **settings):
    """A trainer that has done steps on these micro-batches' documents, not clipped."""
    settings = {"clip": 1e9, "weight_decay": 0.0, **settings}
    stage = Stage(
        "one", steps, lambda step, micro: micros[micro], 1e-2, 1, accumulate=len(micros), **settings
    )
    model = small.model()
    trainer = Trainer(model, [stage], Settings(run, torch.device("cpu"), dtype, 1e9))
    trainer.before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trainer.run()
    return trainer


def gradients(trainer):
    """Those of the first step: the first moment is a tenth of them."""
    states = trainer.optimizer.state
    return {
        name: states[parameter]["exp_avg"] * 10
        for name, parameter in zip(trainer.names, trainer.parameters, strict=True)
        if parameter in states
    }


@pytest.mark.parametrize("cuts", [(10,), (1,), (3, 4), (0,)], ids=str)
def test_micro_batches_together_are_one_batch(cuts, tmp_path):
    """However few tokens are learned in one of them, even none."""
    documents = sorted(conversations(20), key=lambda document: sum(document.learned))
    bounds = [0, *cuts, len(documents)]
    parts = [documents[a:b] or [unlearned()] for a, b in itertools.pairwise(bounds)]
    one, many = step(tmp_path / "one", [documents]), step(tmp_path / "many", parts)
    want, got = gradients(one), gradients(many)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    log = [read_log(trainer.settings.run)[0] for trainer in (one, many)]
    for key in ("loss", "norm"):
        assert log[0][key] == pytest.approx(log[1][key], rel=1e-5)
    assert log[0]["learned"] == log[1]["learned"]
    assert log[0]["learned"] == sum(sum(document.learned) for document in documents)


def test_the_loss_is_the_mean_over_learned_tokens(tmp_path):
    documents = conversations(6)
    batch = pack(documents, 256)
    logits = (model := small.model()).decoder.logits(model.hidden(batch)).double().log_softmax(-1)
    at = (batch.targets != IGNORED).nonzero(as_tuple=True)
    want = -logits.detach()[(*at, batch.targets[at])].mean()
    trainer = step(tmp_path, [documents])
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(float(want), rel=1e-5)
    assert trainer.step == 1


def test_a_step_without_anything_to_learn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'one' has no token to learn in its step 0"):
        step(tmp_path, [[unlearned()], [unlearned()]])


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    model = small.model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    stage = Stage("one", 2, lambda step, micro: conversations(3), 1e-2, 1)
    trainer = Trainer(model, [stage], Settings(tmp_path, torch.device("cpu"), torch.float32, 1e9))
    trainer.run(until=0)
    monkeypatch.setattr(
        type(model), "forward", lambda self, *_: self.decoder.norm.weight.log().sum() / 0
    )
    with pytest.raises(RuntimeError, match="non-finite"):
        trainer.run()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["00000000"]


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e9])
def test_the_gradient_is_clipped(clip, tmp_path):
    free = step(tmp_path / "a", [conversations(5)])
    norm = torch.stack([g.norm() for g in gradients(free).values()]).norm()
    clipped = step(tmp_path / "b", [conversations(5)], clip=clip)
    got = torch.stack([g.norm() for g in gradients(clipped).values()]).norm()
    assert float(got) == pytest.approx(min(float(norm), clip), rel=1e-4)
    assert read_log(tmp_path / "b")[0]["norm"] == pytest.approx(float(norm), rel=1e-4)


def test_adamw_decays_matrices_only(tmp_path):
    decay, rate = 0.3, 1e-2
    trainer = step(tmp_path, [conversations(5)], weight_decay=decay)
    seen = set()
    for name, gradient in gradients(trainer).items():
        before = trainer.before[name]
        matrix = before.ndim >= 2
        seen.add(matrix)
        want = before * (1 - rate * decay * matrix) - rate * gradient / (gradient.abs() + 1e-8)
        got = dict(trainer.model.named_parameters())[name].detach()
        # Where the gradient is rounding error, so is its sign.
        sure = gradient.abs() > 1e-6
        torch.testing.assert_close(got[sure], want[sure], rtol=1e-4, atol=1e-5, msg=name)
    assert seen == {True, False}


def test_the_rate_of_each_step_is_the_schedules(tmp_path):
    trainer = step(tmp_path, [conversations(2)], steps=6)
    want = [trainer.stages[0].rate(step) for step in range(6)]
    assert [line["rate"] for line in read_log(tmp_path)] == want
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {want[-1]}


def test_what_is_frozen_stays(tmp_path):
    model = small.model()
    for parameter in model.decoder.parameters():
        parameter.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    stage = Stage("one", 2, lambda step, micro: conversations(5), 1e-2, 1)
    settings = Settings(tmp_path, torch.device("cpu"), torch.float32, 1e9)
    Trainer(model, [stage], settings).run()
    for name, x in model.state_dict().items():
        assert torch.equal(before[name], x) == (not name.startswith(("image_emb", "audio_emb"))), (
            name
        )


def test_names_and_parameters_stay_in_one_order(tmp_path):
    model = small.model()
    trainer = Trainer(model, [], Settings(tmp_path, torch.device("cpu"), torch.float32, 1e9))
    names = list(trainer.names)
    for _ in range(3):
        trainer.optimizer = trainer._new_optimizer()
        flat = [x for group in trainer.optimizer.param_groups for x in group["params"]]
        assert trainer.names == names
        known = dict(model.named_parameters())
        assert all(known[name] is x for name, x in zip(names, flat, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_of_the_products(frozen, tmp_path):
    """As torch counts them in eager text; there, hidden scores count, too, and here they do not."""
    model = small.model()
    model.use_kernels(False)
    if frozen:
        for parameter in model.decoder.parameters():
            parameter.requires_grad_(False)
        model.decoder.norm.weight.requires_grad_(True)
        model.decoder.layers[0].input_layernorm.weight.requires_grad_(True)
    document = Document()
    document.add(torch.arange(100).tolist(), True)
    batch = pack([document], 100)
    trainer = Trainer(model, [], Settings(tmp_path, torch.device("cpu"), torch.float32, 1e9))
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    sizes = model.config.decoder
    scores = 12 * sizes.num_attention_heads * sizes.head_dim * sizes.num_hidden_layers
    hidden = scores * (100 * 100 - 100 * 101 / 2)
    want = counter.get_total_flops() - hidden
    assert trainer._flops(batch) == pytest.approx(want, rel=0.02)


def test_mfu_is_a_part_of_the_ceiling(tmp_path):
    trainer = step(tmp_path, [conversations(5)])
    line = read_log(tmp_path)[0]
    flops = trainer._flops(pack(conversations(5), 256))
    assert line["mfu"] == pytest.approx(flops / line["seconds"] / 1e9)
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
    assert line["tokens"] == sum(map(len, conversations(5)))
    assert 0 < line["data_seconds"] < line["seconds"]


def test_bfloat16_keeps_weights_and_moments_in_float32(tmp_path):
    trainer = step(tmp_path, [conversations(5)], dtype=torch.bfloat16)
    assert {x.dtype for x in trainer.model.parameters()} == {torch.float32}
    assert {x.dtype for x in gradients(trainer).values()} == {torch.float32}
    step(tmp_path / "whole", [conversations(5)])
    losses = [read_log(path)[0]["loss"] for path in (tmp_path, tmp_path / "whole")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
