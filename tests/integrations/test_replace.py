"""The contract of `mm.replace`, `mm.restore`, `mm.replaced` and the report."""

import copy
import re
import threading

import pytest
import torch
from torch import nn

import mmkernels as mm
from mmkernels.integrations.report import Report
from tests.integrations.subjects import (
    EVERY,
    Attend,
    Mixed,
    assert_close,
    inputs,
    kernels,
    make,
    mixed,
    output,
    run,
)

ALL = (mm.replace, mm.restore, lambda model: mm.replaced(model).__enter__())
NAMES = ("patches", "attend", "multihead", "layer.self_attn")


def traces(model):
    """All that a model is made of but its parameters: classes, attributes, settings."""
    config = getattr(model, "config", None)
    return (
        {name: (type(m), {k: v for k, v in vars(m).items() if not k.startswith("__")})
         for name, m in model.named_modules()},
        None if config is None else (config.to_dict(), config._attn_implementation),
    )  # fmt: skip


@pytest.mark.parametrize("act", ALL, ids=["replace", "restore", "replaced"])
@pytest.mark.parametrize("model", [None, 3, "vit", nn.Linear, [nn.Linear(2, 2)], torch.relu])
def test_no_module(act, model):
    with pytest.raises(TypeError, match=rf"model is {type(model).__name__}"):
        act(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("act", ALL, ids=["replace", "restore", "replaced"])
def test_compiled_by_torchscript(act):
    with pytest.raises(TypeError, match="TorchScript"):
        act(torch.jit.script(nn.Linear(2, 2)))


@EVERY
def test_swaps(subject):
    model = make(subject)
    wanted, none = run(model)
    assert none == (0, 0)
    report = mm.replace(model)
    got, ran = run(model)
    assert ran == kernels(subject)
    assert_close(got, wanted)
    assert len(report.swapped) == sum(ran)
    assert report.left == ()
    assert all(model.get_submodule(e.name) is not None for e in report.entries)


@EVERY
def test_twice_is_once(subject):
    model = make(subject)
    report = mm.replace(model)
    classes = [type(module) for module in model.modules()]
    wanted, ran = run(model)
    assert mm.replace(model) == report
    assert [type(module) for module in model.modules()] == classes
    got, again = run(model)
    assert again == ran
    assert torch.equal(got, wanted)


@EVERY
def test_restore_leaves_no_trace(subject):
    model = make(subject)
    wanted, _ = run(model)
    before = copy.deepcopy(traces(model)[1]), traces(model)[0]
    mm.replace(model)
    mm.replace(model)
    run(model)
    mm.restore(model)
    mm.restore(model)
    config, modules = traces(model)[::-1]
    assert config == before[0]
    assert modules == before[1]
    got, ran = run(model)
    assert ran == (0, 0)
    assert torch.equal(got, wanted)


@EVERY
def test_restore_of_what_was_never_replaced(subject):
    model = make(subject)
    before = traces(model)
    mm.restore(model)
    assert traces(model) == before


def test_restore_of_a_part():
    model = mixed()
    wanted, _ = run(model)
    mm.replace(model)
    mm.restore(model.layer)
    got, ran = run(model)
    assert ran == (2, 1)
    assert_close(got, wanted)
    mm.restore(model)
    assert torch.equal(run(model)[0], wanted)


@EVERY
def test_parameters_stay(subject):
    model, other = make(subject), make(subject)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    mm.replace(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert optimizer.param_groups[0]["params"] == list(parameters.values())
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    # Both ways: a checkpoint from before, and one for a model without us.
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    assert_close(run(model)[0], run(other)[0])


@EVERY
def test_training_goes_on_where_it_was(subject):
    """Momentum, gathered before the swap, is used after it."""
    model = make(subject)
    twin = copy.deepcopy(model)
    for network, act in ((model, mm.replace), (twin, lambda _: None)):
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for step in range(3):
            output(network, inputs(network)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                act(network)
    for (name, got), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_random_numbers_stay():
    model = Mixed(dropout=0.5)
    state = torch.get_rng_state()
    mm.replace(model)
    mm.restore(model)
    with mm.replaced(model):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_still_drops():
    model = Mixed(dropout=0.5).train()
    mm.replace(model)
    x = inputs(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    # With one key, whose weight is 1, what is dropped is seen in the values.
    attend = Attend(16, dropout=0.25)
    nn.init.ones_(attend.qkv.bias)
    mm.replace(attend)
    out = attend.train()(torch.zeros(20_000, 1, 16))
    shares = (out == 0).float().mean(), (out - 4 / 3).abs().lt(1e-5).float().mean()
    torch.testing.assert_close(shares[0], torch.tensor(0.25), rtol=0, atol=0.02)
    torch.testing.assert_close(sum(shares), torch.tensor(1.0))


class TestReplaced:
    """The block."""

    @EVERY
    def test_ends(self, subject):
        model = make(subject)
        wanted, _ = run(model)
        before = traces(model)[0]
        with mm.replaced(model) as report:
            assert isinstance(report, Report)
            assert run(model)[1] == kernels(subject)
        assert traces(model)[0] == before
        got, ran = run(model)
        assert ran == (0, 0)
        assert torch.equal(got, wanted)

    @EVERY
    def test_ends_by_an_exception(self, subject):
        model = make(subject)
        with pytest.raises(KeyError), mm.replaced(model):
            raise KeyError
        assert run(model)[1] == (0, 0)

    @EVERY
    def test_in_each_other(self, subject):
        model = make(subject)
        with mm.replaced(model) as outer:
            with mm.replaced(model) as inner:
                assert inner == outer
            assert run(model)[1] == kernels(subject)
        assert run(model)[1] == (0, 0)

    @EVERY
    def test_of_a_replaced_model(self, subject):
        model = make(subject)
        report = mm.replace(model)
        with mm.replaced(model) as again:
            assert again == report
        assert run(model)[1] == kernels(subject)
        mm.restore(model)
        assert run(model)[1] == (0, 0)

    def test_of_a_partly_replaced_model(self):
        model = mixed()
        mm.replace(model.attend)
        with mm.replaced(model):
            assert run(model)[1] == (3, 1)
        assert run(model)[1] == (1, 0)

    def test_restore_inside(self):
        model = mixed()
        with mm.replaced(model):
            mm.restore(model)
            assert run(model)[1] == (0, 0)
        assert run(model)[1] == (0, 0)

    def test_a_part_inside_of_the_whole(self):
        model = mixed()
        with mm.replaced(model):
            with mm.replaced(model.layer):
                pass
            assert run(model)[1] == (3, 1)
        with mm.replaced(model.layer):
            with mm.replaced(model):
                assert run(model)[1] == (3, 1)
            assert run(model)[1] == (1, 0)
        assert run(model)[1] == (0, 0)

    @EVERY
    def test_of_two_threads(self, subject):
        """The first to come is the first to go; the other goes on undisturbed."""
        model = make(subject)
        entered, left = threading.Event(), threading.Event()

        def first():
            with mm.replaced(model):
                entered.set()
                left.wait(10)

        thread = threading.Thread(target=first)
        thread.start()
        assert entered.wait(10)
        with mm.replaced(model):
            left.set()
            thread.join()
            assert run(model)[1] == kernels(subject)
        assert run(model)[1] == (0, 0)

    def test_keeps_no_model_alive(self):
        import gc
        import weakref

        model = mixed()
        with mm.replaced(model):
            pass
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None


class TestReport:
    """What it says."""

    def test_of_each_module(self):
        model = mixed()
        report = mm.replace(model)
        assert tuple(entry.name for entry in report.entries) == NAMES
        types = ["Conv2d", "Attend", "MultiheadAttention", "MultiheadAttention"]
        assert [entry.type for entry in report.entries] == types
        assert [entry.kind for entry in report.entries] == ["patch embedding"] + ["attention"] * 3
        assert all(entry.swapped and entry.reason for entry in report.entries)
        assert report.swapped == report.entries
        assert report.left == ()

    def test_groups_what_is_alike(self):
        model = nn.Sequential(Attend(), Attend(), nn.Conv2d(3, 8, 4, 4, padding=1), Attend())
        lines = str(mm.replace(model)).splitlines()
        assert lines[0] == "mmkernels.replace: 3 swapped, 1 left"
        assert re.match(r"  swapped: attention Attend \(0 and 2 more\): ", lines[1])
        assert re.match(r"  left: patch embedding Conv2d \(2\): padding=\(1, 1\)", lines[2])
        assert len(lines) == 3

    def test_of_the_model_itself(self):
        assert "Attend (the model itself)" in str(mm.replace(Attend()))

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), nn.Softmax(-1)], ids=str)
    def test_of_nothing(self, model):
        report = mm.replace(model)
        assert report.entries == report.swapped == report.left == ()
        assert str(report) == "mmkernels.replace: found neither attention nor patch embedding"

    def test_of_a_module_in_two_places(self):
        shared = Attend()
        model = nn.Sequential(shared, nn.Sequential(shared))
        assert [entry.name for entry in mm.replace(model).entries] == ["0"]

    def test_of_modules_of_our_own(self):
        """They are served already, and none of anybody's business here."""
        assert mm.replace(mm.modules.MultiheadAttention(16, 2)).entries == ()

    def test_in_the_model(self):
        """Printed, it shows what was swapped."""
        model = mixed()
        before = repr(model)
        mm.replace(model)
        assert repr(model).count("(mmkernels)") == len(NAMES)
        assert "(patches): Conv2d (mmkernels)(3, 16" in repr(model)
        mm.restore(model)
        assert repr(model) == before
