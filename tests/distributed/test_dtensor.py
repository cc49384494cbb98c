"""Is attention of DTensors that of the whole tensors, however these are divided?"""

import math

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from tests.attention import passes
from tests.distributed import world

SIZES = (2, 12, 20, 8, 4, 16, 8)  # batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, value_dim
BATCH, SEQUENCE, HEADS, WIDTH = range(4)  # dimensions of q, k and v
WHOLE = None


def distributed(x, mesh, dims):
    """x as a DTensor, divided in `dims` along each dimension of the mesh; differentiable."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(
        placements=[Replicate() if dim is WHOLE else Shard(dim) for dim in dims]
    )


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(world.device_type(math.prod(shape)), shape)


def dims_of(x):
    """What `distributed` was given."""
    return tuple(getattr(place, "dim", WHOLE) for place in x.placements)


def attend(shape, dims, inputs, mask, extra, cotangents, plain, options):
    """out, lse and all gradients as whole tensors; then how out is divided."""
    mesh = mesh_of(*shape)
    mask = mask.to(mesh.device_type) if isinstance(mask, mm.masks.IntervalMask) else mask
    inputs = [x.to(mesh.device_type) for x in inputs]
    leaves = [distributed(x, mesh, dims).requires_grad_() for x in inputs[:3]]
    for x in inputs[3:]:
        x = x if plain else distributed(x, mesh, [WHOLE] * len(shape))
        leaves.append(x.requires_grad_())
    named = dict(zip(extra, leaves[3:], strict=True))
    results = mm.attention(*leaves[:3], mask=mask, return_lse=True, **named, **options)
    grads = [distributed(x.to(mesh.device_type), mesh, [WHOLE] * len(shape)) for x in cotangents]
    grads = torch.autograd.grad(results, leaves, grads)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    everything = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (*results, *grads)]
    return [x.detach().cpu() for x in everything], dims_of(results[0])


def check(shape, dims, arguments, plain=False, **options):
    """Raises unless all processes have what one alone has; returns how out is divided."""
    results = world.run(math.prod(shape), attend, shape, dims, *arguments, plain, options)
    for got, divided in results:
        passes.hold(got, *arguments)
        assert divided == results[0][1]
    return results[0][1]


@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize(("dim", "divided"), [(BATCH, BATCH), (HEADS, HEADS), (SEQUENCE, HEADS)])
def test_every_mask(dim, divided, mask):
    assert check((2,), (dim,), passes.problem(SIZES, mask, torch.float32)) == (divided,)


@pytest.mark.parametrize("dim", [WHOLE, WIDTH])
def test_other_placements(dim):
    divided = check((2,), (dim,), passes.problem(SIZES, "causal", torch.float32))
    assert divided == (WHOLE if dim is WHOLE else HEADS,)


@pytest.mark.parametrize("plain", [False, True], ids=["DTensors", "plain"])
@pytest.mark.parametrize("dim", [BATCH, HEADS, SEQUENCE])
@pytest.mark.parametrize("bias_shape", [(1, 8), (2, 1), (2, 8), (1, 1)], ids=str)
def test_bias_and_sinks(bias_shape, dim, plain):
    inputs, *rest = passes.problem(SIZES, "padding", torch.float32, ("bias", "sinks"))
    inputs[3] = torch.randn(*bias_shape, *inputs[3].shape[2:])
    check((2,), (dim,), (inputs, *rest), plain)


@pytest.mark.parametrize(
    ("dims", "kv_heads", "divided"),
    [
        ((BATCH, HEADS), 4, (BATCH, HEADS)),
        ((HEADS, HEADS), 4, (HEADS, HEADS)),
        ((SEQUENCE, BATCH), 4, (HEADS, BATCH)),
        ((HEADS, HEADS), 2, (HEADS, BATCH)),  # two key heads serve two processes
        ((WHOLE, HEADS), 4, (WHOLE, HEADS)),
    ],
    ids=str,
)
def test_two_mesh_dimensions(dims, kv_heads, divided):
    sizes = (*SIZES[:4], kv_heads, *SIZES[5:])
    problem = passes.problem(sizes, "documents", torch.float32, ("bias", "sinks"))
    assert check((2, 2), dims, problem) == divided


@pytest.mark.parametrize("batch", [2, 3])
def test_key_heads_that_do_not_divide(batch):
    sizes = (batch, 12, 20, 6, 3, 16, 8)
    divided = check((2,), (HEADS,), passes.problem(sizes, "padding", torch.float32))
    assert divided == (BATCH if batch == 2 else WHOLE,)


def other_calls():
    """The largest difference of each to the call on whole tensors."""
    mesh = mesh_of(2)
    q, k, v = testing.make_qkv(2, 6, 6, 4, 2, 8, device=mesh.device_type)
    short, slopes = torch.tensor([0, 2, 6], dtype=torch.int32), torch.rand(2, 4)
    holes = torch.rand(2, 4, 6, 6) < 0.6
    short, slopes, holes = (x.to(mesh.device_type) for x in (short, slopes, holes))
    bias = torch.randn(6, 6, device=mesh.device_type)
    packed = {"max_seqlen_q": 6, "max_seqlen_k": 6, "causal": True}
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = {"attn_mask": holes, "enable_gqa": True}
    calls = {
        "alibi": (mm.attention, (q, k, v), {"alibi_slopes": slopes}, [BATCH, HEADS]),
        "dense": (mm.attention, (q, k, v), {"mask": holes, "bias": bias}, [BATCH, HEADS]),
        "sdpa": (mm.scaled_dot_product_attention, heads_first, sdpa, [0, 1, 2]),
        "varlen": (mm.attention_varlen, (q[0], k[0], v[0], short, short), packed, [0, 1]),
    }
    found = {}
    for name, (function, (a, b, c, *rest), options, dims) in calls.items():
        expected = function(a, b, c, *rest, **options)
        for dim in dims:
            for spread in ("nothing", *options):
                x, y, z = (distributed(x, mesh, [dim]) for x in (a, b, c))
                given = dict(options)
                if isinstance(given.get(spread), torch.Tensor):
                    given[spread] = distributed(given[spread], mesh, [WHOLE])
                got = function(x, y, z, *rest, **given)
                found[name, dim, spread] = (got.full_tensor() - expected).abs().max().item()
    return found


def test_other_calls():
    for found in world.run(2, other_calls):
        assert len(found) > 20
        assert max(found.values()) < 1e-5, found


def compiled():
    """The largest difference, in out and dq, of the compiled call to the eager one."""
    mesh = mesh_of(2)
    tensors = testing.make_qkv(2, 6, 6, 4, 2, 8, device=mesh.device_type)
    q, k, v = (distributed(x, mesh, [HEADS]).requires_grad_() for x in tensors)

    def attend(q, k, v):
        return mm.attention(q, k, v, causal=True)

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v)
        (dq,) = torch.autograd.grad(out.square().sum(), q)
        found.append(torch.cat([out.full_tensor(), dq.full_tensor()]).detach())
    return (found[0] - found[1]).abs().max().item()


def test_compile_is_fullgraph():
    assert max(world.run(2, compiled)) < 1e-5


def dropped(dim):
    """out, or the error's text; every process draws another seed."""
    mesh = mesh_of(2)
    torch.manual_seed(torch.distributed.get_rank())
    q, k, v = (distributed(x, mesh, [dim]) for x in testing.make_qkv(2, 6, 6, 4, 2, 8))
    try:
        return mm.attention(q, k, v, dropout_p=0.5).to_local()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("dim", "by"), [(BATCH, "batch"), (HEADS, "heads"), (SEQUENCE, "heads")])
