"""Does the patch embedding live with torch's transforms: compile, export, autocast and others?"""

import functools
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import ops
from mmkernels.patch_embed import cpu
from mmkernels.patch_embed.api import differentiable_arguments
from mmkernels.patch_embed.build import build
from mmkernels.patch_embed.call import Call
from tests.attention import backends
from tests.patch_embed.cases import (
    BACKENDS,
    CASES,
    EQUAL,
    IMAGENET,
    Case,
    image_bytes,
    normal,
    tokens_of,
    weights,
)

EVERY = backends.each(*BACKENDS)
AUTO_TOO = backends.each("auto", *BACKENDS)
FEW = backends.each("auto", "triton")


def case_for(name: str, backend: str, dtype: torch.dtype = torch.float32) -> Case:
    return CASES[name]().to(dtype, testing.device_for(backend))


def small(backend: str = "auto", dtype: torch.dtype = torch.float32) -> Case:
    """Every argument that has a gradient, on floats of three small images."""
    options = weights(16, 3, 4, 4) | tokens_of(3, 4, 2, 16) | IMAGENET
    return Case(normal(3, 3, 8, 9), options).to(dtype, testing.device_for(backend))


def tensors_of(case: Case) -> dict[str, Tensor]:
    """The arguments that have a gradient, by name."""
    arguments = {"pixels": case.pixels} | case.options
    return {
        name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()
    }


def loss_of(case: Case, backend: str):
    """A function of `tensors_of(case)`'s values, whose second derivative is not 0."""
    names, fixed = tuple(tensors_of(case)), {"pixels": case.pixels} | case.options

    def run(*tensors: Tensor) -> Tensor:
        arguments = fixed | dict(zip(names, tensors, strict=True))
        return mm.patch_embed(**arguments, backend=backend).sin().sum()

    return run


def call_of(case: Case) -> Call:
    return build("patch_embed", [case.pixels], **case.options)


LAYOUTS = ["vit", "masked", "gathered_alike", "image_stds", "padded", "overlapping", "audio"]
INTERPRETED = {"masked", "image_stds"}  # of many, what the interpreter runs


def layouts_and_backends(*names: str):
    return pytest.mark.parametrize(
        ("name", "backend"),
        [
            backends.param(name, backend, on=backend, id=f"{name}-{backend}")
            for name in LAYOUTS
            for backend in names
            if backend != "triton" or name in INTERPRETED
        ],
    )


@layouts_and_backends("auto", *BACKENDS)
def test_opcheck_forward(name, backend):
    call = call_of(case_for(name, backend))
    torch.library.opcheck(torch.ops.mmkernels.patch_embed_forward.default, (*call, backend))


@layouts_and_backends("auto", *BACKENDS)
def test_opcheck_backward(name, backend):
    call = call_of(case_for(name, backend))
    dout = torch.randn_like(ops.call("patch_embed_forward", *call, backend))
    there = [x is not None for x in differentiable_arguments(call)]
    floats = call.pixels[0].is_floating_point()
    op = torch.ops.mmkernels.patch_embed_backward.default
    torch.library.opcheck(op, (dout, *call, [floats, *there], backend))
    torch.library.opcheck(op, (dout, *call, [False] * 6, backend))


@backends.each(*BACKENDS)
def test_opcheck_of_pixels_with_channels_last_and_expanded_samples(backend):
    """A gradient has the strides that the fake says, whatever those of its argument."""
    op = torch.ops.mmkernels.patch_embed_backward.default
    for strided in ("strided", "per_sample"):
        case = case_for(strided, backend)
        pixels = case.pixels
        if strided == "per_sample":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        call = call_of(Case(pixels, case.options))
        dout = torch.randn_like(ops.call("patch_embed_forward", *call, backend))
        there = [x is not None for x in differentiable_arguments(call)]
        torch.library.opcheck(op, (dout, *call, [True, *there], backend))


