"""Does a call run on the backend that the rules of selection say, and can it be explained?"""

import pickle
import subprocess
import sys

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import registry


@pytest.fixture
def qkv():
    return testing.make_qkv(1, 8, 8, 4, 2, 16)


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that run, in order."""
    names = []
    for op in registry.operations():
        spied = []
        for backend in registry.backends(op):

            def spy(*inputs, backend=backend):
                names.append(backend.name)
                return backend.fn(*inputs)

            spied.append(backend._replace(fn=spy))
        monkeypatch.setitem(registry._table, op, tuple(spied))
    return names


def test_auto_takes_the_first_that_can(qkv, ran):
    mm.attention(*qkv)
    mm.attention(*qkv, softcap=3.0)
    assert ran == ["cpu", "reference"]


def test_passes_choose_apart(qkv, ran):
    bias = torch.zeros(8, 8, requires_grad=True)
    mm.attention(*qkv, bias=bias).sum().backward()
    assert ran == ["cpu", "reference"]


def test_argument_beats_context_beats_auto(qkv, ran):
    with mm.use_backend("reference"):
        mm.attention(*qkv)
        mm.attention(*qkv, backend="cpu")
        with mm.use_backend("auto"):
            mm.attention(*qkv)
        mm.attention(*qkv)
    mm.attention(*qkv)
    assert ran == ["reference", "cpu", "cpu", "reference", "cpu"]


def test_use_backend_without_with(qkv, ran):
    previous = mm.use_backend("reference")
    mm.attention(*qkv)
    previous.__exit__(None, None, None)
    mm.attention(*qkv)
    assert ran == ["reference", "cpu"]


def test_environment_variable():
    code = (
        "import torch, mmkernels as mm; q = torch.randn(1, 4, 2, 8); "
        "print(mm.explain(mm.attention, q, q, q).backend); "
        "print(mm.explain(mm.attention, q, q, q, backend='cpu').backend)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "MMKERNELS_BACKEND": "reference"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["reference", "cpu"]


def test_forced_backend_that_cannot(qkv):
    with pytest.raises(mm.BackendUnavailable) as raised:
        mm.attention(*qkv, softcap=2.0, backend="cpu")
    error = raised.value
    assert error.backend == "cpu" and error.op == "attention_forward"
    assert error.reasons["reference"] is None and "softcap" in error.reasons["cpu"]
    assert "backend='auto' would take 'reference'" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_backend_that_does_not_exist_yet(qkv):
    assert "sdpa" not in {backend.name for backend in registry.backends("attention_forward")}
    with pytest.raises(mm.BackendUnavailable, match="no sdpa backend"):
        mm.attention(*qkv, backend="sdpa")


@pytest.fixture
def by_name(monkeypatch):
    """The names of the ops that a backend served which wants to be asked for."""
    served = []
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    for op in ("attention_forward", "attention_backward"):
        reference = registry.backends(op)[-1]

        def serve(*inputs, op=op, reference=reference):
            served.append(op)
            return reference.fn(*inputs)

        registry.register(op, "cuda", serve, lambda *_: None, lambda *_: "only by name: slow")
    return served


def test_auto_passes_over_what_wants_to_be_named(qkv, by_name):
    q = qkv[0].requires_grad_()
    mm.attention(*qkv).sum().backward()
    assert by_name == []
    found = mm.explain(mm.attention, *qkv)
    assert (found.backend, found.reasons["cuda"]) == ("cpu", "only by name: slow")
    assert found.backward.reasons["cuda"] == "only by name: slow"
    with pytest.raises(mm.BackendUnavailable) as raised:
        mm.attention(q, *qkv[1:], backend="sdpa")
    assert raised.value.reasons["cuda"] == "only by name: slow"


def test_what_wants_to_be_named_serves_who_names_it(qkv, by_name):
    qkv[0].requires_grad_()
    mm.attention(*qkv, backend="cuda").sum().backward()
    with mm.use_backend("cuda"):
        mm.attention(*qkv).sum().backward()
        found = mm.explain(mm.attention, *qkv)
    assert by_name == ["attention_forward", "attention_backward"] * 2
    assert (found.backend, found.backward.backend) == ("cuda", "cuda")
    assert found.reasons["cuda"] is None


def test_what_wants_to_be_named_may_decline(qkv, by_name, monkeypatch):
    declining = registry.backends("attention_forward")[0]._replace(why_not=lambda *_: "no")
    others = registry.backends("attention_forward")[1:]
    monkeypatch.setitem(registry._table, "attention_forward", (declining, *others))
    with pytest.raises(mm.BackendUnavailable) as raised:
        mm.attention(*qkv, backend="cuda")
    assert raised.value.reasons["cuda"] == "no"
    assert by_name == []


def test_backward_is_refused_before_the_forward_runs(qkv, ran):
    bias = torch.zeros(8, 8, requires_grad=True)
    with pytest.raises(mm.BackendUnavailable, match="bias needs a gradient"):
        mm.attention(*qkv, bias=bias, backend="cpu")
    assert ran == []


def test_explain_shows_both_passes(qkv, ran):
    bias = torch.zeros(8, 8, requires_grad=True)
    found = mm.explain(mm.attention, *qkv, bias=bias, causal=True, return_lse=True)
    assert (found.op, found.backend) == ("attention_forward", "cpu")
    assert found.backward.backend == "reference"
    assert "bias needs a gradient" in str(found)
    assert ran == []
    q = qkv[0]
    assert mm.explain(mm.attention, q, q, q, backend="cpu", softcap=1.0).backend is None
    layout = [x.transpose(1, 2) for x in (q, q, q)]
    assert mm.explain(mm.scaled_dot_product_attention, *layout).backend == "cpu"
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    found = mm.explain(mm.attention_varlen, q[0], q[0], q[0], cu, cu, 5, 5, dropout_p=0.1)
    assert found.backend == "reference"


def test_explain_writes_no_cache(qkv, ran):
    q, cache, _ = qkv
    before = cache.clone()
    new = torch.randn(1, 1, 2, 16)
    found = mm.explain(
        mm.attention_with_kvcache,
        q[:, :1],
        cache,
        cache,
        new,
        new,
        cache_seqlens=3,
        return_lse=True,
    )
    assert (found.op, found.backend) == ("attention_decode", "cpu")
    assert torch.equal(cache, before) and ran == []


def test_explain_wants_an_operator():
    with pytest.raises(TypeError, match="attention_varlen"):
        mm.explain(torch.matmul, torch.randn(2, 2), torch.randn(2, 2))


def test_every_operation_has_a_reference():
    assert set(registry.operations()) == set(mm._core.ops.SCHEMAS)
    for op in registry.operations():
        assert registry.backends(op)[-1].name == "reference"


def test_registering_again_replaces(monkeypatch):
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    count = len(registry.backends("attention_forward"))
    registry.register("attention_forward", "cpu", lambda *_: "new", lambda *_: None)
    assert len(registry.backends("attention_forward")) == count
    assert registry.select("attention_forward", "cpu", ())() == "new"
