"""Does the suite of modules compare the same parameters, and see a wrong result?"""

import importlib.util

import pytest
import torch

from mmkernels import modules
from mmkernels.bench import measure, module_settings, suite_modules
from mmkernels.bench.case import OURS, Unavailable
from mmkernels.bench.clock import HostClock, Turns
from mmkernels.bench.module_problem import ModuleProblem
from mmkernels.bench.module_settings import CAUSAL, PADDING, Attention

CPU = torch.device("cpu")
TOY = suite_modules.cases(CPU, quick=True)
INSTALLED = {"timm", "transformers"}


def problem(of, dtype=torch.float32, backward=True, compiled=False):
    return ModuleProblem(of.quick().setting(CPU), dtype, CPU, backward=backward, compiles=compiled)


def model(name):
    return next(one.of for one in suite_modules.MODELS if name in (one.name, one.of.module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("one", suite_modules.MODELS, ids=lambda one: f"{one.of.module} {one.name}")
def test_all_implementations_obey_the_error_rule(one, backward, dtype):
    this = problem(one.of, dtype, backward)
    there = []
    for name, prepare in this.implementations.items():
        try:
            results = prepare()()
        except Unavailable as error:
            assert str(error) == f"{name} is not installed" or name == "torch.compile"
            continue
        there.append(name)
        assert this.check(results) < (1e-4 if dtype == torch.float32 else 1.0)
        assert len(results) == 1 or backward
    assert there[:2] == [OURS, this.setting.name]
    assert set(this.implementations) <= {*there, *INSTALLED, "torch.compile"}


@pytest.mark.parametrize("mask", ["", CAUSAL, PADDING])
def test_a_wrong_result_of_attention_is_seen(mask):
    this = problem(Attention(0, 0, 0, mask))
    names = ["out", "dx", *(f"d{name}" for name, _ in this.original.named_parameters())]
    assert "din_proj_weight" in names
    assert_each_is_seen(this, names)


def test_a_wrong_result_of_an_embedding_is_seen():
    this = problem(model("CLIP-L/14 336"))
    assert_each_is_seen(this, ["out", "dcls_token", "dpos_embed", "dpatch_embed.proj.weight"])


def assert_each_is_seen(this, names):
    results = this.implementations[OURS]()()
    assert len(results) == len(names)
    for index, name in enumerate(names):
        for change in (lambda x: x * 1.001, lambda x: x + 1e-3 * x.abs().amax()):
            wrong = [change(x) if i == index else x for i, x in enumerate(results)]
            with pytest.raises(AssertionError, match=f"^{name}: m"):
                this.check(tuple(wrong))


def test_a_mask_is_not_lost():
    full, causal, padded = (problem(Attention(0, 0, 0, mask)) for mask in ("", CAUSAL, PADDING))
    (out, *_) = full.implementations[OURS]()()
    for masked in (causal, padded):
        assert torch.equal(masked.x, full.x)
        with pytest.raises(AssertionError, match="out: max"):
            masked.check((out, *masked.implementations[OURS]()()[1:]))


def test_positions_and_class_token_are_not_lost():
    this = problem(model("CLIP-L/14 336"), torch.bfloat16, backward=False)
    for name in ("pos_embed", "cls_token"):
        module = this.setting.ours("auto").to(torch.bfloat16)
        module.load_state_dict(this.original.state_dict())
        torch.nn.init.zeros_(module.get_parameter(name))
        with torch.no_grad(), pytest.raises(AssertionError, match="out: max"):
            this.check((module(this.x),))


def test_flops():
    full = Attention(10, 8, 2, batch=3)
    products, scores = 8 * 30 * 8 * 8, 4 * 3 * 10 * 10 * 8
    assert full.flops() == (products + scores, 3 * products + 3.5 * scores)
    causal = Attention(10, 8, 2, CAUSAL, batch=3)
    assert causal.flops()[0] == products + 4 * 3 * 55 * 8
    padded = Attention(12, 8, 2, PADDING, batch=3)
    assert padded.lengths().tolist() == [3, 7, 12]
    assert padded.flops()[0] == 8 * 36 * 8 * 8 + 4 * 12 * (3 + 7 + 12) * 8
    patches = problem(model("PatchEmbed"))
    assert patches.flops == 2 * 2 * (2 * 4) * (3 * 16 * 16) * 32


def test_bytes():
    of = Attention(0, 0, 0)
    forward, both = (problem(of, backward=backward) for backward in (False, True))
    x, parameters = 4 * 2 * 9 * 32, 4 * (4 * 32 * 32 + 4 * 32)
    assert forward.bytes == 2 * x + parameters
    assert both.bytes == 2 * forward.bytes
    images = problem(model("PatchEmbed"))
    pixels, out = 4 * 2 * 3 * 32 * 32, 4 * 2 * 4 * 32
    assert images.bytes == pixels + 2 * (4 * (32 * 3 * 16 * 16 + 32) + out)


def test_the_oracle_is_the_original_in_float64():
    this = problem(Attention(0, 0, 0), torch.bfloat16)
    exact, eager = this.expected
    assert {x.dtype for x in exact} == {torch.float64}
    assert {x.dtype for x in eager} == {torch.bfloat16}
    assert next(this.original.parameters()).dtype == torch.bfloat16


def test_modes_of_the_modules():
    for backward in (False, True):
        this = problem(Attention(0, 0, 0), backward=backward)
        assert this.original.training == backward
        assert (this.dout is not None) == backward


@pytest.mark.parametrize("name", [*module_settings.EMBEDDINGS, "MultiheadAttention"])
def test_a_backend_that_declines_is_left_out_with_its_reason(name):
    this = problem(model(name))
    assert type(this.setting.ours("cuda")) is getattr(modules, name)
    with pytest.raises(Unavailable, match="on cpu; the CUDA kernels run on NVIDIA GPUs"):
        this._ours("cuda")()


def test_a_library_that_is_not_there_or_broken_is_left_out_alone(monkeypatch):
    of = model("CLIP-L/14 336").quick()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    this = problem(of)
    with pytest.raises(Unavailable, match=r"^transformers is not installed$"):
        this.implementations["transformers"]()

    def broken(shape):
        raise ImportError("broken")

    monkeypatch.setitem(of.peers, "transformers", broken)
    record = measure.measure(
        suite_modules._case(suite_modules.Model("CLIP", of, 1, 2), torch.float32, "forward", CPU,
                            False, toy=True),
        HostClock(), CPU, Turns(2, 2, 0.0),
    )  # fmt: skip
    assert record["failed"] is None
    assert record["left_out"]["transformers"] == "ImportError: broken"
    assert {OURS, "nn.Conv2d"} == set(record["results"])


def test_the_original_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    this = problem(Attention(0, 0, 0, CAUSAL), compiled=True)
    assert this.check(this.implementations["torch.compile"]()()) < 1e-4


def test_what_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(
        suite_modules, "ModuleProblem", lambda *_, compiles, **options: asked.append(compiles)
    )
    telling = 2 * suite_modules.TELLING
    full = suite_modules.cases(CPU, quick=False)
    for case in (*TOY, full[0], full[telling]):
        case.make()
    assert asked == [False] * len(TOY) + [True, False]


def test_parameters_are_such_that_all_of_them_matter():
    this = problem(model("CLIP-L/14 336"))
    sizes = {name: float(x.detach().std()) for name, x in this.original.named_parameters()}
    weight = (3 * 14 * 14) ** -0.5
    wanted = {"cls_token": 1, "pos_embed": 1, "patch_embed.proj.weight": weight}
    assert sizes == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_list(device):
    full, quick = (suite_modules.cases(torch.device(device), short) for short in (False, True))
    names = [str(case) for case in full]
    assert len(set(names)) == len(names)
    assert {case.name.partition(",")[0] for case in full} == set(modules.__all__) - {
        "PatchEmbedWithSize"
    }
    assert {case.dtype for case in full} == {torch.float32, torch.bfloat16}
    assert {case.mode for case in quick} == {"forward", "forward + backward"}
    dtype, batch = ("bfloat16", 256) if device == "cuda" else ("float32", 4)
    assert names[0] == (
        f"modules, MultiheadAttention, ViT-B/16 224, B{batch} S197 E768 H12, {dtype}, forward"
    )
    assert {case.mask for case in full} == {"", CAUSAL, PADDING}
    if device == "cuda":
        assert [str(case) for case in quick] == names[: 2 * suite_modules.TELLING], "of real sizes"
    else:
        assert {case.name for case in quick} == {case.name for case in full}
        assert all(" E32 " in case.shape or " D32" in case.shape for case in quick)