COMPILED = {
    "vit": "auto", "masked": "auto", "gathered": "auto", "image_stds": "auto", "padded": "auto",
    "overlapping": "auto", "video": "reference", "image": "triton",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [backends.param(name, on=backend, id=name) for name, backend in COMPILED.items()]
)
def test_compile_is_fullgraph_and_equal(name):
    case = case_for(name, COMPILED[name])
    torch._dynamo.reset()
    compiled = torch.compile(mm.patch_embed, fullgraph=True, backend="aot_eager")
    wanted = case.results(mm.patch_embed, backend=COMPILED[name])
    got = case.results(compiled, backend=COMPILED[name])
    assert got.keys() == wanted.keys()
    for key, x in got.items():
        torch.testing.assert_close(x, wanted[key], msg=lambda text, key=key: f"{key}: {text}")


def test_compile_of_images_of_mixed_size():
    weight = normal(16, 3, 4, 4).float().requires_grad_()
    images = [image_bytes(3, 8, 9), image_bytes(3, 5, 12)]
    torch._dynamo.reset()
    compiled = torch.compile(mm.patch_embed_varlen, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, mm.patch_embed_varlen):
        tokens, cu_seqlens = function(images, weight, **EQUAL)
        results.append((tokens, cu_seqlens, *torch.autograd.grad(tokens.sin().sum(), weight)))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on PATH")
def test_compile_with_inductor():
    # Channels last: inductor relies on the strides of every gradient.
    case = small()
    pixels = case.pixels.contiguous(memory_format=torch.channels_last)
    case = case._replace(pixels=pixels)
    torch._dynamo.reset()
    run = loss_of(case, "auto")
    leaves = [x.detach().requires_grad_() for x in tensors_of(case).values()]
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(run(*leaves), leaves))


@pytest.mark.parametrize("training", [False, True])
def test_batch_and_size_are_dynamic(training):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    options = weights(16, 3, 4, 4) | {"prefix_tokens": normal(2, 16)}
    options = Case(normal(1), options).to(torch.float32).options | IMAGENET
    weight = options["weight"].requires_grad_(training)
    compiled = torch.compile(mm.patch_embed, fullgraph=True, backend=counting, dynamic=True)
    # No two sizes alike at first, or dynamo takes them for one.
    for batch, height, width in ((5, 9, 14), (6, 9, 14), (7, 13, 24)):
        pixels = image_bytes(batch, 3, height, width)
        got = compiled(pixels, **options)
        torch.testing.assert_close(got, mm.patch_embed(pixels, **options))
        if training:
            got.sum().backward()
    assert len(graphs) == 1
    assert not training or weight.grad is not None


