"""Does an existing model give on a spread sequence what it gives in one process?"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointError, checkpoint

import mmkernels as mm
from mmkernels.distributed import Layout, context_parallel
from mmkernels.integrations.sdpa import sdpa_override
from tests.distributed import world

METHODS = ("ring", "all_to_all")
SEQLEN, IMAGE = 37, slice(5, 12)


class Block(nn.Module):
    """Attention of a model that knows nothing of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, attend):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return x + self.proj(attend(q, k, v).flatten(2))


class Model(nn.Module):
    def __init__(self, call, again=False):
        super().__init__()
        self.blocks, self.call, self.again = nn.ModuleList(Block() for _ in range(2)), call, again

    def forward(self, x, mask):
        attend = CALLS[self.call](mask)
        for block in self.blocks:
            x = (
                checkpoint(block, x, attend, use_reentrant=False)
                if self.again
                else block(x, attend)
            )
        return x


def heads_first(q, k, v, **options):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_override():
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


CALLS = {
    "attention": lambda mask: lambda q, k, v: mm.attention(q, k, v, mask=mask),
    "causal": lambda mask: lambda q, k, v: mm.attention(q, k, v, causal=True),
    "sdpa": lambda mask: lambda q, k, v: heads_first(q, k, v, is_causal=True),
}


def mask():
    ids = torch.full((SEQLEN,), -1)
    ids[IMAGE] = 0
    return mm.masks.causal(SEQLEN) | mm.masks.spans(ids)


def results(model, x, weights, layout=None, mesh=None, method="ring"):
    """Output and the gradients of input and parameters, of the whole or this process's part."""
    if layout is not None:
        x, weights = (layout.shard(t, mesh.get_local_rank()) for t in (x, weights))
    x.requires_grad_()
    if layout is None:
        out = model(x, mask())
        (out * weights).sum().backward()
    else:
        with context_parallel(model, mesh, layout, method=method):
            out = model(x, mask())
            (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def make(call, again=False):
    torch.manual_seed(0)
    model = Model(call, again)
    return model, torch.randn(2, SEQLEN, 32), torch.randn(2, SEQLEN, 32)


def spread(ranks, call, method, again):
    mesh = init_device_mesh("cpu", (ranks,))
    return results(*make(call, again), Layout.zigzag(SEQLEN, ranks), mesh, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("call", CALLS)
def test_model(call, method, again):
    expected = results(*make(call))
    parts = world.run(2, spread, 2, call, method, again)
    layout = Layout.zigzag(SEQLEN, 2)
    for index, (want, *got) in enumerate(zip(expected, *parts, strict=True)):
        whole = layout.unshard(got) if index < 2 else sum(got)
        torch.testing.assert_close(whole, want, rtol=1e-4, atol=2e-5)


def llama(ranks, method):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    mm.replace(model)
    ids = torch.randint(50, (1, SEQLEN))
    everything = torch.ones(1, SEQLEN, dtype=torch.long)
    if not ranks:
        return model(input_ids=ids, attention_mask=everything).logits.detach()
    mesh, layout = init_device_mesh("cpu", (ranks,)), Layout.zigzag(SEQLEN, ranks)
    rank = mesh.get_local_rank()
    positions = torch.arange(SEQLEN)[None]
    with context_parallel(model, mesh, layout, method=method):
        return model(
            input_ids=layout.shard(ids, rank), position_ids=layout.shard(positions, rank),
            attention_mask=everything, use_cache=False,
        ).logits.detach()  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_model_of_transformers(method):
    pytest.importorskip("transformers")
    got = Layout.zigzag(SEQLEN, 2).unshard(world.run(2, llama, 2, method))
    torch.testing.assert_close(got, llama(0, method), rtol=1e-4, atol=1e-5)


def late_backward():
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(SEQLEN, 2)
    model, x, _ = make("causal", again=True)
    with context_parallel(model, mesh, layout):
        out = model(layout.shard(x, mesh.get_local_rank()), None)
    try:
        out.sum().backward()
    except CheckpointError:
        return True
    return False


def test_checkpointed_backward_outside_of_the_block_is_an_error():
    assert all(world.run(2, late_backward))


class Foreign(nn.Module):
    """Two blocks, of which one calls attention of torch's own."""

    def __init__(self, call):
        super().__init__()
        self.first, self.call = Block(), call

    def forward(self, x):
        x = self.first(x, lambda q, k, v: mm.attention(q, k, v, causal=True))
        return self.call(x)


def foreign(kind):
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(SEQLEN, 2)
    x = layout.shard(torch.randn(2, SEQLEN, 32), mesh.get_local_rank())
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    ours = mm.modules.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    call = {
        "sdpa": lambda x: F.scaled_dot_product_attention(x, x, x),
        "module of torch": lambda x: theirs(x, x, x, need_weights=False)[0],
        "weights": lambda x: ours(x, x, x)[0],
    }[kind]
    model = Foreign(call)
    try:
        with context_parallel(model, mesh, layout):
            model(x)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("sdpa", "torch's scaled_dot_product_attention"),
        ("module of torch", "torch's multi_head_attention_forward"),
        ("weights", "need_weights=False"),
    ],
)
def test_a_model_that_is_partly_on_other_attention_is_refused(kind, words):
    for message in world.run(2, foreign, kind):
        assert words in message


