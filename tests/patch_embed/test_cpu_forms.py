"""The CPU backend's form in all that it chooses: chunks, the product's dtype, where std goes."""

import functools

import pytest
import torch

import mmkernels as mm
from mmkernels.patch_embed import cpu, flattened, reference
from mmkernels.patch_embed.build import build
from mmkernels.patch_embed.call import items, row_count
from tests.patch_embed.cases import CASES, MEAN, STD, Case, check, image_bytes, normal, weights


def run(case: Case):
    return case.results(mm.patch_embed, backend="cpu")


def varlen(case: Case, images, **more):
    """out and gradients of images of mixed size, one after the other."""

    def function(pixels, weight, **options):
        return mm.patch_embed_varlen(images(pixels), weight, **options, **more)[0]

    return case.results(function)


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_depend_on_chunks(monkeypatch, name, chunk):
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    check(CASES[name](), torch.float32, run)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_product_obeys_the_error_rule(monkeypatch, name, native):
    monkeypatch.setattr(cpu, "NATIVE_BFLOAT16", native)
    monkeypatch.setattr(cpu, "CHUNK", 16)
    check(CASES[name](), torch.bfloat16, run)


@pytest.mark.parametrize(
    ("dtype", "native", "expected"),
    [
        (torch.float64, True, torch.float64),
        (torch.float32, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
    ],
)
def test_dtype_of_the_product(monkeypatch, dtype, native, expected):
    monkeypatch.setattr(cpu, "NATIVE_BFLOAT16", native)
    weight = torch.empty(2, 2, dtype=dtype)
    assert cpu.product_dtype(weight) == cpu.product_dtype(weight, None, weight[0]) == expected
    wide = weight[0].to(torch.promote_types(dtype, torch.float32))
    assert cpu.product_dtype(weight, wide) == wide.dtype


def built(pixels, where="patch_embed", **more):
    images = pixels if isinstance(pixels, list) else [pixels]
    weight = normal(8, images[0].shape[1], 4, 4).float()
    return build(where, images, weight, **more)


def test_chunks_are_whole_samples_in_order():
    images = [image_bytes(1, 3, 4 * n, 8) for n in (1, 2, 20, 1, 3)]
    call = built(images, "patch_embed_varlen", prefix_tokens=normal(1, 8).float())
    rows = [item.rows for item in items(call)]
    assert rows == [3, 5, 41, 3, 7]
    found = list(cpu.chunks(call))
    limited = [sum(piece.item.rows for piece in pieces) for _, pieces in found]
    assert [part for part, _ in found] == [slice(0, row_count(call))]
    assert limited == [sum(rows)]


def test_chunks_hold_at_least_one_sample(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 10)
    images = [image_bytes(1, 3, 4 * n, 8) for n in (1, 2, 20, 1, 3)]
    call = built(images, "patch_embed_varlen")
    assert [(part.start, part.stop) for part, _ in cpu.chunks(call)] == [(0, 6), (6, 46), (46, 54)]
    call = built(image_bytes(7, 3, 8, 8))
    assert [(part.start, part.stop) for part, _ in cpu.chunks(call)] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, 28),
    ]
    assert [pieces[0].samples for _, pieces in cpu.chunks(call)][-1] == slice(6, 7)