def test_another_batch_is_no_reason_to_compile_again():
    """With marked dimensions alone, as a training script has it; positions stay static."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(mm.patch_embed, fullgraph=True, backend=counting)
    options = CASES["vit"]().to(torch.float32).options
    for batch in (2, 3, 7):
        pixels = normal(batch, 3, 35, 26).float()
        torch._dynamo.mark_dynamic(pixels, 0)
        torch.testing.assert_close(compiled(pixels, **options), mm.patch_embed(pixels, **options))
    assert len(graphs) == 1


def test_compiled_function_follows_use_backend():
    torch._dynamo.reset()
    case = small()
    compiled = torch.compile(mm.patch_embed, fullgraph=True, backend="aot_eager")
    compiled(case.pixels, **case.options)
    with mm.use_backend("cuda"), pytest.raises(mm.BackendUnavailable):
        compiled(case.pixels, **case.options)
    compiled(case.pixels, **case.options)


@pytest.mark.parametrize("name", ["vit", "image_stds", "gathered_alike"])
def test_export(name):
    case = CASES[name]().to(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, pixels):
            return mm.patch_embed(pixels, **case.options)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Model(), (case.pixels,), dynamic_shapes=[{0: batch}])
    more = torch.cat([case.pixels, case.pixels.flip(3)])
    torch.testing.assert_close(program.module()(more), Model()(more))


@backends.each_in([torch.bfloat16, torch.float16], "auto", *BACKENDS)
@pytest.mark.parametrize("name", ["masked", "image_stds"])
def test_autocast(name, backend, dtype):
    case = case_for(name, backend)
    with torch.autocast(case.pixels.device.type, dtype=dtype):
        got = case.results(mm.patch_embed, backend=backend)
    wanted = case.to(torch.float64).results(mm.patch_embed, backend="reference")
    assert got.pop("out").dtype == dtype
    for key, x in got.items():
        assert x.dtype == torch.float32
        size = wanted[key].abs().amax()
        assert (x.cpu().double() - wanted[key].cpu()).abs().amax() < 8 * torch.finfo(
            dtype
        ).eps * size


@pytest.mark.parametrize("native", [False, True])
@AUTO_TOO
def test_autocast_leaves_positions_in_float32(monkeypatch, backend, native):
    """Product and position are added in float32 and rounded once; the result has the cast dtype."""
    monkeypatch.setattr(cpu, "NATIVE_BFLOAT16", native)
    dtype = torch.float16 if backends.interpreted(backend) else torch.bfloat16
    device = testing.device_for(backend)
    pixels, weight = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1.0)
    step = torch.finfo(dtype).eps
    # 1 - 1.4 eps/2 is a number of float32 alone: cast to dtype, it would give another sum.
    pos = torch.full((1, 1), -1.0 + 0.7 * step)
    arguments = [x.to(device) for x in (pixels, weight)]
    with torch.autocast(device, dtype=dtype):
        out = mm.patch_embed(*arguments, pos_embed=pos.to(device), backend=backend)
    assert out.dtype == dtype
    assert out.item() == torch.tensor(0.7 * step).to(dtype).item()


@backends.each("auto", "cpu", "reference")
def test_autocast_leaves_float64(backend):
    case = small(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = mm.patch_embed(case.pixels, **case.options, backend=backend)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, mm.patch_embed(case.pixels, **case.options))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_does_not_cast_inside_of_a_backend(grad):
    """bfloat16 weights are multiplied in float32 by the reference, under autocast, too."""
    case = small(dtype=torch.bfloat16)
    case.options["weight"].requires_grad_(grad)
    run = functools.partial(mm.patch_embed, case.pixels, **case.options, backend="reference")
    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    assert torch.equal(inside, outside)


@AUTO_TOO
def test_func_grad(backend):
    case = small(backend)
    tensors = tuple(tensors_of(case).values())
    run = loss_of(case, backend)
    grads = torch.func.grad(run, argnums=tuple(range(len(tensors))))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    wanted = torch.autograd.grad(loss_of(case, "reference")(*leaves), leaves)
    torch.testing.assert_close(grads, wanted, atol=2e-4, rtol=2e-4)


@AUTO_TOO
def test_vmap(backend):
    case = small(backend)
    run = loss_of(case, backend)
    tensors = tuple(tensors_of(case).values())
    stacked = [torch.stack([x, 2 * x]) for x in tensors]
    wanted = torch.stack([run(*(x[i] for x in stacked)) for i in range(2)])
    torch.testing.assert_close(torch.vmap(run)(*stacked), wanted)
    # Gradients for each sample, of a weight that they share.
    dims = (0, *(None,) * (len(tensors) - 1))
    grad = torch.func.grad(run, argnums=1)
    got = torch.vmap(grad, dims)(stacked[0], *tensors[1:])
    wanted = torch.stack([grad(x, *tensors[1:]) for x in stacked[0]])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@FEW
def test_checkpointing(backend, reentrant):
    case = small(backend)
    run = loss_of(case, backend)
    leaves = [x.detach().requires_grad_() for x in tensors_of(case).values()]
    plain = torch.autograd.grad(run(*leaves), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, plain, strict=True))


@backends.each("auto", "cpu", "triton")
def test_second_derivative_is_refused(backend):
    case = small(backend)
    leaves = [x.detach().requires_grad_() for x in tensors_of(case).values()]
    grads = torch.autograd.grad(loss_of(case, backend)(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        sum(grad.sum() for grad in grads).backward()


def test_second_derivative_of_the_reference():
    options = weights(3, 2, 2, 2) | tokens_of(2, 2, 1, 3) | {"pixel_mean": 0.2, "pixel_std": 0.5}
    case = Case(normal(2, 2, 3, 5), options)
    run = loss_of(case, "reference")
    leaves = [x.requires_grad_() for x in tensors_of(case).values()]
    assert torch.autograd.gradgradcheck(run, leaves)


@EVERY
@pytest.mark.parametrize("name", ["masked", "gathered", "image_stds", "overlapping"])
def test_gradients_are_bitwise_the_same_again(name, backend):
    case = case_for(name, backend)
    first, second = (case.results(mm.patch_embed, backend=backend) for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())


def test_meta_tensors():
    case = CASES["padded"]().to(torch.float32, "meta")
    weight = case.options.pop("weight").requires_grad_()
    out = mm.patch_embed(case.pixels, weight, **case.options)
    assert out.is_meta and out.shape == (2, 16, 24)
    out.sum().backward()
    assert weight.grad.is_meta and weight.grad.shape == weight.shape
    out, cu_seqlens = mm.patch_embed_varlen(list(case.pixels), weight, pad=True)
    assert out.is_meta and out.shape == (30, 24) and cu_seqlens.shape == (3,)


@AUTO_TOO
def test_inference_mode(backend):
    case = small(backend)
    arguments = {"pixels": case.pixels} | case.options
    wanted = mm.patch_embed(**arguments, backend=backend)
    arguments["weight"].requires_grad_()
    with torch.inference_mode():
        out = mm.patch_embed(**arguments, backend=backend)
    assert out.is_inference() and torch.equal(out, wanted)
    with torch.no_grad():
        assert not mm.patch_embed(**arguments, backend=backend).requires_grad


ARGUMENTS = ("pixels", "weight", "bias", "prefix_tokens", "pos_embed", "mask_token")


@EVERY
def test_each_argument_alone_may_want_a_gradient(backend):
    case = small(backend)
    everything = case.results(mm.patch_embed, backend=backend)
    assert set(everything) == {"out", *(f"d{name}" for name in ARGUMENTS)}
    few = backends.interpreted(backend)
    for name in ("weight", "pos_embed", "pixels") if few else ARGUMENTS:
        arguments = {"pixels": case.pixels} | case.options
        arguments[name] = leaf = arguments[name].detach().requires_grad_()
        out = mm.patch_embed(**arguments, backend=backend)
        out.backward(normal(*out.shape, seed=99).to(out))
        torch.testing.assert_close(leaf.grad, everything[f"d{name}"], msg=name)


def saved_by(run) -> list[Tensor]:
    """What a forward pass keeps for the backward pass."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert run().requires_grad
    return saved


