"""The suite of whole models: do its cases run, does the gate see errors, are its numbers right?"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from mmkernels.attention import masks
from mmkernels.bench import clock, measure, model_peers, model_zoo, suite_models
from mmkernels.bench.case import Unavailable

CPU = torch.device("cpu")
NAMES = ["SigLIP", "PaliGemma", "Llama", "Llama", "ViT", "ViT"]
# Nothing here is about time.
ONCE = clock.Turns(2, 2, 0.0)


class OneSample:
    """A clock that calls once."""

    def ready(self, call, wall):
        assert wall, "launches are part of what a model takes"
        return clock.Timed(lambda: (call(), 1.0)[1], 1.0, "host", None)

    def synchronize(self):
        pass


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("transformers", minversion="5")


@pytest.fixture(scope="module")
def problems(library):
    """The toy problems by their mode, the prefix-LM by its mask."""
    cases = suite_models.cases(CPU, quick=True)[1:]
    if importlib.util.find_spec("timm") is None:
        cases = [case for case in cases if "timm" not in case.name]
    return {case.mask if case.mask == "prefix-LM" else case.mode: case.make() for case in cases}


@pytest.mark.filterwarnings("ignore:Memory block of unknown size")
def test_every_case_runs_and_times_ours_beside_both_of_the_librarys(library):
    for case in suite_models.cases(CPU, quick=True):
        record = measure.measure(case, OneSample(), CPU, ONCE)
        assert record["failed"] is None, case
        assert list(record["results"]) == ["mmkernels", "SDPA", "eager"], case
        assert record["left_out"]["Liger"] == "runs on GPUs only"
        assert "torch.compile" in record["left_out"]
        assert record["flops"] > 0
        assert record["bytes"] > 0


def test_a_case_without_its_library_has_no_result_and_says_why(monkeypatch):
    model_zoo.llama.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("timm", "transformers") else found(name),
    )
    for case in suite_models.cases(CPU, quick=True):
        record = measure.measure(case, OneSample(), CPU, ONCE)
        assert record["left_out"] == {"mmkernels": "transformers is not installed"}, case
        assert (record["failed"], record["results"]) == (None, {})


def test_an_old_library_is_refused_by_its_version(library, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(Unavailable, match=r"transformers 5 or newer; 4\.57\.1"):
        model_zoo.siglip(model_zoo.TOY_VISION, torch.float32, CPU)


def test_the_same_vit_comes_from_transformers_without_timm(library, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "timm" else found(name)
    )
    for case in suite_models.cases(CPU, quick=True)[-2:]:
        assert case.name == "ViT, toy (transformers)"
        problem = case.make()
        assert problem.check(problem.implementations["mmkernels"]()()) < 1e-4


def test_lists_by_device():
    cuda = torch.device("cuda")
    full, quick = (suite_models.cases(cuda, quick) for quick in (False, True))
    assert {case.dtype for case in full} == {torch.bfloat16}
    assert [str(case) for case in full[: len(quick)]] == [str(case) for case in quick]
    assert full[0].name == "SigLIP-so400m/14 384"
    assert full[0].shape == "B16 H16 S729 D72 L27"
    assert {case.mode for case in full} == {"forward", "forward + backward", "prefill", "decode"}
    on_cpu = suite_models.cases(CPU, quick=False)
    assert {case.dtype for case in on_cpu} == {torch.float32}
    assert "PaliGemma-3B, one layer" in {case.name for case in on_cpu}
    named = [case.name for case in suite_models.cases(CPU, quick=True)]
    assert [name.split(",")[0] for name in named] == NAMES


def test_the_gate_sees_an_error_in_every_result(problems):
    for mode, problem in problems.items():
        results = problem.implementations["mmkernels"]()()
        assert problem.check(results) < 1e-4
        for place, result in enumerate(results):
            wrong = result.clone()
            wrong.view(-1)[-1] += 0.01 * wrong.abs().max()
            with pytest.raises(AssertionError, match=f"result {place}: max error"):
                problem.check((*results[:place], wrong, *results[place + 1 :]))
            assert result.abs().max() > 0, mode


def test_the_gate_sees_a_wrong_mask(problems):
    problem = problems["prefix-LM"]
    problem.check(problem.call(problem.model)())
    causal = {**problem.inputs, "token_type_ids": torch.ones(2, 24, dtype=torch.long)}
    with torch.no_grad(), pytest.raises(AssertionError, match="result 0: max error"):
        problem.check(problem.forward(problem.model, **causal))


def test_gradients_of_the_first_the_middle_and_the_last_weight(problems):
    if "forward + backward" not in problems:
        pytest.skip("timm is not installed")
    problem = problems["forward + backward"]
    logits, *gradients = problem.implementations["SDPA"]()()
    assert logits.shape == (2, 1000)
    shapes = [tuple(gradient.shape) for gradient in gradients]
    # Patches, one of nine others in two blocks, the head.
    assert shapes[0] == (64, 3, 8, 8)
    assert shapes[1] in [(192, 64), (64, 64), (256, 64), (64, 256)]
    assert shapes[2] == (1000, 64)
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_decoding_changes_nothing_and_agrees_with_the_whole_sequence(problems):
    problem = problems["decode"]
    call = problem.implementations["mmkernels"]()
    (first,), (again,) = call(), call()
    assert torch.equal(first, again)
    whole = problem.model(problem.inputs["input_ids"]).logits[:, -1:]
    torch.testing.assert_close(first, whole)


def test_copies_share_weights_and_nothing_else(problems):
    model = problems["prefix-LM"].model
    ours, eager = model_peers.replaced(model), model_peers.eager(model)
    for copied in (ours, eager):
        pairs = zip(copied.parameters(), model.parameters(), strict=True)
        assert all(x is y for x, y in pairs)
    settings = [x.language_model.config._attn_implementation for x in (ours, eager, model)]
    assert settings == ["mmkernels", "eager", "sdpa"]


def test_a_model_of_which_something_is_left_is_no_result(library):
    config = library.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        image_size=16, patch_size=8, vision_use_head=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="1 left"):
        model_peers.replaced(library.SiglipVisionModel(config))


def test_flops_and_bytes_are_those_of_the_formulas(problems):
    # Two layers. q, k, v and out have 4, 2, 2 and 4 heads of 16, the MLP has three products.
    token = 2 * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    pair, head = 2 * 4 * 64, 2 * 64 * 256
    assert problems["prefill"].flops == 2 * (24 * token + sum(range(1, 25)) * pair + head)
    assert problems["decode"].flops == 2 * (token + 25 * pair + head)
    mask = masks.prefix_lm(20, 24)
    visible = int(mask.to_dense().sum())
    assert visible == 20 * 20 + 21 + 22 + 23 + 24
    assert problems["prefix-LM"].flops == 2 * (24 * token + visible * pair)

    decode = problems["decode"]
    weights = 4 * sum(x.numel() for x in decode.model.parameters())
    cache = 4 * 2 * 2 * 24 * 2 * 2 * 16
    assert decode.bytes == weights + cache + 2 * 25 * 8 + 4 * 2 * 256
    if "forward" in problems:
        inference, training = problems["forward"], problems["forward + backward"]
        assert 2.5 * inference.flops < training.flops < 3.5 * inference.flops
        assert training.bytes > 2 * weights


def test_a_backend_that_declines_is_left_out_with_its_reason(problems):
    with pytest.raises(Unavailable, match="attention_forward: q is on cpu"):
        problems["prefill"]._on_backend("cuda")
    call = problems["prefill"]._on_backend("reference")
    assert problems["prefill"].check(call()) < 1e-4


class OnGpu(torch.nn.Module):
    """Of a model, what says where it is."""

    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)

    def parameters(self, recurse=True):
        yield from [type("P", (), {"is_cuda": True, "dtype": self.dtype})]


@pytest.mark.parametrize(
    ("dtype", "attributes", "reason"),
    [
        (torch.float32, {}, "takes float16 and bfloat16 only"),
        (torch.bfloat16, {}, "the model is of another library"),
        (torch.bfloat16, {"set_attn_implementation": None}, "flash_attn is not installed"),
    ],
)
def test_why_flash_attention_2_takes_no_part(dtype, attributes, reason, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=reason):
        model_peers.flash_attention_2(OnGpu(dtype=dtype, **attributes))
    with pytest.raises(Unavailable, match="runs on GPUs only"):
        model_peers.flash_attention_2(torch.nn.Linear(1, 1))


def test_liger_reaches_its_own_copy_only(problems, monkeypatch):
    from transformers.models.llama import modeling_llama

    seen, rotary = [], modeling_llama.apply_rotary_pos_emb

    def apply(model, rope=True, fused_linear_cross_entropy=True):
        assert not fused_linear_cross_entropy

        def rotated(*args, **kwargs):
            seen.append(model)
            return rotary(*args, **kwargs)

        modeling_llama.apply_rotary_pos_emb = rotated
        modeling_llama.LlamaMLP = None
        model.lm_head.changed = True

    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "liger_kernel" or found(name)
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    monkeypatch.setattr(model_peers, "on_gpu", lambda model: True)

    problem, mlp = problems["decode"], modeling_llama.LlamaMLP
    model_peers.liger(problem.model)
    assert modeling_llama.LlamaMLP is mlp
    assert modeling_llama.apply_rotary_pos_emb is rotary
    call = problem.implementations["Liger"]()
    assert not hasattr(problem.model.lm_head, "changed")
    problem.implementations["SDPA"]()()
    layers = problem.model.config.num_hidden_layers
    assert len(seen) == layers, "of its prefill"
    problem.check(call())
    assert len(seen) == 2 * layers
    assert all(model is not problem.model for model in seen)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    with pytest.raises(Unavailable, match="has nothing for a ViT"):
        model_peers.liger(type("ViT", (torch.nn.Linear,), {})(1, 1))


@pytest.mark.slow
def test_compiled_models_are_right_too(library):
    for make in (
        lambda: suite_models._prefix_lm(model_zoo.TOY_LANGUAGE, 2, 16, 8, CPU, compiles=True),
        lambda: suite_models._vit(model_zoo.TOY_VISION, 2, "forward + backward", CPU, True),
    ):
        problem = make().make()
        ours = problem.implementations["mmkernels, torch.compile"]()
        theirs = problem.implementations["torch.compile"]()
        for call in (ours, theirs, ours):
            problem.check(call())
