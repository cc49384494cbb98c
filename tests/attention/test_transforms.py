"""Does attention live with torch's transforms: compile, export, autocast, func and others?"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops
from tests.attention import backends

EVERY = backends.each(*backends.ALL)
AUTO_TOO = backends.each("auto", *backends.ALL)


def qkv(*shape, requires_grad=False, backend="auto", **kwargs):
    """q, k and v where the backend's tests have them."""
    tensors = testing.make_qkv(*shape, device=testing.device_for(backend), **kwargs)
    return [x.requires_grad_(requires_grad) for x in tensors]


def op_inputs(backend, dtype=torch.float32):
    q, k, v = qkv(2, 9, 13, 4, 2, 8, dtype=dtype, backend=backend)
    mask = mm.masks.causal(9, 13, device=q.device)
    scores = (torch.randn(1, 4, 9, 13), torch.rand(4), torch.randn(4), None)
    return q, k, v, mask, backends.moved(scores, q.device), (0.3, 0.0, 0.0)


@EVERY
def test_opcheck_forward(backend):
    q, k, v, mask, scores, numbers = op_inputs(backend)
    inputs = (q, k, v, mask.start, mask.end, *scores, *numbers, backend)
    torch.library.opcheck(ops.attention_forward, inputs)
    torch.library.opcheck(ops.attention_forward, (q, k, v, *[None] * 6, *numbers, backend))


@backends.each_in([torch.float32, torch.bfloat16], "auto", "cpu", "reference", "triton")
def test_opcheck_backward(backend, dtype):
    q, k, v, mask, scores, numbers = op_inputs(backend, dtype)
    bounds, rows = (mask.start, mask.end), mask.key_rows(13)
    out, lse = ops.attention_forward(q, k, v, *bounds, *scores, *numbers, backend)
    saved = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *bounds, *rows)
    for bias_grad in (False,) if backend == "cpu" else (False, True):
        inputs = (*saved, *scores, *numbers, bias_grad, True, backend)
        torch.library.opcheck(ops.attention_backward, inputs)


@EVERY
def test_opcheck_decode(backend):
    q, k, v = qkv(2, 3, 32, 4, 2, 8, backend=backend)
    lengths = torch.tensor([32, 7], dtype=torch.int32, device=q.device)
    numbers = (0.3, 0.0, -1, 0)
    torch.library.opcheck(
        ops.attention_decode, (q, k, v, lengths, None, None, None, *numbers, backend)
    )
    pages = k.view(8, 8, 2, 8)
    table = torch.arange(8, dtype=torch.int32, device=q.device).view(2, 4)
    per_head = torch.rand(4, device=q.device)
    torch.library.opcheck(
        ops.attention_decode,
        (q, pages, pages.clone(), lengths, table, per_head, per_head, *numbers, backend),
    )


def attend(q, k, v, mask=None, **kwargs):
    out, lse = mm.attention(q, k, v, mask=mask, return_lse=True, **kwargs)
    return out.square().sum() + lse.sin().sum()


CALLS = {
    "full": {},
    "causal": {"causal": True},
    "window and softcap": {"window_size": (4, 0), "softcap": 5.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "reference": {"backend": "reference"},
    "triton": {"backend": "triton", "causal": True, "softcap": 5.0},
}


@pytest.mark.parametrize("call", [backends.param(name, on=name, id=name) for name in CALLS])
def test_compile_is_fullgraph_and_equal(call):
    q, k, v = qkv(2, 12, 12, 4, 2, 8, requires_grad=True, backend=call)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for function in (compiled, attend):
        loss = function(q, k, v, **CALLS[call])
        grads = torch.autograd.grad(loss, (q, k, v))
        if function is compiled:
            expected = (loss, *grads)
    for got, wanted in zip((loss, *grads), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_compile_with_inductor():
    q, k, v = qkv(2, 12, 12, 4, 2, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v, causal=True), (q, k, v))
    wanted = torch.autograd.grad(attend(q, k, v, causal=True), (q, k, v))
    torch.testing.assert_close(got, wanted)


def test_compile_builds_masks_inside():
    ids = torch.tensor([-1, 0, 0, 0, -1, -1, 1, 1])

    def model(q, k, v, ids):
        mask = mm.masks.causal(q.shape[1]) | mm.masks.spans(ids)
        return mm.attention(q, k, v, mask=mask)

    q, k, v = qkv(1, 8, 8, 2, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, ids), model(q, k, v, ids))