def again_and_within():
    """A context may be entered twice, and holds no model that another one holds."""
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(SEQLEN, 2)
    model, x, _ = make("causal")
    x = layout.shard(x, mesh.get_local_rank())
    context = context_parallel(model, mesh, layout)
    with context:
        model(x, None)
    messages = []
    for act in (lambda: None, lambda: context_parallel(model.blocks, mesh, layout).__enter__()):
        try:
            with context:
                act()
        except RuntimeError as error:
            messages.append(str(error))
    with context:
        model(x, None)
    return messages


def test_a_context_again_and_within_another():
    for none, nested in world.run(2, again_and_within):
        assert "called no attention" in none
        assert "in such a block already" in nested


def llama_without(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    mm.replace(model)
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(SEQLEN, 2)
    rank = mesh.get_local_rank()
    given = {
        "position_ids": layout.shard(torch.arange(SEQLEN)[None], rank),
        "attention_mask": torch.ones(1, SEQLEN, dtype=torch.long),
    }
    del given[name]
    try:
        with context_parallel(model, mesh, layout):
            ids = layout.shard(torch.zeros(1, SEQLEN, dtype=torch.long), rank)
            model(input_ids=ids, use_cache=False, **given)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
def test_what_a_model_of_transformers_needs(name):
    pytest.importorskip("transformers")
    for message in world.run(2, llama_without, name):
        assert name in message


def misuse(kind):
    mesh, layout = init_device_mesh("cpu", (2,)), Layout.zigzag(SEQLEN, 2)
    rank = mesh.get_local_rank()
    model, x, _ = make("attention")
    x = layout.shard(x, rank)
    try:
        with context_parallel(model, mesh, layout):
            if kind == "no call":
                model.blocks[0].qkv(x)
            elif kind == "local mask":
                model(x, mm.masks.causal(x.shape[1]))
            elif kind == "cross":
                model.blocks[0](x, lambda q, k, v: mm.attention(q, k[:, :13], v[:, :13]))
            elif kind == "whole input":
                model(make("attention")[1], mask())
            else:
                options = {
                    "bias": {"bias": torch.zeros(1, 1, 1, 1)},
                    "alibi_slopes": {"alibi_slopes": torch.ones(4)},
                    "dropout_p": {"dropout_p": 0.5},
                }[kind]
                attend = lambda q, k, v: mm.attention(q, k, v, **options)  # noqa: E731
                model.blocks[0](x, attend)
    except (ValueError, RuntimeError) as error:
        again, x, _ = make("causal")
        again(x, None)  # what is outside of the block is as ever
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no call", "mmkernels.replace"),
        ("local mask", "over the whole sequence"),
        ("whole input", "layout.shard"),
        ("cross", "cross attention"),
        ("bias", "bias is given"),
        ("alibi_slopes", "alibi_slopes is given"),
        ("dropout_p", "dropout_p is given"),
    ],
)
def test_misuse_is_named(kind, words):
    for message in world.run(2, misuse, kind):
        assert words in message
