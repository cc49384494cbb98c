"""Does a run that was stopped anywhere go on to the very same end?"""

import json
import signal
import threading

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(library)

from mmkernels.training import checkpoints, loop  # noqa: E402 (may be absent)
from mmkernels.training.loop import read_log  # noqa: E402
from tests.training.runs import (  # noqa: E402
    BORDERS,
    STEPS,
    Killed,
    assert_same,
    outcome,
    trainer,
)

pytestmark = pytest.mark.usefixtures("deterministic")
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing stopped ends with."""
    torch.use_deterministic_algorithms(True)
    trained = trainer(tmp_path_factory.mktemp("whole"))
    trained.run()
    return outcome(trained)


def on_call(monkeypatch, owner, name, number, act):
    """Calls act() before the call of owner.name with this number, from 0 on."""
    wrapped, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(None)
        if len(calls) == number + 1:
            act()
        return wrapped(*args, **options)

    monkeypatch.setattr(owner, name, call)


def kill():
    raise Killed


def resumed(run, step):
    """A new trainer that goes on from a checkpoint of that step."""
    later = trainer(run)
    assert later.resume() == (step is not None)
    assert later.step == (step or 0)
    return later


def test_it_learns_in_every_stage_and_leaves_codecs_alone(whole):
    tensors, log = whole
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert [line["stage"] for line in log] == ["pretrain"] * 2 + ["look"] * 2 + ["finetune"] * 3
    from tests.training import small

    for name, before in small.model().state_dict().items():
        assert torch.equal(before, tensors[name]) == ("_codec" in name), name


def test_every_stage_begins_with_new_moments(whole):
    """AdamW counts the steps of the last stage only."""
    counts = {float(x) for name, x in whole[0].items() if name.endswith("|step")}
    assert max(counts) == 3


@pytest.mark.parametrize("stopped", range(STEPS + 1))
def test_stopped_after_any_step(stopped, tmp_path, whole):
    trainer(tmp_path).run(until=stopped)
    later = resumed(tmp_path, stopped)
    later.run()
    assert_same(later, whole)


def test_stopped_after_every_step(tmp_path, whole):
    for step in range(1, STEPS + 1):
        later = trainer(tmp_path)
        later.resume()
        later.run(until=step)
    assert_same(later, whole)


@pytest.mark.parametrize("micro", range(2 + 2 + 2 + 6))
def test_killed_within_accumulation(micro, tmp_path, whole, monkeypatch):
    """Steps since the newest checkpoint, here of the last border, are done again."""
    first = trainer(tmp_path, save_every=1e9)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, type(first.model), "forward", micro, kill)
        first.run()
    steps = [0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 6, 6][micro]
    assert len(read_log(tmp_path)) == steps
    later = resumed(tmp_path, max((border for border in BORDERS if border <= steps), default=None))
    later.run()
    assert_same(later, whole)


@BOTH
@pytest.mark.parametrize("owner", ["loss", "backward", "optimizer", "log"])
def test_interrupted_within_a_step(owner, number, tmp_path, whole, monkeypatch):
    """The step ends first; its weights, moments and line are there."""
    first = trainer(tmp_path, save_every=1e9)
    place = {
        "loss": (type(first.model), "forward"),
        "backward": (torch.nn.utils, "clip_grad_norm_"),
        "optimizer": (torch.optim.AdamW, "step"),
        "log": (loop._Progress, "add"),
    }[owner]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, *place, 4, lambda: signal.raise_signal(number))
        first.run()
    later = resumed(tmp_path, len(read_log(tmp_path)))
    assert later.step == (3 if owner == "loss" else 5)
    later.run()
    assert_same(later, whole)


@BOTH
def test_interrupted_amid_the_change_of_weights(number, tmp_path, whole, monkeypatch):
    first = trainer(tmp_path, save_every=1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, torch.Tensor, "addcdiv_", 30, lambda: signal.raise_signal(number))
        first.run()
    later = resumed(tmp_path, len(read_log(tmp_path)))
    assert later.step == 1
    later.run()
    assert_same(later, whole)


def test_a_second_interrupt_stops_at_once_and_leaves_what_is_whole(tmp_path, whole, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    first = trainer(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, torch.Tensor, "addcdiv_", 130, twice)
        first.run()
    later = resumed(tmp_path, first.step)
    assert 0 < later.step < STEPS
    later.run()
    assert_same(later, whole)


def test_an_interrupt_while_a_checkpoint_is_written(tmp_path, whole, monkeypatch):
    first = trainer(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        on_call(patch, checkpoints.files, "write_folder", 2, lambda: signal.raise_signal(2))
        first.run()
    later = resumed(tmp_path, 3)
    later.run()
    assert_same(later, whole)


def test_signals_are_as_before_when_it_has_ended(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = trainer(tmp_path)
    first.run(until=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, type(first.model), "forward", 0, kill)
        first.run()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert not first.model.training


def test_in_another_thread(tmp_path, whole):
    """Where no signal arrives, and none can be asked for."""
    trained = trainer(tmp_path)
    thread = threading.Thread(target=trained.run)
    thread.start()
    thread.join()
    assert_same(trained, whole)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_line_that_was_cut_off_is_done_again(steps, tmp_path, whole, monkeypatch):
    first = trainer(tmp_path, save_every=1e9)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, loop._Progress, "add", steps, kill)
        first.run()
    with open(tmp_path / loop.LOG, "a") as log:
        log.write('{"step": 2, "lo')
    later = resumed(tmp_path, None if steps == 1 else 2)
    later.run()
    assert_same(later, whole)
    assert all(json.loads(line) for line in (tmp_path / loop.LOG).read_text().splitlines())


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [(damage, name) for name in FILES for damage in (cut_off, empty, flip)]


@pytest.mark.parametrize(
    ("damage", "name"), DAMAGES, ids=[f"{name}-{damage.__name__}" for damage, name in DAMAGES]
)
def test_a_damaged_checkpoint_is_left_out(damage, name, tmp_path, whole, capsys):
    trainer(tmp_path).run(until=5)
    newest = tmp_path / "checkpoints" / "00000005"
    damage(newest / name)
    later = resumed(tmp_path, 4)
    said = capsys.readouterr().err
    assert str(newest) in said
    if name != "manifest.json" or damage != flip:
        assert str(newest / name) in said
    later.run()
    assert_same(later, whole)
    assert checkpoints.newest(tmp_path).state["step"] == STEPS


def test_a_damaged_checkpoint_takes_no_whole_ones_place(tmp_path):
    """The run goes past its step without writing one there."""
    trainer(tmp_path).run(until=5)
    cut_off(tmp_path / "checkpoints" / "00000005" / "model.safetensors")
    later = trainer(tmp_path, save_every=1e9)
    assert later.resume() and later.step == 4
    later.run(until=6)
    cut_off(tmp_path / "checkpoints" / "00000006" / "model.safetensors")
    assert checkpoints.newest(tmp_path).state["step"] == 4


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"model.safetensors": 1}'])
def test_a_manifest_of_something_else_is_left_out(text, tmp_path, capsys):
    trainer(tmp_path).run(until=2)
    newest = tmp_path / "checkpoints" / "00000002"
    (newest / "manifest.json").write_text(text)
    resumed(tmp_path, 1)
    assert str(newest) in capsys.readouterr().err


def test_it_begins_anew_where_every_checkpoint_is_damaged(tmp_path, whole):
    trainer(tmp_path).run(until=STEPS)
    for folder in (tmp_path / "checkpoints").iterdir():
        cut_off(folder / "model.safetensors")
    first = resumed(tmp_path, None)
    first.run(until=3)
    later = resumed(tmp_path, 3)
    later.run()
    assert_same(later, whole)
    assert checkpoints.newest(tmp_path).state["step"] == STEPS
