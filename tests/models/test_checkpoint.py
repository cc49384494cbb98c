"""Folders of models: exact, refused when damaged, and whole whenever a write is cut off."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from mmkernels.models import checkpoint
from mmkernels.models.batch import Batch
from mmkernels.models.multimodal import MultimodalModel
from tests.models import small

NAMES = ["config.json", "tokenizer.json", "model.safetensors", "manifest.json"]
OLD, NEW = {"a": b"old", "b": b"1" * 5000}, {"a": b"new", "c": b"2" * 5000}


class Killed(BaseException):
    """The process ended here."""


@pytest.fixture
def saved(shared_model: MultimodalModel, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shared_model.save_pretrained(folder)
    return folder


def test_a_model_comes_back_exactly(shared_model: MultimodalModel, saved: Path) -> None:
    loaded = MultimodalModel.from_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == sorted(NAMES)
    assert loaded.config == shared_model.config and not loaded.training
    weights = loaded.state_dict()
    assert weights.keys() == shared_model.state_dict().keys()
    for name, want in shared_model.state_dict().items():
        assert weights[name].dtype == want.dtype and torch.equal(weights[name], want), name
    batch = Batch.of([small.documents(shared_model)])
    assert torch.equal(loaded.loss(batch), shared_model.loss(batch))
    assert loaded.tokenizer.encode("What digit?") == shared_model.tokenizer.encode("What digit?")


def test_saving_leaves_the_model_alone(shared_model: MultimodalModel, tmp_path: Path) -> None:
    before = {name: x.clone() for name, x in shared_model.state_dict().items()}
    shared_model.save_pretrained(tmp_path / "low", torch.bfloat16)
    for name, x in shared_model.state_dict().items():
        assert x.dtype == before[name].dtype and torch.equal(x, before[name])
    low = MultimodalModel.from_pretrained(tmp_path / "low")
    for name, x in low.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, before[name].bfloat16().float()), name
    half = MultimodalModel.from_pretrained(tmp_path / "low", torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}


def test_a_model_with_adapters_and_without_codecs(tmp_path: Path) -> None:
    model = small.build(codecs=False, lora_rank=2, default_system="Be brief.")
    model.save_pretrained(tmp_path / "model")
    loaded = MultimodalModel.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.image_codec is None
    batch = Batch.of([small.documents(model)])
    assert torch.equal(loaded.loss(batch), model.loss(batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=name):
        MultimodalModel.from_pretrained(saved)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_cut_off(saved: Path, name: str) -> None:
    path = saved / name
    for kept in (0, 1, len(path.read_bytes()) - 1):
        data = path.read_bytes()
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=name):
            MultimodalModel.from_pretrained(saved)
        path.write_bytes(data)
    MultimodalModel.from_pretrained(saved)


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_byte_that_was_changed(saved: Path, name: str) -> None:
    path = saved / name
    data = bytearray(path.read_bytes())
    for index in (0, len(data) // 2, len(data) - 1):
        data[index] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} was changed"):
            MultimodalModel.from_pretrained(saved)
        data[index] ^= 1


@pytest.mark.parametrize(
    "manifest", ["[]", "3", "null", '{"config.json": 3}', '{"config.json": {"bytes": 1}}', "\xff"]
)
def test_a_manifest_that_is_none(saved: Path, manifest: str) -> None:
    (saved / "manifest.json").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        MultimodalModel.from_pretrained(saved)


def test_a_manifest_without_a_file(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["model.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        MultimodalModel.from_pretrained(saved)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no checkpoint"):
        MultimodalModel.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no checkpoint"):
        MultimodalModel.from_pretrained(tmp_path / "file")


def test_weights_of_another_model(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    weights = dict(loaded.weights)
    del weights["decoder.norm.weight"]
    tokenizer = (saved / "tokenizer.json").read_text()
    checkpoint.save(saved, weights, config=loaded.config, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"model\.safetensors holds the weights of another model"):
        MultimodalModel.from_pretrained(saved)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    checkpoint.write_folder(folder, OLD)
    (folder / "run.json").write_text("of the old one")
    checkpoint.write_folder(folder, NEW)
    assert checkpoint.read_folder(folder) == NEW
    assert {path.name for path in folder.iterdir()} == {*NEW, "manifest.json"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_folder(tmp_path / "model", OLD)
    monkeypatch.chdir(tmp_path / "model")
    checkpoint.write_folder(Path("../model"), NEW)
    assert checkpoint.read_folder(tmp_path / "model") == NEW


def test_a_link_stays_one(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "1", OLD)
    (tmp_path / "latest").symlink_to("1")
    checkpoint.write_folder(tmp_path / "latest", NEW)
    assert (tmp_path / "latest").is_symlink()
    assert (
        checkpoint.read_folder(tmp_path / "latest") == NEW == checkpoint.read_folder(tmp_path / "1")
    )


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint.write_folder(tmp_path / "empty", NEW)
    assert checkpoint.read_folder(tmp_path / "empty") == NEW
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("home", "file"):
        with pytest.raises(ValueError, match=f"{name} holds something else than a checkpoint"):
            checkpoint.write_folder(tmp_path / name, NEW)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    assert (tmp_path / "file").read_text() == "dear"


def dying(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Ends the process before the given one of its steps to the disk; says how many there were."""
    steps = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps - 1 == step:
                raise Killed
            return call(*args, **kwargs)

        return stepping

    for where, name in (
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "rename"),
        (shutil, "rmtree"),
        (checkpoint, "open"),
    ):
        call = open if name == "open" else getattr(where, name)
        monkeypatch.setattr(where, name, counted(call), raising=False)
    return lambda: steps


