"""Does the suite of patch embeddings compare what it says, and see a wrong result?"""

import importlib.util

import pytest
import torch

from mmkernels import testing
from mmkernels.bench import measure, suite_patches
from mmkernels.bench.case import OURS, Unavailable
from mmkernels.bench.clock import HostClock, Turns
from mmkernels.bench.patch_problem import PatchProblem, Shape
from mmkernels.bench.suite_patches import MODELS, Choice

CPU = torch.device("cpu")
TOY = suite_patches.cases(CPU, quick=True)
SMALL = Shape(3, (8, 12), (4, 4), 16, batch=2, prefix=1)
OUTPUTS = ["out", "dweight", "dbias", "dpos_embed", "dprefix_tokens"]


def problem(shape=SMALL, dtype=torch.float32, image_bytes=False, backward=True, compiled=False):
    return PatchProblem(
        shape, dtype, CPU, image_bytes=image_bytes, backward=backward, compiles=compiled
    )


def every(one):
    """Name -> results of each implementation that is there, and name -> why the others are not."""
    results, left_out = {}, {}
    for name, prepare in one.implementations.items():
        try:
            results[name] = prepare()()
        except Unavailable as error:
            left_out[name] = str(error)
    return results, left_out


@pytest.mark.parametrize("case", TOY, ids=str)
def test_all_implementations_obey_the_error_rule(case):
    one = case.make()
    results, left_out = every(one)
    assert next(iter(results)) == OURS
    assert {OURS, "unfold + linear"} < set(results) and any("F.conv" in name for name in results)
    for result in results.values():
        assert one.check(result) < (1e-4 if case.dtype == torch.float32 else 0.1)
    assert "torch.compile" in left_out, "a smoke test compiles nothing"


@pytest.mark.parametrize("image_bytes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_result_is_seen(dtype, image_bytes):
    one = problem(dtype=dtype, image_bytes=image_bytes)
    results = one.implementations[OURS]()()
    assert len(results) == len(OUTPUTS)
    for index, name in enumerate(OUTPUTS):
        wrong = list(results)
        wrong[index] = results[index].clone()
        wrong[index].view(-1)[0] += 0.1 * results[index].abs().amax()
        with pytest.raises(AssertionError, match=f"^{name}: max"):
            one.check(tuple(wrong))
        wrong[index] = results[index] * 1.05
        with pytest.raises(AssertionError, match=f"^{name}: m"):
            one.check(tuple(wrong))
    with pytest.raises(ValueError, match="zip"):
        one.check(results[:-1])


def test_tokens_of_another_image_are_seen():
    one = problem(SMALL._replace(prefix=0, mixed=((8, 12), (4, 8), (12, 8))), backward=False)
    (out,) = one.implementations[OURS]()()
    assert one.check((out,)) < 1e-5
    with pytest.raises(AssertionError, match="out: max"):
        one.check((out.roll(1, 0),))


@pytest.mark.parametrize(
    ("shape", "pixels", "text"),
    [
        (MODELS["ViT-B/16 224"].shape._replace(batch=8), "uint8", "B8 3×224×224 uint8 P16 D768"),
        (MODELS["AST 128×1024"].shape, "", "B1 1×128×1024 P16/10 D768"),
        (MODELS["VideoMAE-B 16×224"].shape, "", "B1 3×16×224×224 P2×16×16 D768"),
        (MODELS["Qwen2-VL"].shape._replace(batch=9), "", "9 patches 3×2×14×14 P2×14×14 D1280"),
        (
            MODELS["ViT-B/16, images of mixed size"].shape,
            "uint8",
            "7 images of 96 to 432 patches uint8 P16 D768",
        ),
    ],
)
def test_shapes_are_named(shape, pixels, text):
    assert shape.text(pixels) == text


def test_flops_and_bytes():
    forward, both = (problem(image_bytes=True, backward=backward) for backward in (False, True))
    patches, values, rows = 2 * 2 * 3, 3 * 4 * 4, 2 * 7
    assert forward.flops == 2 * patches * values * 16 == both.flops / 2
    pixels, out = 2 * 3 * 8 * 12, 4 * rows * 16
    parameters = 4 * (16 * values + 16 + 7 * 16 + 16)
    assert forward.bytes == pixels + parameters + out
    assert both.bytes == pixels + 2 * (parameters + out)
    mixed = problem(SMALL._replace(prefix=0, mixed=((8, 12), (4, 8))), backward=False)
    assert mixed.flops == 2 * (6 + 2) * values * 16
    overlapping = SMALL._replace(stride=(2, 2))
    assert problem(overlapping, backward=False).flops == 2 * (2 * 3 * 5) * values * 16


def test_a_backend_that_declines_is_left_out_with_its_reason():
    one = problem()
    with pytest.raises(Unavailable, match=r"^weight is on cpu; the CUDA kernels run on NVIDIA"):
        one._ours("cuda")()
    cut_out = problem(SMALL._replace(size=(4, 4), flattened=True, prefix=0, positions=False))
    with pytest.raises(Unavailable, match="cut out go to torch's own matrix product"):
        cut_out._ours("triton")


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"stride": (2, 2)}, {"timm"}),
        ({"channels": 1}, {"F.conv2d, channels_last"}),
        ({"kernel": (4, 6)}, {"timm"}),
        ({"mixed": ((8, 8), (4, 4)), "prefix": 0}, {"timm", "F.conv2d, channels_last"}),
        ({}, set()),
    ],
    ids=["overlapping", "one channel", "not square", "mixed", "all"],
)
def test_peers_take_what_they_can(change, left_out):
    pytest.importorskip("timm")
    results, why = every(problem(SMALL._replace(**change)))
    assert set(why) == left_out | {"torch.compile"}
    assert {"timm", "F.conv2d, channels_last"} - left_out < set(results)


