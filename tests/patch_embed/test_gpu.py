"""What only a GPU can show of the patch embedding: real tiles, graphs, vast tensors, no waiting.

By the kernels in Triton and, where the extension is built, those in CUDA C++.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import library, values
from tests.patch_embed.cases import EQUAL, IMAGENET, Case, image_bytes, normal, weights

pytestmark = pytest.mark.gpu
bf16 = torch.bfloat16


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    if request.param == "cuda" and (reason := library.load_error()):
        pytest.skip(reason)
    return request.param


def vit(pixels: Tensor, patch: int, dim: int, **options: object) -> Case:
    """A class token, and positions for all."""
    tokens = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    tail = {"prefix_tokens": normal(1, dim, seed=5), "pos_embed": normal(1 + tokens, dim, seed=6)}
    return Case(pixels, weights(dim, 3, patch, patch) | tail | options).to(bf16, "cuda")


MODELS = {
    "ViT-B/16": lambda: vit(normal(64, 3, 224, 224), 16, 768),
    "ViT-B/16, bytes": lambda: vit(image_bytes(64, 3, 224, 224), 16, 768, **EQUAL),
    "SigLIP-so400m/14": lambda: vit(normal(8, 3, 384, 384), 14, 1152),
    "SigLIP-so400m/14, bytes": lambda: vit(image_bytes(8, 3, 384, 384), 14, 1152, **IMAGENET),
}


@pytest.mark.parametrize("model", MODELS)
def test_real_tiles_obey_the_error_rule(model, backend):
    case = MODELS[model]()
    got = case.results(mm.patch_embed, backend=backend)
    exact = case.to(torch.float64, "cuda").results(mm.patch_embed, backend="reference")
    eager = case.results(testing.eager_patch_embed)
    for name, x in got.items():
        testing.assert_accurate(name, x, exact[name], eager[name])
    error, allowed = ((x["out"].double() - exact["out"]).abs().mean() for x in (got, eager))
    assert error < allowed


@pytest.mark.parametrize("model", MODELS)
def test_every_run_gives_the_same_bits(model, backend):
    case = MODELS[model]()
    first, second = (case.results(mm.patch_embed, backend=backend) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_a_captured_graph_replays_with_new_pixels(backend):
    case = MODELS["ViT-B/16, bytes"]()

    def run() -> dict[str, Tensor]:
        return case.results(mm.patch_embed, backend=backend)

    side = torch.cuda.Stream()  # kernels are compiled, and constants made, before the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    dout = torch.randn(64, 197, 768, dtype=bf16, device="cuda")
    weight = case.options["weight"].detach().requires_grad_()
    arguments = {**case.options, "weight": weight}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mm.patch_embed(case.pixels, **arguments, backend=backend)
        (dweight,) = torch.autograd.grad(out, (weight,), dout)
    case.pixels.copy_(image_bytes(64, 3, 224, 224).flip(0))
    graph.replay()
    replayed = out.detach().clone(), dweight.clone()
    out = mm.patch_embed(case.pixels, **arguments, backend=backend)
    wanted = out.detach(), *torch.autograd.grad(out, (weight,), dout)
    assert all(map(torch.equal, replayed, wanted))


@pytest.mark.skipif(values.ALWAYS, reason="MMKERNELS_CHECK=1 reads values")
@pytest.mark.parametrize("model", MODELS)
def test_no_call_waits_for_the_gpu(model, backend):
    case = MODELS[model]()
    leaves = {
        n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in case.options.items()
    }

    def run() -> None:
        out = mm.patch_embed(case.pixels, **leaves, backend=backend)
        out.backward(out.detach())

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_31_bits(backend):
    """More than 2**31 values of out, and pixels that lie as far apart."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory on the GPU")
    batch = 2**31 // (196 * 768) + 3
    pixels = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8, device="cuda")
    spread = pixels.expand(batch, -1, -1, -1)
    weight = torch.randn(768, 3, 16, 16, dtype=bf16, device="cuda")
    out = mm.patch_embed(spread, weight, backend=backend)
    assert torch.equal(out[-1], out[0])
    far = torch.empty(2**31 + 3 * 224 * 224, dtype=torch.uint8, device="cuda")
    far[-3 * 224 * 224 :] = pixels.flatten()
    far[: 3 * 224 * 224] = pixels.flatten()
    strided = far.as_strided((2, 3, 224, 224), (2**31, 224 * 224, 224, 1))
    assert torch.equal(mm.patch_embed(strided, weight, backend=backend), out[:2])