def interrupted(folder: Path, step: int) -> int:
    """Replaces a folder in a process that ends at a step; how many steps it took."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = dying(monkeypatch, step)
        with contextlib.suppress(Killed):
            checkpoint.write_folder(folder, NEW)
        return count()


def read(folder: Path) -> dict[str, bytes]:
    """A folder as `load` finds it, without what makes it a model's."""
    return checkpoint.read_folder(checkpoint.where(folder))


def test_a_write_that_is_cut_off_anywhere_leaves_a_whole_folder(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "whole", OLD)
    steps = interrupted(tmp_path / "whole", -1)
    assert steps >= 12
    found = []
    for step in range(steps):
        folder = tmp_path / f"{step}"
        checkpoint.write_folder(folder, OLD)
        assert interrupted(folder, step) == step + 1
        found.append(read(folder))
        # The next one is cut off, too, at every step, and then one is not.
        for again in range(3, steps, 4):
            interrupted(folder, again)
            assert read(folder) in (found[-1], NEW)
        checkpoint.write_folder(folder, NEW)
        assert checkpoint.read_folder(folder) == NEW
        assert not list(tmp_path.glob(f".{step}.*"))
    replaced = found.index(NEW)
    assert found == [OLD] * replaced + [NEW] * (steps - replaced)
    assert 0 < replaced < steps


def test_a_first_write_that_is_cut_off_leaves_nothing_or_all(tmp_path: Path) -> None:
    steps = interrupted(tmp_path / "whole", -1)
    for step in range(steps):
        folder = tmp_path / f"{step}"
        interrupted(folder, step)
        assert not folder.exists() or read(folder) == NEW
        checkpoint.write_folder(folder, NEW)
        assert read(folder) == NEW and not list(tmp_path.glob(f".{step}.*"))


def test_a_model_is_found_between_the_renames(
    shared_model: MultimodalModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renames = []
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        renames.append(path)
        if len(renames) == 2:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", second_fails)
        with pytest.raises(Killed):
            shared_model.save_pretrained(saved)
    assert not saved.exists()
    weights = MultimodalModel.from_pretrained(saved).state_dict()
    for name, want in shared_model.state_dict().items():
        assert torch.equal(weights[name], want)


def test_a_file_is_there_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    checkpoint.write_file(path, b"old")
    for step in range(4):
        with pytest.MonkeyPatch.context() as monkeypatch:
            dying(monkeypatch, step)
            with pytest.raises(Killed):
                checkpoint.write_file(path, b"new")
        assert path.read_bytes() == (b"new" if step == 3 else b"old")
    checkpoint.write_file(path, b"newest")
    assert path.read_bytes() == b"newest" and list(tmp_path.iterdir()) == [path]