def test_timm_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert every(problem())[1]["timm"] == "timm is not installed"


def test_the_eager_form_is_compiled(monkeypatch):
    done = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: done.append(options) or function
    )
    one = problem(compiled=True)
    assert one.check(one.implementations["torch.compile"]()()) < 1e-4
    assert done == [{"dynamic": False}]


@pytest.mark.parametrize("kernel", [(4, 4), (2, 4, 4)], ids=str)
def test_channels_last_are(kernel, monkeypatch):
    size = (4, 8, 12)[-len(kernel) :]
    one = problem(SMALL._replace(size=size, kernel=kernel), backward=False)
    seen, eager = [], testing.eager_patch_embed

    def embedding(pixels, weight, **options):
        seen.extend(x.stride(1) for x in (pixels, weight))
        return eager(pixels, weight, **options)

    monkeypatch.setattr(testing, "eager_patch_embed", embedding)
    one.implementations[f"F.conv{len(kernel)}d, channels_last"]()()
    assert seen == [1, 1]


def test_the_oracle_is_in_float64_and_eager_is_not():
    exact, eager = problem(dtype=torch.bfloat16).expected
    assert {x.dtype for x in exact} == {torch.float64}
    assert {x.dtype for x in eager} == {torch.bfloat16}


def test_peers_copy_no_numbers_to_the_device_in_a_call():
    one = problem(image_bytes=True)
    assert isinstance(one.peer_settings["pixel_mean"], torch.Tensor)
    assert one.settings["pixel_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_list(device):
    full, quick = (suite_patches.cases(torch.device(device), short) for short in (False, True))
    names = [str(case) for case in full]
    assert len(set(names)) == len(names)
    assert {case.name for case in full} == set(MODELS)
    assert [case.name for case in full[: len(quick)]] == [case.name for case in quick]
    assert {case.mode for case in quick} == {"forward", "forward + backward"}
    batch = "B256" if device == "cuda" else "B4"
    assert names[0] == (
        f"patches, ViT-B/16 224, {batch} 3×224×224 uint8 P16 D768, bfloat16, forward"
    )
    video = {case.dtype for case in full if case.name.startswith("VideoMAE")}
    if device == "cuda":
        assert [str(case) for case in quick] == names[: len(quick)], "of real sizes"
        assert video == {torch.bfloat16, torch.float32}
    else:
        assert video == {torch.float32}, "in bfloat16 it takes seconds on some CPUs"
        assert all(case.shape.endswith(" D32") for case in quick), "of a toy's sizes"


def test_what_is_compiled():
    def compiled(device: str, quick: bool) -> int:
        cases = suite_patches.cases(torch.device(device), quick)
        return sum(case.make.keywords["compiles"] for case in cases)

    everything = len(suite_patches.cases(torch.device("cuda"), False))
    assert compiled("cuda", False) == everything
    assert compiled("cuda", True) == compiled("cpu", False) == len(suite_patches.COMPILED)
    assert compiled("cpu", True) == 0


def test_a_choice_has_its_pixels_and_gradients():
    case = suite_patches._case(Choice("ViT-B/16 224", torch.bfloat16, True), CPU, quick=True)
    one = case.make()
    assert (one.pixels.dtype, one.dout) == (torch.uint8, None)
    assert one.parameters["weight"].dtype == case.dtype == torch.bfloat16
    both = Choice("ViT-B/16 224", torch.float32, False, "forward + backward")
    assert suite_patches._case(both, CPU, quick=True).make().dout is not None


def test_a_case_is_measured():
    record = measure.measure(TOY[1], HostClock(), CPU, Turns(2, 2, 0.0))
    assert record["failed"] is None and record["flops"] and record["bytes"]
    assert {OURS, "F.conv2d", "unfold + linear"} <= set(record["results"])
