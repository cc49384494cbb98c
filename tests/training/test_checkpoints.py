"""Is there a whole checkpoint at every moment, and are old ones removed?"""

import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from mmkernels.training import checkpoints
from mmkernels.training.checkpoints import KEPT, newest, save, set_aside


class Killed(BaseException):
    """What no code catches, as the end of the process."""


class Model(torch.nn.Linear):
    """What is asked of a model."""

    config = types.SimpleNamespace(to_dict=lambda: {"name": "line"})
    tokenizer = types.SimpleNamespace(to_json=lambda: "{}")

    def own_weights(self):
        return self.state_dict()


def write(run, step):
    """A checkpoint all of whose numbers are its step."""
    model = Model(2, 3)
    torch.nn.init.constant_(model.weight, step)
    return save(run, model, {"weight|exp_avg": torch.full((3, 2), float(step))}, {"step": step})


def steps(run):
    return sorted(int(folder.name) for folder in (run / "checkpoints").iterdir())


def test_it_gives_back_what_it_was_given(tmp_path):
    assert write(tmp_path, 7) == tmp_path / "checkpoints" / "00000007"
    found = newest(tmp_path)
    assert found.state == {"step": 7}
    assert torch.equal(found.weights["weight"], torch.full((3, 2), 7.0))
    assert torch.equal(found.optimizer["weight|exp_avg"], torch.full((3, 2), 7.0))
    assert set(found.weights) == {"weight", "bias"}


def test_there_is_none_at_first(tmp_path):
    assert newest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (0, 3, 5, 99, 100, 12345678):
        write(tmp_path, step)
        assert newest(tmp_path).state["step"] == step
        assert len(steps(tmp_path)) <= KEPT == 2
    assert steps(tmp_path) == [100, 12345678]


def test_damaged_ones_are_set_aside(tmp_path):
    """They neither count nor are lost; a second one of a step takes the place of the first."""
    write(tmp_path, 1)
    for text in ("", "changed"):
        for step in (8, 9):
            (write(tmp_path, step) / "state.json").write_text(text)
        set_aside(tmp_path, 1)
    write(tmp_path, 2)
    write(tmp_path, 3)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {
        "00000002", "00000003", "00000008.damaged", "00000009.damaged",
    }  # fmt: skip
    assert (folder / "00000008.damaged" / "state.json").read_text() == "changed"


def test_it_does_not_remove_what_it_has_just_written(tmp_path):
    for step in (8, 9, 1, 2):
        write(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 8, 9]


def test_a_damaged_one_of_the_same_step_is_written_anew(tmp_path):
    write(tmp_path, 4)
    (write(tmp_path, 5) / "model.safetensors").unlink()
    assert newest(tmp_path).state["step"] == 4
    write(tmp_path, 5)
    assert newest(tmp_path).state["step"] == 5
    assert steps(tmp_path) == [4, 5]


def test_what_is_no_checkpoint_is_not_looked_at(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "9").write_text("no folder")
    write(tmp_path, 2)
    assert newest(tmp_path).state["step"] == 2
    assert (tmp_path / "checkpoints" / "notes").is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_file_that_the_manifest_does_not_know(name, tmp_path, capsys):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / "manifest.json"
    files = json.loads(manifest.read_text())
    del files[name]
    manifest.write_text(json.dumps(files))
    assert newest(tmp_path).state["step"] == 1
    said = capsys.readouterr().err
    assert str(manifest.parent) in said and name in said


def calls_that_change_the_disk(monkeypatch, act):
    """Calls act() before each, and once amid every removal of a folder."""

    def before(owner, name):
        wrapped = getattr(owner, name)

        def call(*args, **options):
            act()
            return wrapped(*args, **options)

        monkeypatch.setattr(owner, name, call)

    before(os, "fsync")
    before(Path, "rename")
    before(Path, "mkdir")
    before(os, "unlink")  # what shutil.rmtree calls
    before(os, "rmdir")
    before(shutil, "rmtree")


def test_a_process_that_ends_at_any_moment_leaves_a_whole_one(tmp_path, monkeypatch):
    """It ends before the first call that changes the disk, then before the second, and so on."""
    moments = 0
    while True:
        run = tmp_path / str(moments)
        write(run, 1)
        write(run, 2)
        left = moments

        def act():
            nonlocal left
            if not left:
                raise Killed
            left -= 1

        with monkeypatch.context() as patch:
            calls_that_change_the_disk(patch, act)
            try:
                write(run, 3)
                ended = False
            except Killed:
                ended = True
        found = newest(run)
        assert found is not None and found.state["step"] in (2, 3)
        assert float(found.weights["weight"][0, 0]) == found.state["step"]
        write(run, 4)  # what was left half done is in nobody's way, and goes
        assert steps(run) == [found.state["step"], 4]
        if not ended:
            break
        moments += 1
    assert moments > 15


def test_moments_go_back_to_their_parameters():
    """By name, though the order in the file is another one."""
    model = Model(2, 3)
    names = [name for name, _ in model.named_parameters()]

    def optimizer():
        return torch.optim.AdamW(
            [{"params": [model.weight], "decays": True}, {"params": [model.bias], "decays": False}]
        )

    first = optimizer()
    (model.weight.sum() * 2 + model.bias.sum() * 3).backward()
    first.step()
    kept = checkpoints.optimizer_tensors(first, names)
    assert set(kept) == {
        f"{name}|{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")
    }
    second = optimizer()
    checkpoints.restore_optimizer(second, names, dict(reversed(kept.items())))
    for parameter in model.parameters():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value)
    assert [group["decays"] for group in second.param_groups] == [True, False]
    assert checkpoints.optimizer_tensors(optimizer(), names) == {}
    checkpoints.restore_optimizer(optimizer(), names, {})
