"""Resampled positions are kept exactly as long as they are right."""

import pytest
import torch
from torch import nn

from mmkernels.modules import VisionEmbeddings, resampling
from tests.modules.embeddings import randomize

X = torch.linspace(-1, 1, 2 * 3 * 8 * 16).view(2, 3, 8, 16)


@pytest.fixture
def made(monkeypatch):
    """The grids for which positions are resampled, as it happens."""
    grids = []
    resample = resampling.resampled_positions

    def counted(pos_embed, old, new, *how):
        if old != new:
            grids.append(new)
        return resample(pos_embed, old, new, *how)

    monkeypatch.setattr(resampling, "resampled_positions", counted)
    return grids


@pytest.fixture
def module():
    return randomize(VisionEmbeddings((12, 8), 4, embed_dim=6, dynamic_img_size=True)).eval()


def uncached(module, x=X):
    fresh = VisionEmbeddings((12, 8), 4, embed_dim=6, dynamic_img_size=True)
    fresh.load_state_dict(module.state_dict())
    return fresh.to(module.pos_embed.dtype).eval()(x).detach()


@torch.no_grad()
def test_once_for_each_grid(module, made):
    for size in [(8, 16), (4, 4), (12, 8), (8, 16), (4, 4)]:
        module(torch.zeros(1, 3, *size))
    assert made == [(2, 4), (1, 1)]


@torch.no_grad()
def test_no_more_than_the_limit(module, made, monkeypatch):
    monkeypatch.setattr(resampling.PositionCache, "LIMIT", 2)
    for width in (4, 12, 16, 16, 12, 4):
        module(torch.zeros(1, 3, 12, width))
        assert len(module.positions) <= 2
    assert made == [(3, 1), (3, 3), (3, 4), (3, 1)]


def step(module):
    optimizer = torch.optim.SGD([module.pos_embed], lr=1.0)
    module.pos_embed.grad = torch.ones_like(module.pos_embed)
    optimizer.step()


def replace(module):
    module.pos_embed = nn.Parameter(module.pos_embed * 2)


def load(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def average(module):
    """As timm's and torch's moving averages do."""
    for value in module.state_dict().values():
        value.mul_(0.9).add_(0.1)


CHANGES = {
    "in_place": lambda module: module.pos_embed.add_(1.0),
    "slice": lambda module: module.pos_embed[:, 3].zero_(),
    "copy": lambda module: module.pos_embed.copy_(torch.randn(1, 7, 6)),
    "step": step,
    "replace": replace,
    "load": load,
    "average": average,
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "new_data": lambda module: setattr(module.pos_embed, "data", torch.randn(1, 7, 6)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, module, made):
    before = module(X)
    change(module)
    assert len(made) == 1
    after = module(X)
    assert len(made) == 2
    torch.testing.assert_close(after, uncached(module), atol=0, rtol=0)
    assert after.dtype != before.dtype or (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_another_parameter_in_the_same_memory(module):
    memory = torch.randn(1, 7, 6)
    module.pos_embed = nn.Parameter(memory)
    module(X)
    state = module.pos_embed._version, module.pos_embed.data_ptr()
    module.pos_embed.data.copy_(torch.randn(1, 7, 6))
    module.pos_embed = nn.Parameter(memory)
    assert state == (module.pos_embed._version, module.pos_embed.data_ptr())
    torch.testing.assert_close(module(X), uncached(module))


@torch.no_grad()
@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_forget(mode, module):
    module(X)
    assert len(module.positions) == 1
    module.pos_embed.data.zero_()  # what no counter tells of
    module.train(mode)
    assert len(module.positions) == 0
    torch.testing.assert_close(module(X), uncached(module))


def test_gradients_reach_the_parameter_and_nothing_is_kept(module, made):
    with torch.no_grad():
        want = module(X)
    for _ in range(2):
        out = module(X)
        torch.testing.assert_close(out, want)
        (grad,) = torch.autograd.grad(out.sum(), module.pos_embed)
        assert grad.abs().max() > 0
    assert len(made) == 3
    assert all(not kept.requires_grad for _, _, kept in module.positions._entries.values())


def test_frozen_positions_are_kept_in_training(module, made):
    module.train().pos_embed.requires_grad_(False)
    for _ in range(3):
        torch.autograd.grad(module(X).sum(), module.patch_embed.proj.weight)
    assert len(made) == 1


def test_kept_in_inference_mode_and_used_for_gradients(module, made):
    module.pos_embed.requires_grad_(False)
    with torch.inference_mode():
        module(X)
    torch.autograd.grad(module(X).sum(), module.patch_embed.proj.weight)
    assert len(made) == 1


def test_parameters_made_in_inference_mode(made):
    with torch.inference_mode():
        module = VisionEmbeddings((12, 8), 4, embed_dim=6, dynamic_img_size=True).eval()
        module(X)
        module.pos_embed.zero_()
        torch.testing.assert_close(module(X), uncached(module))
    assert len(made) >= 2 and len(module.positions) == 0


def test_parameters_of_a_functional_call(module):
    want = module(X).detach()
    with torch.no_grad():
        module(X)
        for factor in (2.0, 3.0):
            pos_embed = factor * module.pos_embed
            out = torch.func.functional_call(module, {"pos_embed": pos_embed}, (X,))
            assert (out - want).abs().max() > 1e-3
        torch.testing.assert_close(module(X), want)


@torch.no_grad()
def test_under_vmap(module):
    stacked = torch.stack([module.pos_embed, 2 * module.pos_embed])

    def run(pos_embed):
        return torch.func.functional_call(module, {"pos_embed": pos_embed}, (X,))

    torch.testing.assert_close(torch.vmap(run)(stacked), torch.stack([run(x) for x in stacked]))