def test_compile_takes_masks_from_outside():
    q, k, v = qkv(1, 8, 8, 2, 2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(mm.attention, fullgraph=True, backend="aot_eager")
    for prefix in (3, 5):
        mask = mm.masks.prefix_lm(prefix, 8)
        torch.testing.assert_close(compiled(q, k, v, mask=mask), mm.attention(q, k, v, mask=mask))


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(mm.attention, fullgraph=True, backend=counting, dynamic=True)
    for seqlen in (16, 23, 40):
        q, k, v = qkv(2, seqlen, seqlen, 4, 2, 8)
        got = compiled(q, k, v, causal=True)
        torch.testing.assert_close(got, mm.attention(q, k, v, causal=True))
    assert len(graphs) == 1


def test_compiled_function_follows_use_backend():
    torch._dynamo.reset()
    q, k, v = qkv(1, 8, 8, 2, 2, 8)
    compiled = torch.compile(mm.attention, fullgraph=True, backend="aot_eager")
    compiled(q, k, v)
    with mm.use_backend("cuda"), pytest.raises(mm.BackendUnavailable):
        compiled(q, k, v)
    compiled(q, k, v)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return mm.attention(q, k, v, causal=True)

    inputs = tuple(qkv(2, 8, 8, 4, 2, 8))
    seqlen = torch.export.Dim("seqlen", min=2, max=64)
    program = torch.export.export(Model(), inputs, dynamic_shapes=[{1: seqlen}] * 3)
    longer = tuple(qkv(2, 11, 11, 4, 2, 8))
    torch.testing.assert_close(program.module()(*longer), Model()(*longer))


@backends.each_in([torch.bfloat16, torch.float16], "auto", *backends.ALL)
def test_autocast_casts_as_sdpa(backend, dtype):
    q, k, v = qkv(2, 9, 9, 2, 2, 8, requires_grad=True, backend=backend)
    bias = torch.randn(9, 9, device=q.device)
    with torch.autocast(q.device.type, dtype=dtype):
        out, lse = mm.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        sdpa = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), bias)
        grad = torch.autograd.grad(out.float().sum() + lse.sum(), q)[0]
    assert out.dtype == sdpa.dtype == dtype
    assert lse.dtype == grad.dtype == torch.float32
    exact = mm.attention(q.double(), k.double(), v.double(), bias=bias.double())
    assert (out.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_autocast_leaves_float64(backend):
    q, k, v = (x.double() for x in qkv(2, 9, 9, 2, 2, 8))
    bias = torch.randn(9, 9).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = mm.attention(q, k, v, bias=bias, backend=backend)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, mm.attention(q, k, v, bias=bias))


