"""Does `python -m mmkernels train` begin, refuse, stop and go on as it says?"""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn", "tqdm", "PIL", "matplotlib"):
    pytest.importorskip(library)

from mmkernels import __main__ as commands  # noqa: E402 (may be absent)
from mmkernels.models import smollm  # noqa: E402
from mmkernels.models.multimodal import MultimodalModel  # noqa: E402
from mmkernels.training import (  # noqa: E402
    cli,
    digits,
    recipes,
    report,
    run,
    speech,
)
from mmkernels.training.loop import read_log  # noqa: E402
from tests.training import small  # noqa: E402
from tests.training.driver import RECIPE  # noqa: E402


@pytest.fixture(autouse=True)
def small_recipe(monkeypatch):
    """The small model; signals as they were, afterwards."""
    small.install(monkeypatch, RECIPE)
    monkeypatch.delenv("MMKERNELS_DATA", raising=False)
    monkeypatch.setattr(report, "write", lambda *args, **options: "the table")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(out, *options):
    return commands.main(["train", "--quick", "--device", "cpu", "--out", str(out), *options])


def contents(folder):
    """Every file's sum."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def losses(out):
    return [(line["step"], line["stage"], line["loss"]) for line in read_log(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("command") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        small.install(patch, RECIPE)
        patch.delenv("MMKERNELS_DATA", raising=False)
        patch.setattr(report, "write", lambda *args, **options: "the table")
        before = signal.getsignal(signal.SIGTERM)
        assert train(out, "--dtype", "float32") == 0
        signal.signal(signal.SIGTERM, before)
    return out


def test_it_leaves_a_model_and_its_settings(whole):
    model = MultimodalModel.from_pretrained(whole / "model")
    assert model.config == small.model_config(len(model.tokenizer))
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["seed"] == 0 and settings["dtype"] == "float32"
    assert settings["recipe"]["finetune_steps"] == RECIPE.finetune_steps
    total = RECIPE.pretrain_steps + RECIPE.look_steps + RECIPE.finetune_steps
    assert [step for step, _, _ in losses(whole)] == list(range(1, total + 1))
    assert len(list((whole / "checkpoints").iterdir())) == 2


def test_deterministic_algorithms_are_as_before(tmp_path):
    for mode in ("default", "warn"):
        torch.set_deterministic_debug_mode(mode)
        before = torch.get_deterministic_debug_mode()
        assert train(tmp_path / mode) == 0
        assert torch.get_deterministic_debug_mode() == before


def test_a_folder_that_holds_a_run_is_refused(whole, capsys):
    before = contents(whole)
    assert train(whole) == 2
    said = capsys.readouterr().err
    assert str(whole) in said and "--resume" in said
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "seed 0"),
        (["--dtype", "bfloat16"], "dtype 'float32'"),
        (["--data", "there"], "data None"),
    ],
    ids=["seed", "dtype", "data"],
)
def test_going_on_otherwise_is_refused(options, words, whole, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(whole)
    assert train(whole, "--resume", *options) == 2
    assert words in capsys.readouterr().err
    assert contents(whole) == before


@pytest.mark.parametrize(
    "changes", [{"finetune_steps": 9}, {"finetune_rate": 1e-5}, {"shares": {"see": 1.0}}], ids=str
)
def test_going_on_with_another_recipe_is_refused(changes, whole, capsys, monkeypatch):
    monkeypatch.setitem(recipes.QUICK, "tiny", replace(RECIPE, **changes))
    before = contents(whole)
    assert train(whole, "--resume") == 2
    assert "recipe" in capsys.readouterr().err
    assert contents(whole) == before


def test_going_on_with_other_data_is_refused(tmp_path, capsys):
    """The same folder, with less in it."""
    data, out = tmp_path / "data", tmp_path / "run"
    (data / "fsdd" / "recordings").mkdir(parents=True)
    wav = data / "fsdd" / "recordings" / "0_jackson_7.wav"
    wav.write_bytes(b"")
    assert train(out, "--data", str(data)) == 0
    assert train(out, "--data", str(data), "--resume") == 0
    wav.unlink()
    assert train(out, "--data", str(data), "--resume") == 2
    assert "data {'recordings': 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**31)], "seed is 2147483648"),
    ],
    ids=["below", "above"],
)
def test_what_is_no_seed_is_refused(options, words, tmp_path, capsys):
    assert train(tmp_path / "run", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_folder_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert train(tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.undo()  # the true corpus, which reads the folder
    small_data = tmp_path / "absent"
    with pytest.raises(ValueError, match="absent; it must be a folder that exists"):
        run.train(
            RECIPE, tmp_path / "run", data=small_data, seed=0, device=torch.device("cpu"),
            dtype="float32", resume=False,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_that_lacks_a_package_can_be_begun_again(tmp_path, monkeypatch, capsys):
    """It has left nothing that forbids it."""

    def absent(data=None, quick=False):
        raise ModuleNotFoundError("spoken digits need a package")

    with monkeypatch.context() as patch:
        patch.setattr(speech, "load", absent)
        assert train(tmp_path / "run") == 2
    assert "spoken digits need a package" in capsys.readouterr().err
    assert train(tmp_path / "run") == 0


def test_what_is_missing_is_named_with_its_package(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec

    def find_spec(name, *rest):
        return None if name in ("sklearn", "tokenizers") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert train(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "pip install tokenizers scikit-learn" in said
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--device", "cuda", "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_run_resume_begins_one(whole, tmp_path):
    assert train(tmp_path / "run", "--resume", "--dtype", "float32") == 0
    assert losses(tmp_path / "run") == losses(whole)
    assert contents(tmp_path / "run" / "model") == contents(whole / "model")


def test_resuming_what_has_ended_changes_no_model(whole, capsys):
    before = contents(whole)
    assert train(whole, "--resume") == 0
    assert contents(whole) == before
    out = capsys.readouterr().out
    assert "the table" in out and f"chat --model {whole / 'model'}" in out


def test_micro_batches_and_checkpointing(whole, tmp_path):
    assert train(tmp_path / "less", "--dtype", "float32", "--checkpointing") == 0
    wanted = [loss for _, _, loss in losses(whole)]
    assert [loss for _, _, loss in losses(tmp_path / "less")] == pytest.approx(wanted, rel=1e-4)
    assert train(tmp_path / "more", "--dtype", "float32", "--accumulate", "2") == 0
    alone, two = (
        sum(line["tokens"] for line in read_log(out)) for out in (whole, tmp_path / "more")
    )
    assert two > 1.5 * alone


def test_no_micro_batch_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, "--accumulate", "0")
    assert "--accumulate is 0; it must be 1 or more" in capsys.readouterr().err


def test_another_seed_is_another_run(whole, tmp_path):
    assert train(tmp_path / "run", "--dtype", "float32", "--seed", "1") == 0
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))


def test_signals_leave_a_checkpoint_and_the_run_goes_on_to_the_same_end(whole, tmp_path):
    """SIGTERM in the first process, SIGINT in the second, and the third ends as if there were one.

    The driver waits for its signal after a step.
    """
    out, logged = tmp_path / "run", 0
    command = [sys.executable, "-m", "tests.training.driver", "--dtype", "float32", "--out", out]
    for number in (signal.SIGTERM, signal.SIGINT):
        resume = ["--resume"] * (logged > 0)
        variables = {"MMKERNELS_TEST_WAIT_AT": str(logged + 3), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, *resume], env=os.environ | variables, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 240
        while len(read_log(out)) < logged + 3:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        error = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 130, error
        assert "Traceback" not in error
        logged = len(read_log(out))
        newest = max((out / "checkpoints").iterdir())
        assert int(newest.name) == logged < len(read_log(whole))
        assert not (out / "model").exists()
    assert train(out, "--resume") == 0
    assert losses(out) == losses(whole)
    assert contents(out / "model") == contents(whole / "model")


def test_nothing_that_is_held_out_is_touched(whole, tmp_path, monkeypatch):
    """Whatever test digits and held-out recordings are, the model is the same."""
    banks, split = small.banks(), digits.split()
    banks |= {"real_test": small.bank(("theo",), "fsdd"), "real_speaker": small.bank(("george",))}
    for name, bank in banks.items():
        if name != "train":
            bank.mels.fill_(torch.nan)
    split["test"].images.fill_(torch.nan)
    split["test"].labels.fill_(-1)
    monkeypatch.setattr(speech, "load", lambda data=None, quick=False: banks)
    monkeypatch.setattr(digits, "split", lambda: split)
    assert train(tmp_path / "run", "--dtype", "float32") == 0
    assert contents(tmp_path / "run" / "model") == contents(whole / "model")
    # Of what is not held out, it is another one.
    split["train"].images[:100] = 0
    assert train(tmp_path / "other", "--dtype", "float32") == 0
    assert contents(tmp_path / "other" / "model") != contents(whole / "model")


def test_train_and_test_share_nothing():
    split = digits.split()
    train_index, test_index = (set(split[name].index.tolist()) for name in ("train", "test"))
    assert len(train_index) == 1437 and len(test_index) == 360
    assert not train_index & test_index
    assert set(speech.HELD_OUT_VARIANTS) < set(speech.VARIANTS)


def test_real_speech_is_said_where_there_is_any():
    synthetic, real = small.bank(("ann",)), small.bank(("theo",), "fsdd", 4)
    both = speech.SpeechBank(
        *(
            torch.cat((getattr(synthetic, n), getattr(real, n)))
            for n in ("mels", "lengths", "digits")
        ),
        synthetic.voices + real.voices,
        synthetic.sources + real.sources,
    )
    images = small.images()["train"].take(torch.arange(5))
    made = run.material(small.model(), images, both)
    for digit, sayable in enumerate(made.sayable):
        assert sayable == [10 + digit]
    made = run.material(small.model(), images, synthetic)
    assert [index for sayable in made.sayable for index in sayable] == list(range(10))
    lengths = [len(codes) * 4 for codes in made.sayings]
    assert lengths == synthetic.lengths.tolist()
    assert made.drawings.shape == (5, len(digits.COLOURS), 16)
    without = run.material(small.model(codecs=False), images, synthetic)
    assert without.drawings is without.sayings is without.sayable is None


def test_codecs_stay_as_they_were_trained(whole):
    begun, ended = (MultimodalModel.from_pretrained(whole / name) for name in ("start", "model"))
    for name, x in begun.state_dict().items():
        same = torch.equal(x.bfloat16().float(), ended.state_dict()[name])
        # Vectors near 1 may be the same when rounded.
        assert same or "_codec" not in name, name
        assert not same or "_codec" in name or x.ndim < 2, name


@pytest.mark.parametrize("stopped", [None, 2])
def test_a_backbone_stays_frozen_when_the_run_goes_on(stopped, tmp_path, monkeypatch):
    """requires_grad is in no file."""
    sizes = replace(small.model_config(len(small.tokenizer()), codecs=False), lora_rank=2)

    def multimodal():
        model = MultimodalModel(sizes, small.tokenizer())
        smollm.freeze(model)
        return model

    monkeypatch.setattr(smollm, "multimodal", multimodal)
    recipe = recipes.Recipe(
        "smol", pretrain_steps=0, look_steps=0, finetune_steps=4, finetune_questions=4,
        shares={"see": 1.0, "hear": 1.0}, evaluated=4,
    )  # fmt: skip
    monkeypatch.setitem(recipes.QUICK, "smol", recipe)
    smol = ["--preset", "smol", "--dtype", "float32"]
    if stopped:
        trained = run.Trainer.run
        with monkeypatch.context() as patch:
            patch.setattr(run.Trainer, "run", lambda self: trained(self, stopped))
            assert train(tmp_path / "run", *smol) == 0
    assert train(tmp_path / "run", "--resume", *smol) == 0
    begun = MultimodalModel.from_pretrained(tmp_path / "run" / "start").decoder.state_dict()
    ended = MultimodalModel.from_pretrained(tmp_path / "run" / "model").decoder.state_dict()
    for name, x in begun.items():
        assert torch.equal(x.bfloat16().float(), ended[name]) == ("lora" not in name), name


@pytest.mark.parametrize("preset", ["tiny", "smol"])
def test_recipes_have_what_their_presets_need(preset):
    for made in (recipes.FULL[preset], recipes.QUICK[preset] if preset == "smol" else recipes.TINY):
        assert made.preset == preset
        has_codecs = preset == "tiny"
        assert (made.pretrain_steps > 0) == (made.codec_steps > 0) == has_codecs
        assert {"draw", "say"} <= set(made.shares) or not has_codecs
        assert has_codecs or not {"draw", "say"} & set(made.shares)
    quick, full = recipes.QUICK[preset], recipes.FULL[preset]
    assert quick.evaluated < 100 <= full.evaluated  # by which the recordings are chosen
