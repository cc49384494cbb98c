"""Is the patch embedding of DTensors that of the whole tensors, however these are divided?"""

import pytest
import torch

import mmkernels as mm
from tests.distributed import world
from tests.distributed.test_dtensor import WHOLE, dims_of, distributed, mesh_of
from tests.patch_embed import cases

COLUMN_DIMS = {"weight": 0, "bias": 0, "mask_token": 0, "prefix_tokens": -1, "pos_embed": -1}


def embed(name, shape, splits, plain):
    """out and all gradients as whole tensors, and how out is divided."""
    mesh = mesh_of(*shape)
    case = cases.CASES[name]().to(torch.float32, mesh.device_type)

    def patch_embed(pixels, **options):
        def spread(x, dim, split):
            return distributed(x, mesh, [dim if s == split else WHOLE for s in splits])

        for key, x in options.items():
            if isinstance(x, torch.Tensor) and (key == "weight" or not plain):
                dim = COLUMN_DIMS.get(key)
                options[key] = spread(x, None if dim is None else dim % x.ndim, "columns")
        out = mm.patch_embed(spread(pixels, 0, "batch"), **options)
        divided.append(dims_of(out))
        return out.full_tensor()

    divided = []
    results = case.results(patch_embed, pixel_grad=case.pixels.is_floating_point())
    return {key: x.cpu() for key, x in results.items()}, divided[0]


def check(name, shape, splits, plain=False):
    """Raises unless all processes have what one alone has; returns how out is divided."""
    results = world.run(torch.Size(shape).numel(), embed, name, shape, splits, plain)
    for got, divided in results:
        cases.check(cases.CASES[name](), torch.float32, lambda _, got=got: got)
        assert divided == results[0][1]
    return results[0][1]


@pytest.mark.parametrize("split", ["batch", "columns"])
@pytest.mark.parametrize("name", cases.CASES)
def test_every_case(name, split):
    by_batch = split == "batch" and cases.CASES[name]().pixels.shape[0] % 2 == 0
    assert check(name, (2,), (split,)) == (0 if by_batch else 2,)


@pytest.mark.parametrize("split", ["batch", "columns"])
@pytest.mark.parametrize("name", ["vit", "image", "overlapping"])
def test_plain_parameters(name, split):
    check(name, (2,), (split,), plain=True)


@pytest.mark.parametrize("splits", [("batch", "columns"), ("columns", "columns")], ids=str)
@pytest.mark.parametrize("name", ["vit", "image"])
def test_two_mesh_dimensions(name, splits):
    expected = tuple({"batch": 0, "columns": 2}[split] for split in splits)
    assert check(name, (2, 2), splits) == expected


def per_sample_and_varlen():
    """The largest difference of each call and its gradients to those on whole tensors."""
    mesh = mesh_of(2)
    made = cases.weights(20, 3, 8, 8)
    weight, bias = (x.float().to(mesh.device_type).requires_grad_() for x in made.values())
    images = [torch.randn(3, 16, 24), torch.randn(3, 8, 16)]
    pixels, own = torch.randn(2, 3, 16, 24), torch.randn(2, 6, 20)
    prefix, index = torch.randn(2, 2, 20), torch.randint(0, 12, (2, 6))
    table, mask, token = torch.randn(12, 20), torch.rand(2, 6) < 0.5, torch.randn(20)
    patches = torch.randn(2, 5, 192)
    masked = {"token_mask": mask, "mask_token": token}
    calls = {
        "own positions": (mm.patch_embed, pixels, {"pos_embed": own, "prefix_tokens": prefix}),
        "own indices": (mm.patch_embed, pixels, {"pos_embed": table, "pos_index": index, **masked}),
        "patches": (mm.patch_embed, patches, {"prefix_tokens": prefix}),
        "varlen": (mm.patch_embed_varlen, images, {"prefix_tokens": prefix[0]}),
    }
    found = {}
    for name, (function, x, options) in calls.items():
        for dims in ((0, WHOLE), (WHOLE, 0), (0, 0), (2, WHOLE)):
            expected = whole(function, x, weight, bias, options)
            spread = [distributed(y, mesh, dims[1:]) for y in (weight, bias)]
            parts = (
                [distributed(y, mesh, dims[:1]) for y in x]
                if isinstance(x, list)
                else distributed(x, mesh, dims[:1])
            )
            got = whole(function, parts, *spread, options, leaves=(weight, bias))
            differences = [(a - b).abs().max().item() for a, b in zip(got, expected, strict=True)]
            found[name, dims] = max(differences)
    return found


def whole(function, pixels, weight, bias, options, leaves=None):
    """out and the gradients of weight and bias, as whole tensors."""
    out = function(pixels, weight, bias, **options)
    out = out[0] if isinstance(out, tuple) else out
    out = out.full_tensor() if hasattr(out, "full_tensor") else out
    return out, *torch.autograd.grad(out.sin().sum(), leaves or (weight, bias))


def test_per_sample_and_varlen():
    for found in world.run(2, per_sample_and_varlen):
        assert len(found) == 16
        assert max(found.values()) < 1e-4, found


def mixed():
    mesh = mesh_of(2)
    pixels, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 8, 8)
    pixels, weight = (x.to(mesh.device_type) for x in (pixels, weight))
    texts = []
    for arguments in (
        (distributed(pixels, mesh, [0]), weight),
        (pixels, distributed(weight, mesh, [0])),
        (pixels, weight, distributed(weight[:, 0, 0, 0], mesh, [0])),
    ):
        with pytest.raises(TypeError) as caught:
            mm.patch_embed(*arguments)
        texts.append(str(caught.value))
    return texts


def test_mixed_calls_are_refused():
    texts = world.run(2, mixed)[0]
    names = [("pixels", "weight"), ("weight", "pixels"), ("bias", "pixels")]
    for (spread, plain), text in zip(names, texts, strict=True):
        assert f"{spread} is a DTensor and {plain} " in text