def test_reference_keeps_float32_under_autocast():
    """Its own products must not be cast: bfloat16 inputs are computed in float32."""
    q, k, v = qkv(1, 50, 50, 2, 2, 32, dtype=torch.bfloat16)
    outside = mm.attention(q, k, v, return_lse=True, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mm.attention(q, k, v, return_lse=True, backend="reference")
    for got, wanted in zip(inside, outside, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@backends.each("auto", "triton")
def test_checkpointing(backend, reentrant):
    q, k, v = qkv(2, 9, 9, 4, 2, 8, requires_grad=True, backend=backend)

    def run(*inputs):
        return attend(*inputs, causal=True, backend=backend)

    plain = torch.autograd.grad(run(q, k, v), (q, k, v))
    loss = checkpoint(run, q, k, v, use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(x.grad, g) for x, g in zip((q, k, v), plain, strict=True))


@AUTO_TOO
def test_func_grad(backend):
    q, k, v = qkv(2, 9, 9, 4, 2, 8, backend=backend)
    grads = torch.func.grad(attend, argnums=(0, 1, 2))(q, k, v, backend=backend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(attend(*leaves, backend="reference"), leaves)
    torch.testing.assert_close(grads, wanted)


@backends.each("auto", "triton")
def test_vmap(backend):
    def run(q, k, v):
        return attend(q, k, v, backend=backend)

    stacked = [torch.stack([x, 2 * x]) for x in qkv(2, 9, 9, 4, 2, 8, backend=backend)]
    wanted = torch.stack([run(*(x[i] for x in stacked)) for i in range(2)])
    torch.testing.assert_close(torch.vmap(run)(*stacked), wanted)
    grads = torch.vmap(torch.func.grad(run))(*stacked)
    wanted = torch.stack([torch.func.grad(run)(*(x[i] for x in stacked)) for i in range(2)])
    torch.testing.assert_close(grads, wanted)


def test_vmap_over_masks():
    q, k, v = qkv(2, 9, 9, 4, 2, 8)
    shown = torch.rand(3, 9, 9) < 0.5
    got = torch.vmap(lambda mask: mm.attention(q, k, v, mask=mask))(shown)
    wanted = torch.stack([mm.attention(q, k, v, mask=mask) for mask in shown])
    torch.testing.assert_close(got, wanted)


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in qkv(2, 9, 9, 4, 2, 8))
    out, lse = mm.attention(q, k, v, return_lse=True, causal=True)
    assert out.shape == (2, 9, 4, 8) and lse.shape == (2, 4, 9) and out.is_meta


def test_second_derivative_of_the_reference():
    q, k, v = qkv(1, 5, 5, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = mm.masks.IntervalMask(torch.tensor([0, 1, 0, 2, 0]), torch.tensor([1, 3, 0, 5, 5]), 5)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sinks):
        out, lse = mm.attention(
            q, k, v, mask=mask, sinks=sinks, softcap=3.0, return_lse=True, backend="reference"
        )
        return out, lse.where(lse > -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))
    assert torch.autograd.gradgradcheck(run, (q, k, v, sinks))


@backends.each("auto", "cpu", "triton")
def test_second_derivative_is_refused_elsewhere(backend):
    q, k, v = qkv(1, 5, 5, 2, 1, 4, requires_grad=True, backend=backend)
    out = mm.attention(q, k, v, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_gradcheck(backend):
    q, k, v = qkv(2, 6, 7, 4, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 1, 7, dtype=torch.float64, requires_grad=backend == "auto")

    def run(q, k, v, sinks, bias):
        return mm.attention(
            q, k, v, causal=True, sinks=sinks, bias=bias, return_lse=True, backend=backend
        )

    assert torch.autograd.gradcheck(run, (q, k, v, sinks, bias))


def test_no_gradient_is_kept_where_none_is_wanted():
    q, k, v = qkv(1, 4, 4, 2, 2, 8)
    assert not mm.attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not mm.attention(q.requires_grad_(), k, v).requires_grad
    out = mm.attention(q, k, v)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@backends.each("auto", "triton")
def test_backward_is_deterministic(backend):
    seqlen = 50 if backends.interpreted(backend) else 150
    q, k, v = qkv(2, seqlen, seqlen, 4, 2, 16, requires_grad=True, backend=backend)
    mask = testing.MASKS["image spans"](2, seqlen, seqlen).to(q.device)
    first, second = (
        torch.autograd.grad(attend(q, k, v, mask, backend=backend), (q, k, v)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masks_are_copied_and_pickled(tmp_path):
    mask = mm.masks.prefix_lm(3, 8)
    torch.save(mask, tmp_path / "mask.pt")
    for other in (copy.deepcopy(mask), torch.load(tmp_path / "mask.pt", weights_only=False)):
        assert torch.equal(other.start, mask.start) and torch.equal(other.end, mask.end)
        assert other.seqlen_k == mask.seqlen_k