def test_where_mean_and_std_go():
    images = image_bytes(1, 3, 8, 8)
    plain = cpu.Pixels(built(images), torch.float32)
    assert (plain.alpha, plain.mean, plain.scale) == (1 / 255, None, None)
    equal = cpu.Pixels(built(images, pixel_mean=0.4, pixel_std=0.5), torch.float32)
    assert equal.alpha == pytest.approx(1 / 127.5)
    assert equal.scale is None and equal.mean is not None
    assert equal.mean.flatten().tolist() == pytest.approx([102.0] * 3)
    each = cpu.Pixels(built(images, pixel_mean=MEAN, pixel_std=STD), torch.float32)
    assert each.alpha == 1.0 and each.scale is not None
    assert each.scale.flatten().tolist() == pytest.approx([1 / (255 * std) for std in STD])
    floats = cpu.Pixels(built(images.float()), torch.float32)
    assert (floats.alpha, floats.mean, floats.scale) == (1.0, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_images_of_mixed_size(monkeypatch, dtype, chunk):
    """A list, with tokens and positions that run over all of it."""
    monkeypatch.setattr(cpu, "CHUNK", chunk)

    def images(x):
        return [x[0, :, :16, :24], x[1, :, :9, :33], x[1, :, 3:11, 1:9]]

    mask = torch.rand(6 + 4 + 1, generator=torch.Generator().manual_seed(4)) < 0.4
    options = weights(20, 3, 8, 8) | {
        "prefix_tokens": normal(2, 20, seed=5),
        "pos_embed": normal(11 + 6, 20, seed=6),
        "token_mask": mask,
        "mask_token": normal(20, seed=7),
    }
    case = Case(normal(2, 3, 16, 33), options).to(dtype)
    got = varlen(case, images, backend="cpu")
    exact = varlen(case.to(torch.float64), images, backend="reference")
    assert got.keys() == exact.keys()
    eps = torch.finfo(dtype).eps
    for name, x in got.items():
        torch.testing.assert_close(x.double(), exact[name], rtol=2 * eps, atol=40 * eps, msg=name)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("image", [False, True])
def test_no_samples(batch, image):
    """Zero samples, and one as the same path's check."""
    options = CASES["vit"]().options | {"pixel_mean": MEAN, "pixel_std": STD}
    pixels = (image_bytes if image else normal)(batch, 3, 35, 26)
    case = Case(pixels, options).to(torch.float32)
    got = run(case)
    exact = case.results(mm.patch_embed, backend="reference")
    for name, x in got.items():
        torch.testing.assert_close(x, exact[name], rtol=1e-4, atol=1e-4, msg=name)
    assert got["out"].shape == (batch, 13, 24)
    assert batch or not got["dweight"].any()


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_at_a_time(wanted):
    case = CASES["masked"]().to(torch.float32)
    call = build("patch_embed", [case.pixels], **case.options)
    dout = normal(row_count(call), 20).float()
    asked = [index == wanted for index in range(6)]
    exact = reference.backward(dout, *call, [True] * 6)
    dpixels, *others = cpu.backward(dout, *call, asked)
    assert len(dpixels) == asked[0]
    if wanted == 0:
        torch.testing.assert_close(dpixels[0], exact[0][0], rtol=1e-4, atol=1e-5)
    for index, grad in enumerate(others, 1):
        if asked[index]:
            torch.testing.assert_close(grad, exact[index], rtol=1e-4, atol=1e-5)
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("name", ["vit", "masked", "masked_alike", "per_sample", "gathered"])
def test_expanded_dout(name):
    """The gradient of a sum has strides of 0."""
    case = CASES[name]().to(torch.float32)
    call = build("patch_embed", [case.pixels], **case.options)
    dout = torch.ones(()).expand(row_count(call), len(call.weight))
    leaves = (call.weight, call.bias, call.pos_embed, call.prefix, call.mask_token)
    wanted = [True, *(x is not None for x in leaves)]
    got, exact = (f.backward(dout, *call, wanted) for f in (cpu, reference))
    for a, b in zip([*got[0], *got[1:]], [*exact[0], *exact[1:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_finite_stays_out_of_prefix_and_masked_tokens():
    case = CASES["masked"]().to(torch.float32)
    case.options["weight"][0] = torch.inf
    out = mm.patch_embed(case.pixels, **case.options, backend="cpu")
    expected = mm.patch_embed(case.pixels, **case.options, backend="reference")
    assert out[:, :2].isfinite().all()
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert out.isfinite()[:, 2:].all(-1).any(), "no token was masked"


def test_gradients_of_prefix_and_masked_tokens_stay_out_of_the_weights():
    case = CASES["masked"]().to(torch.float32)
    call = build("patch_embed", [case.pixels], **case.options)
    dout = normal(row_count(call), 20).float().view(3, 8, 20)
    dout[:, :2] = torch.inf
    dout[:, 2:][case.options["token_mask"]] = torch.nan
    dpixels, dweight, dbias, *_ = cpu.backward(dout.flatten(0, 1), *call, [True] * 6)
    assert all(x.isfinite().all() for x in (*dpixels, dweight, dbias))


def test_pixels_of_masked_tokens_stay_out_of_the_weights():
    case = CASES["masked"]().to(torch.float32)
    case.options["token_mask"][:, 0] = True
    case.pixels[:, :, :8, :8] = torch.nan
    assert all(x.isfinite().all() for x in run(case).values())


def test_sums_of_16_bit_gradients_are_taken_in_float32():
    """2049 has no place in float16, and 257 none in bfloat16: sums in them would stand still."""
    call = build(
        "patch_embed", [torch.zeros(4096, 1, 2, 2)], torch.zeros(3, 1, 2, 2), torch.zeros(3)
    )
    dout = torch.ones(4096, 3, dtype=torch.bfloat16)
    wanted = [False, False, True, False, False, False]
    _, _, dbias, *_ = cpu.backward(dout, *call, wanted)
    assert dbias.tolist() == [4096.0] * 3


@pytest.mark.parametrize("native", [False, True])
def test_patches_that_are_cut_out_take_the_same_product(monkeypatch, native):
    monkeypatch.setattr(cpu, "NATIVE_BFLOAT16", native)
    used = []
    linear = flattened.F.linear
    monkeypatch.setattr(
        flattened.F, "linear", lambda x, *rest: used.append(x.dtype) or linear(x, *rest)
    )
    case = Case(normal(2, 5, 48), weights(24, 3, 4, 4))
    cast = case.to(torch.bfloat16)
    out = mm.patch_embed(cast.pixels, **cast.options)
    assert used == [torch.bfloat16 if native else torch.float32]
    whole = functools.partial(mm.patch_embed, backend="reference")
    exact = cast.to(torch.float64)
    expected = whole(exact.pixels.reshape(10, 3, 4, 4), **exact.options).view(out.shape)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_it_declines_what_is_not_on_the_cpu():
    weight = torch.empty(8, 3, 4, 4, device="meta")
    call = build("patch_embed", [torch.empty(1, 3, 8, 8, device="meta")], weight)
    reason = "pixels are on meta; this backend serves CPU tensors"
    assert cpu.forward_why_not(*call) == reason
    assert cpu.backward_why_not(None, *call, [True] * 6) == reason
    assert cpu.forward_why_not(*built(image_bytes(1, 3, 8, 8))) is None
