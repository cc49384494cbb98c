"""`IntervalTensor` is the dense mask to whoever computes with it, and bounds to attention."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels as mm
from mmkernels import masks
from mmkernels.attention.interval import IntervalMask
from mmkernels.integrations.interval_tensor import IntervalTensor, over_keys


@pytest.fixture(params=[False, True], ids=["normal", "inference"])
def either_mode(request):
    with torch.inference_mode(request.param):
        yield


def prefix():
    """(3, 1, 5, 7): rows and batch elements all differ."""
    return IntervalTensor.of(masks.prefix_lm(torch.tensor([2, 4, 0]), 5, 7))


def windowed(batch=3):
    """(3, 1, 5, 5) from one row of bounds."""
    return IntervalTensor.of(masks.window(5, window_size=(1, 0)), batch)


def dense_of(mask):
    return mask.interval.to_dense()[:, None].expand(mask.shape)


MASKS = [prefix, windowed]


@pytest.mark.usefixtures("either_mode")
@pytest.mark.parametrize("make", MASKS)
def test_looks_like_the_dense_mask(make):
    mask = make()
    assert isinstance(mask, torch.Tensor)
    assert (mask.dtype, mask.ndim, mask.shape[:2]) == (torch.bool, 4, (3, 1))
    assert torch.equal(mask.dense(), dense_of(mask))
    assert mask.dense() is mask.dense()
    assert mask.tolist() == dense_of(mask).tolist()
    assert (mask.numpy() == dense_of(mask).numpy()).all()
    assert "IntervalTensor" in repr(mask)


@pytest.mark.usefixtures("either_mode")
@pytest.mark.parametrize("make", MASKS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda m: m[:, :, 1],
        lambda m: m[..., ::2],
        lambda m: m.to(torch.float32),
        lambda m: ~m,
        lambda m: m & torch.eye(m.shape[2], m.shape[3], dtype=torch.bool),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.zeros(m.shape).masked_fill(~m, 2.0),
        lambda m: torch.cat([m, m], -1),
        lambda m: m.expand(-1, 4, -1, -1),
        lambda m: m.repeat(2, 1, 1, 1),
        lambda m: m.transpose(2, 3),
        lambda m: m.reshape(-1),
        lambda m: m.index_select(0, torch.tensor([2, 0])),
        lambda m: m.sum(-1),
        lambda m: m.squeeze(1),
        lambda m: (1.0 - m.float()) * torch.finfo(torch.float32).min,
        lambda m: torch.nn.functional.pad(m, (0, 3), value=False),
    ],
)
def test_operations_see_the_dense_mask(make, operation):
    mask = make()
    result = operation(mask)
    assert type(result) is torch.Tensor
    assert torch.equal(result, operation(dense_of(mask).clone()))
    assert mask.interval is not None


@pytest.mark.usefixtures("either_mode")
@pytest.mark.parametrize("make", MASKS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda m: m.detach(),
        lambda m: m.clone(),
        lambda m: m.contiguous(),
        lambda m: m.to(torch.bool),
        lambda m: m.view(3, 1, 5, m.shape[3]),
        lambda m: m.expand(3, -1, -1, -1),
        lambda m: m[:],
        lambda m: m[:, :, :, :4],
        lambda m: m[..., 2:],
        lambda m: m[..., -3:-1],
        lambda m: m[:, :, -2:],
        lambda m: m[:, :, 1:4, 1:3],
        lambda m: m[1:],
        lambda m: m[..., :0],
        lambda m: copy.deepcopy(m),
        lambda m: copy.copy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
def test_operations_that_keep_the_bounds(make, operation):
    mask = make()
    result = operation(mask)
    wanted = operation(dense_of(mask).clone())
    assert isinstance(result, IntervalTensor)
    assert mask._dense is None
    assert result.shape == wanted.shape
    assert torch.equal(dense_of(result), wanted)
    assert torch.equal(result.dense(), wanted)
    lengths = result.interval.end - result.interval.start
    assert (result.interval.start[lengths == 0] == 0).all()


@pytest.mark.usefixtures("either_mode")
def test_one_mask_expanded_to_a_batch():
    mask = IntervalTensor.of(masks.causal(4)).expand(5, -1, -1, -1)
    assert isinstance(mask, IntervalTensor)
    assert (mask.shape[0], mask.interval.shape[0]) == (5, 1)


def test_other_device_keeps_the_bounds():
    moved = prefix().to("meta")
    assert isinstance(moved, IntervalTensor)
    assert moved.device.type == moved.interval.device.type == "meta"


@pytest.mark.usefixtures("either_mode")
@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.fill_(False),
        lambda m: m[:, :, :, 1].fill_(False),
        lambda m: m[:, :, :, :3].fill_(False),
        lambda m: m[..., 1:].detach()[:, :, 1:].zero_(),
        lambda m: m.__setitem__((..., 0), False),
        lambda m: m.masked_fill_(torch.eye(5, dtype=torch.bool), False),
        lambda m: m.__iand__(torch.eye(5, dtype=torch.bool)),
        lambda m: m[:, :, :, :2].__iand__(torch.eye(5, 2, dtype=torch.bool)),
        lambda m: torch.logical_not(m, out=m),
    ],
)
def test_writing_ends_the_bounds(write):
    mask = windowed()
    wanted = dense_of(mask).clone()
    part = mask[..., :4]
    write(mask)
    write(wanted)
    for left, right in ((mask, wanted), (part, wanted[..., :4])):
        assert left.interval is None
        assert torch.equal(left.dense(), right)
        assert torch.equal(over_keys(left, 3), right[..., :3])
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask & True):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, wanted)


@pytest.mark.usefixtures("either_mode")
def test_writing_into_a_copy_leaves_the_mask():
    mask = windowed()
    mask.clone().fill_(False)
    assert mask.interval is not None
    assert mask.dense().any()


def test_fewer_keys():
    mask = prefix()
    assert over_keys(mask, 7) is over_keys(mask, 9) is mask.interval
    cut = over_keys(mask, 3)
    assert over_keys(mask, 3) is cut, "every layer must get the same object"
    assert mask[..., :3].interval is cut
    assert torch.equal(cut.to_dense()[:, None], dense_of(mask)[..., :3])


def test_bounds_that_do_not_fit():
    with pytest.raises(ValueError, match="number of keys"):
        IntervalTensor.of(IntervalMask(torch.zeros(3).int(), torch.ones(3).int()))
    with pytest.raises(ValueError, match=r"3 rows of bounds; it must have 1 or 2"):
        IntervalTensor.of(prefix().interval, batch=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    q = torch.randn(3, 5, 2, 16, requires_grad=True)
    k = torch.randn(3, 7, 2, 16)
    mask, seen = prefix(), []

    def layer(x, mask):
        seen.append(mask.interval)
        return mm.attention(x, k, k, mask=mask.interval)

    checkpoint(layer, q, mask, use_reentrant=reentrant).sum().backward()
    wanted = torch.autograd.grad(layer(q, mask).sum(), q)[0]
    torch.testing.assert_close(q.grad, wanted)
    assert len(seen) == 3
    assert all(interval is not None for interval in seen)


@pytest.mark.parametrize("dynamic", [False, True])
def test_input_of_a_compiled_function(dynamic):
    """Sliced in the graph or not, written to before or not, and with gradients."""

    def layer(q, k, mask):
        sliced = mask[..., : k.shape[1]]
        taken = over_keys(sliced, k.shape[1]) if isinstance(sliced, IntervalTensor) else sliced
        v = 2 * k
        return mm.attention(q, k, v, mask=over_keys(mask, k.shape[1])) + mm.attention(
            q, k, v, mask=taken
        )

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen_k in (7, 6):
        for write in (False, True):
            q = torch.randn(3, 5, 2, 16, requires_grad=True)
            k = torch.randn(3, seqlen_k, 2, 16)
            mask = prefix()
            if write:
                mask[..., 1] = False
            wanted = 4 * mm.attention(q, k, k, mask=(mask & True)[..., :seqlen_k])
            out = compiled(q, k, mask)
            torch.testing.assert_close(out, wanted)
            gradients = (torch.autograd.grad(x.square().sum(), q)[0] for x in (out, wanted))
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)  # of size 10


def test_made_in_a_compiled_function():
    def layer(q):
        mask = IntervalTensor.of(masks.causal(q.shape[1]), q.shape[0])
        return mm.attention(q, q, q, mask=over_keys(mask, q.shape[1])), mask.float()

    torch._dynamo.reset()
    q = torch.randn(2, 5, 2, 16)
    out, dense = torch.compile(layer, backend="aot_eager", fullgraph=True)(q)
    torch.testing.assert_close(out, mm.attention(q, q, q, causal=True))
    assert torch.equal(dense, torch.ones(2, 1, 5, 5).tril())