def test_dropout_is_refused_where_q_is_divided(dim, by):
    for text in world.run(2, dropped, dim):
        assert f"dropout_p is 0.5 and q, k and v are DTensors, divided by {by}" in text
        assert "use dropout_p=0.0, or replicate" in text


def test_dropout_of_replicated_tensors_is_one():
    first, second = world.run(2, dropped, WHOLE)
    assert torch.equal(first, second)


def mixed():
    """The text of the error for each call that mixes DTensors and others."""
    mesh = mesh_of(2)
    q, k, v = testing.make_qkv(2, 6, 6, 4, 4, 8, device=mesh.device_type)
    spread = [distributed(x, mesh, [HEADS]) for x in (q, k, v)]
    per_head = distributed(torch.rand(4, device=mesh.device_type), mesh, [WHOLE])
    calls = [
        lambda: mm.attention(spread[0], k, v),
        lambda: mm.attention(q, k, spread[2]),
        lambda: mm.scaled_dot_product_attention(spread[0], spread[1], v),
        lambda: mm.attention(q, k, v, sinks=per_head),
        lambda: mm.attention_with_kvcache(*spread),
    ]
    texts = []
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def test_mixed_calls_are_refused():
    names = [("q", "k"), ("v", "q"), ("query", "value"), ("sinks", "q")]
    *texts, cache = world.run(2, mixed)[0]
    for (spread, plain), text in zip(names, texts, strict=True):
        assert f"{spread} is a DTensor and {plain} " in text
    assert "q is a DTensor; it takes none, pass q.to_local()" in cache
