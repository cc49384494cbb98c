"""Replaced models under hooks, compilers, function transforms, autocast and data parallelism."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import mmkernels as mm
from tests.integrations.counting import kernel_calls
from tests.integrations.subjects import (
    EVERY,
    Attend,
    assert_close,
    assert_same_gradients,
    gradients,
    inputs,
    kernels,
    make,
    mixed,
    output,
    projection,
    timm_vit,
)


def pair(subject):
    """The same model untouched and replaced, and inputs of it."""
    theirs = make(subject)
    ours = copy.deepcopy(theirs)
    assert mm.replace(ours).left == ()
    return theirs, ours, inputs(theirs)


@pytest.mark.parametrize("registered", ["before", "after"])
@pytest.mark.parametrize("name", ["patches", "attend", "multihead", "layer.self_attn"])
def test_hooks(name, registered):
    model = mixed()
    x = inputs(model).requires_grad_()
    if registered == "after":
        mm.replace(model)
    module, seen = model.get_submodule(name), []

    def note(what):
        return lambda *_: seen.append(what)

    module.register_forward_pre_hook(note("before"))
    module.register_forward_pre_hook(lambda *_: seen.append("keywords"), with_kwargs=True)
    module.register_forward_hook(note("after"))
    module.register_forward_hook(note("first"), prepend=True)
    module.register_full_backward_pre_hook(note("backward"))
    module.register_full_backward_hook(note("gradients"))
    module.register_state_dict_post_hook(note("state"))
    module.register_load_state_dict_pre_hook(note("load"))
    mm.replace(model)
    model(x).sum().backward()
    state = model.state_dict()
    model.load_state_dict(state)
    calls = ["before", "keywords", "first", "after", "backward", "gradients", "state", "load"]
    assert seen == calls
    mm.restore(model)
    model(x).sum().backward()
    assert seen == calls + calls[:6]


def test_hooks_that_change_something():
    model = mixed()
    model.attend.register_forward_hook(lambda module, given, out: out + 1)
    model.patches.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    x = inputs(model)
    wanted = model(x)
    mm.replace(model)
    assert_close(model(x), wanted)


@EVERY
def test_inference_and_no_grad(subject):
    theirs, ours, x = pair(subject)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), kernel_calls() as calls:
            assert_close(output(ours, x), output(theirs, x))
        assert (calls.attention, calls.patch_embed) == kernels(subject)


@EVERY
def test_gradients(subject):
    theirs, ours, x = pair(subject)
    assert_same_gradients(gradients(ours, x), gradients(theirs, x))


@EVERY
def test_autocast(subject):
    theirs, ours, x = pair(subject)
    with torch.autocast("cpu", torch.bfloat16):
        with kernel_calls() as calls:
            got = output(ours, x)
        wanted = output(theirs, x)
    assert (calls.attention, calls.patch_embed) == kernels(subject)
    assert got.dtype == wanted.dtype
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2 * scale)
    got.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("subject", ["torch", "timm ViT"])
def test_checkpoint(subject, reentrant):
    """Attention is computed again in the backward pass: on the kernel again."""
    _, ours, x = pair(subject)
    wanted = gradients(ours, x)
    x = x.requires_grad_()
    with kernel_calls() as calls:
        got = gradients_of_checkpointed(ours, x, reentrant)
    assert (calls.attention, calls.patch_embed) == tuple(2 * n for n in kernels(subject))
    assert_same_gradients(got, wanted)


def gradients_of_checkpointed(model, x, reentrant):
    projection(output(lambda x: checkpoint(model, x, use_reentrant=reentrant), x)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("subject", ["transformers Llama", "transformers ViT", "timm ViT"])
def test_checkpointing_of_the_library(subject, reentrant):
    theirs, ours, x = pair(subject)
    wanted = gradients(theirs.train(), x)
    if subject == "timm ViT":
        ours.set_grad_checkpointing()
        x = x.requires_grad_()
    else:
        options = {"use_reentrant": reentrant}
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if subject == "transformers Llama":
            ours.enable_input_require_grads()
    with kernel_calls() as calls:
        got = gradients(ours.train(), x)
    assert calls.attention == 2 * kernels(subject)[0]
    assert_same_gradients(got, wanted)


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", **options)


@EVERY
def test_compiled(subject):
    """Into one graph, forward and backward."""
    theirs, ours, x = pair(subject)
    model = compiled(ours, fullgraph=True)
    with kernel_calls() as calls, torch.no_grad():
        assert_close(output(model, x), output(theirs, x))
    assert (calls.attention, calls.patch_embed) == kernels(subject)
    got = {n.replace("_orig_mod.", ""): g for n, g in gradients(model, x).items()}
    assert_same_gradients(got, gradients(theirs, x))


@pytest.mark.parametrize(
    "subject, which",
    [
        ("torch", "inner"),
        ("torch", "wrapper"),
        ("timm ViT", "wrapper"),
        ("transformers Llama", "inner"),
        ("transformers ViT", "wrapper"),
    ],
)
def test_replaced_after_it_was_compiled(subject, which):
    """A compiled model follows the change, and the way back."""
    model = make(subject)
    x = inputs(model)
    outer = compiled(model, fullgraph=True)
    target = outer if which == "wrapper" else model
    with torch.no_grad():
        wanted = output(outer, x)
        report = mm.replace(target)
        assert len(report.swapped) == sum(kernels(subject))
        with kernel_calls() as calls:
            assert_close(output(outer, x), wanted)
        assert (calls.attention, calls.patch_embed) == kernels(subject)
        mm.restore(target)
        with kernel_calls() as calls:
            assert_close(output(outer, x), wanted)
        assert calls.by_op == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_compiled_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = copy.deepcopy(theirs)
    mm.replace(ours)
    x = torch.randn(3, 6, 16)
    hidden = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [5]])
    model = compiled(ours, fullgraph=True)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient), kernel_calls() as calls:
            got = model(x, src_key_padding_mask=hidden)
            wanted = theirs.train(gradient)(x, src_key_padding_mask=hidden)
        assert calls.attention == 2
        assert_close(got[~hidden], wanted[~hidden])


@pytest.mark.parametrize("build", [timm_vit, mixed])
def test_exported(build):
    theirs = build()
    ours = copy.deepcopy(theirs)
    mm.replace(ours)
    x = inputs(ours)
    program = torch.export.export(ours, (x,), strict=False)
    with kernel_calls() as calls:
        assert_close(program.module()(x), theirs(x))
    assert calls.attention == 2 if build is timm_vit else 3
    assert any("mmkernels" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("subject", ["torch", "timm ViT", "transformers ViT"])
def test_functional_call_and_grad(subject):
    theirs, ours, x = pair(subject)
    parameters = dict(theirs.named_parameters())

    def loss(parameters, model):
        out = functional_call(model, parameters, (x,))
        return projection(output(lambda _: out, x))

    doubled = {name: 2 * p.detach() for name, p in parameters.items()}
    got, wanted = (grad(loss)(doubled, model) for model in (ours, theirs))
    assert_same_gradients(got, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("subject", ["torch", "timm ViT"])
def test_gradients_of_each_sample(subject):
    theirs, ours, x = pair(subject)

    def loss(parameters, sample, model):
        return projection(functional_call(model, parameters, (sample[None],)))

    def run(model):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        each = vmap(grad(loss), in_dims=(None, 0, None), randomness="same")
        return each(parameters, x, model)

    assert_same_gradients(run(ours), run(theirs))


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    path = (tmp_path / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=path, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@EVERY
def test_distributed_data_parallel(subject, when, process_group):
    theirs, ours, x = pair(subject)
    if when == "after":
        mm.restore(ours)
    wrapped = nn.parallel.DistributedDataParallel(ours)
    if when == "after":
        assert len(mm.replace(wrapped).swapped) == sum(kernels(subject))
    with kernel_calls() as calls:
        got = {n.removeprefix("module."): g for n, g in gradients(wrapped, x).items()}
    assert (calls.attention, calls.patch_embed) == kernels(subject)
    assert_same_gradients(got, gradients(theirs, x))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded(when, process_group):
    """Outside of its forward a module's parameters are DTensors, and its class is another one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    theirs = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), Attend(12))
    ours = copy.deepcopy(theirs)
    x = torch.randn(2, 3, 12, 16)
    wanted = gradients(theirs, x)
    if when == "before":
        report = mm.replace(ours)
    mesh = init_device_mesh("cpu", (1,))
    for module in (ours[0], ours[2], ours):
        fully_shard(module, mesh=mesh)
    if when == "after":
        report = mm.replace(ours)
    swapped = [entry.kind for entry in report.swapped]
    assert swapped == ["patch embedding", "attention"] if when == "before" else ["attention"]
    with kernel_calls() as calls:
        out = ours(x)
    assert calls.attention == swapped.count("attention")
    assert calls.patch_embed == swapped.count("patch embedding")
    assert_close(out, theirs(x))
    projection(out).backward()
    got = {n: p.grad.full_tensor() for n, p in ours.named_parameters()}
    assert_same_gradients(got, wanted)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_restore_of_what_is_fully_sharded(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = nn.Sequential(Attend(16))
    mm.replace(model)
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    mm.restore(model)
    assert isinstance(model[0], FSDPModule)


def test_twice_is_once_when_it_is_fully_sharded(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
    report = mm.replace(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert mm.replace(model) == report