@backends.each("auto", "cpu", "triton")
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bytes_are_saved_as_bytes(backend, autocast):
    case = case_for("image", backend)
    case.options["weight"].requires_grad_()
    run = functools.partial(mm.patch_embed, case.pixels, **case.options, backend=backend)
    with torch.autocast(case.pixels.device.type, torch.float16, enabled=autocast):
        saved = saved_by(run)
    assert [x.data_ptr() for x in saved if x.dtype == torch.uint8] == [case.pixels.data_ptr()]
    known = {id(x) for x in case.options.values()}
    floats = [x for x in saved if x.is_floating_point() and id(x) not in known]
    assert all(x.numel() < case.pixels.numel() // 2 or x.shape[0] == 24 for x in floats)


@FEW
def test_floats_are_saved_as_they_came(backend):
    """Neither patches that are cut out nor normalised pixels."""
    case = small(backend)
    case.options["weight"].requires_grad_()
    saved = saved_by(
        functools.partial(mm.patch_embed, case.pixels, **case.options, backend=backend)
    )
    of_size = [x for x in saved if x.numel() >= case.pixels.numel()]
    assert all(
        x.untyped_storage().data_ptr()
        in {y.untyped_storage().data_ptr() for y in tensors_of(case).values()}
        for x in of_size
    )
    assert any(x.data_ptr() == case.pixels.data_ptr() for x in of_size)
