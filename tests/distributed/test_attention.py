"""Is attention over a spread sequence that of one process, for every mask and layout?"""

import itertools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import mmkernels as mm
from mmkernels import distributed, testing
from mmkernels.distributed import Layout
from tests.distributed import world
from tests.distributed.problems import FORMS, Problem, check

LAYOUTS = ("zigzag", "unequal", "balanced", "scattered")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mask(form, mask, ranks):
    layouts = itertools.cycle(LAYOUTS)
    layout = next(itertools.islice(layouts, list(testing.MASKS).index(mask) + ranks // 4, None))
    check(Problem(form, mask, layout, ranks))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(form, layout):
    check(Problem(form, "image spans", layout, ranks=4, seqlen=61))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "heads, kv_heads, ranks", [(4, 4, 4), (6, 1, 4), (9, 3, 2), (9, 3, 4), (12, 4, 4), (5, 5, 2)]
)
def test_grouped_heads(form, heads, kv_heads, ranks):
    check(Problem(form, "causal", "zigzag", ranks, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim, value_dim", [(8, 24), (24, 8)])
def test_values_of_another_width(form, head_dim, value_dim):
    check(Problem(form, "documents", head_dim=head_dim, value_dim=value_dim))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dtypes(form, dtype, ranks):
    check(Problem(form, "causal", "zigzag", ranks, dtype=dtype, seqlen=130))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softmax_scale": 0.7},
        {"causal": True},
        {"window_size": (9, 3)},
        {"deterministic": False},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_options(form, options):
    check(Problem(form, "none", options=options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["causal", "ragged"])
def test_sinks(form, mask):
    check(Problem(form, mask, ranks=4, sinks=True))


def changing_bounds(form, how):
    """Errors of a second call after the mask's bounds were changed, and of gradients of the first.

    On a mesh of which the ring is one dimension, so that no rank is that of all processes.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    layout, whole = Layout.zigzag(24, 2), Problem(form, seqlen=24).inputs()
    rank = mesh.get_local_rank()
    call = getattr(distributed, form)
    mask = mm.masks.causal(24) & mm.masks.full(24)
    errors = []

    def error(q, k, v):
        out = call(*(layout.shard(x, rank) for x in (q, k, v)), mesh, layout, mask=mask)
        exact = layout.shard(mm.attention(q, k, v, mask=mask), rank)
        return float((out - exact).abs().max())

    with torch.inference_mode(how == "inference"):
        if how == "inference":
            mask = mm.masks.IntervalMask(mask.start.clone(), mask.end.clone(), 24)
        errors.append(error(whole["q"], whole["k"], whole["v"]))
        if how == "other tensors":
            mask.end = torch.full_like(mask.end, 24)
        else:
            mask.end.fill_(24)
        errors.append(error(whole["q"], whole["k"], whole["v"]))
    return errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["in place", "inference", "other tensors"])
def test_bounds_that_change(form, how):
    for errors in world.run(4, changing_bounds, form, how):
        assert max(errors) < 1e-5


def second_derivative(form):
    """dq's own gradient, spread and alone; or what the error says."""
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(12, 2)
    whole = Problem(form, seqlen=12, dtype=torch.float64).inputs()

    def second(attend, shard):
        q, k, v, dout = (shard(whole[x]).requires_grad_() for x in ("q", "k", "v", "dout"))
        (dk,) = torch.autograd.grad(attend(q, k, v), k, dout, create_graph=True)
        return torch.autograd.grad(dk.square().sum(), (q, v, dout))

    def spread(q, k, v):
        return getattr(distributed, form)(q, k, v, mesh, layout, causal=True, backend="reference")

    rank = mesh.get_local_rank()
    alone = second(
        lambda q, k, v: mm.attention(q, k, v, causal=True, backend="reference"), lambda x: x
    )
    try:
        got = second(spread, lambda x: layout.shard(x, rank))
    except RuntimeError as error:
        return str(error)
    return max(
        float((a - layout.shard(b, rank)).abs().max()) for a, b in zip(got, alone, strict=True)
    )


def test_second_derivatives():
    assert max(world.run(2, second_derivative, "all_to_all_attention")) < 1e-10
    for message in world.run(2, second_derivative, "ring_attention"):
        assert "a second derivative was asked for" in message


def off_sinks(form):
    """Gradients of sinks that are off, where some rows have no key."""
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(20, 2)
    whole, rank = Problem(form, "ragged", seqlen=20).inputs(), mesh.get_local_rank()
    sinks = torch.full((4,), -torch.inf, requires_grad=True)
    mask = testing.MASKS["ragged"](2, 20, 20)
    q, k, v = (layout.shard(whole[x], rank).requires_grad_() for x in ("q", "k", "v"))
    getattr(distributed, form)(q, k, v, mesh, layout, mask=mask, sinks=sinks).sum().backward()
    return [x.grad for x in (q, k, v, sinks)]


@pytest.mark.parametrize("form", FORMS)
def test_sinks_that_are_off(form):
    for grads in world.run(2, off_sinks, form):
        assert all(grad.isfinite().all() for grad in grads)


def refused(form, kind):
    mesh = init_device_mesh("cpu", (2,))
    layout = Layout.contiguous([13, 11])
    rank = mesh.get_local_rank()
    q, k, v = (layout.shard(Problem(form, seqlen=24).inputs()[x], rank) for x in ("q", "k", "v"))
    options = {}
    if kind == "DTensor":
        q, k, v = (DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in (q, k, v))
    elif kind == "cross":
        k, v = k[:, :5], v[:, :5]
    elif kind == "mesh":
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "sp"))
    elif kind == "layout":
        layout = Layout.zigzag(24, 3)
    elif kind == "holes":
        options["mask"] = torch.eye(24, dtype=torch.bool) | torch.eye(24, dtype=torch.bool).roll(
            3, 1
        )
    elif kind == "softcap":
        options["softcap"] = -1.0
    try:
        getattr(distributed, form)(q, k, v, mesh, layout, **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind, words",
    [
        ("DTensor", "use_local_output=True"),
        ("cross", "cross attention"),
        ("mesh", 'e.g. mesh["sp"]'),
        ("layout", "make the layout for mesh.size()"),
        ("holes", "no interval mask"),
        ("softcap", "softcap"),
    ],
)
def test_wrong_arguments(form, kind, words):
    """The same error on all processes, so that none waits."""
    for message in world.run(2, refused, form, kind):
        assert words in message and message.startswith(form)


@pytest.mark.parametrize("form", FORMS)
def test_without_lse(form):
    check(Problem(form, lse=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seqlen", [0, 1, 3])
def test_fewer_positions_than_processes(form, seqlen):
    check(Problem(form, "causal", ranks=4, seqlen=seqlen))
