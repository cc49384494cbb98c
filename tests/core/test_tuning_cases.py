"""Does tuning hold every kernel to the error rule?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels._core import registry, tuning, tuning_choice, tuning_patch_cases
from mmkernels._core.triton_runtime import KNOWN_GPUS
from mmkernels._core.tuning import Config, Problem
from mmkernels._core.tuning_cases import Sizes, make_case
from mmkernels.patch_embed import triton_config

ROOT = Path(tuning.__file__).parents[2]
GPU = KNOWN_GPUS["sm_90"]
TINY = {"timed": Sizes(1, 8, 8, 2, 1), "checked": Sizes(2, 21, 37, 4, 2)}
GROUPS = 4  # query heads of a key head
RIGHT, WRONG = Config(16, 64, 4, 1), Config(256, 256, 8, 1)


@pytest.fixture
def triton_is_the_reference(monkeypatch):
    """The reference as the triton backend, wrong with one configuration."""
    kernels = {
        "attention_forward": ["forward"],
        "attention_backward": ["backward_keys", "backward_queries", "backward_bias"],
        "attention_decode": ["decode"],
    }
    for op, names in kernels.items():
        reference = next(b for b in registry.backends(op) if b.name == "reference")

        def run(*inputs, reference=reference, names=names):
            results = list(reference.fn(*inputs))
            q = next(x for x in inputs if x is not None)
            for name, results_of in zip(names, RESULTS[len(names)], strict=True):
                problem = Problem(name, q.shape[-1], q.shape[-1], q.dtype, True)
                if tuning.configuration(problem, GPU) == WRONG:
                    results[results_of] = results[results_of] * 1.1
            return tuple(results)

        others = [b for b in registry.backends(op) if b.name != "triton"]
        fake = registry.Backend("triton", run, lambda *_: None, lambda *_: "by name")
        monkeypatch.setitem(registry._table, op, (fake, *others))


# Which result each kernel of an op spoils: out; dk, dq and dbias.
RESULTS = {1: [0], 3: [1, 0, 3]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_kernel_is_held_to_the_error_rule(kernel, dtype, masked, triton_is_the_reference):
    problem = Problem(kernel, 16, 16, dtype, masked)
    case = make_case(problem, "cpu", **TINY)
    with tuning.override(kernel, RIGHT) as asked:
        case.verify()
        case.run()
    assert asked.used
    with tuning.override(kernel, WRONG), pytest.raises(AssertionError):
        case.verify()


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda queries, page_size: queries == 1 and page_size in range(1, 32),
        lambda queries, page_size: queries == 1 and page_size >= 128,
        lambda queries, page_size: queries * GROUPS > 32 and not page_size,
        lambda queries, page_size: queries * GROUPS > 32 and page_size,
    ],
    ids=["small pages", "large pages", "many rows", "many rows on pages"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_is_also_verified_as_it_serves_pages_and_many_rows(
    dtype, spoiled, triton_is_the_reference, monkeypatch
):
    fake, *others = registry.backends("attention_decode")

    def run(q, k_cache, v_cache, lengths, table, *rest):
        out, lse = fake.fn(q, k_cache, v_cache, lengths, table, *rest)
        wrong = spoiled(q.shape[1], 0 if table is None else k_cache.shape[1])
        calls.append((q.shape[1], table is not None))
        return out * 1.1 if wrong and broken else out, lse

    broken, calls = False, []
    spoiling = registry.Backend("triton", run, fake.why_not, fake.only_by_name)
    monkeypatch.setitem(registry._table, "attention_decode", (spoiling, *others))
    case = make_case(Problem("decode", 16, 16, dtype, True), "cpu", timed=TINY["timed"])
    case.verify()
    broken = True
    with pytest.raises(AssertionError):
        case.verify()
    calls.clear()
    case.run()
    assert calls == [(TINY["timed"].seqlen_q, False)]  # what is timed is the plain call alone


@pytest.fixture
def triton_patches_are_the_reference(monkeypatch):
    """As above, for the patch embedding; `spoil` says of a call whether it is wrong, too."""
    spoil = []
    for op in ("patch_embed_forward", "patch_embed_backward"):
        reference = next(b for b in registry.backends(op) if b.name == "reference")
        kernel = "patch_forward" if op.endswith("forward") else "patch_weight"

        def run(*inputs, reference=reference, kernel=kernel):
            made = reference.fn(*inputs)
            wrong = tuning_choice.overridden(kernel) == WRONG
            wrong |= any(is_spoiled(*inputs[kernel == "patch_weight" :]) for is_spoiled in spoil)
            scale = 1.1 if wrong else 1.0
            return made * scale if kernel == "patch_forward" else (made[0], made[1] * scale)

        others = [b for b in registry.backends(op) if b.name != "triton"]
        fake = registry.Backend("triton", run, lambda *_: None, lambda *_: "by name")
        monkeypatch.setitem(registry._table, op, (fake, *others))
    return spoil


@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", tuning_patch_cases.PATCH_STEPS.values())
@pytest.mark.parametrize("kernel", tuning_choice.PATCH_KERNELS)
def test_the_patch_kernels_are_held_to_the_error_rule(
    kernel, step, dtype, pixels, triton_patches_are_the_reference
):
    problem = triton_config.Problem(kernel, step, pixels, dtype)
    case = tuning_patch_cases.make_case(problem, "cpu", **tuning_patch_cases.TOY)
    with tuning.override(kernel, RIGHT) as asked:
        case.verify()
        case.run()
    assert asked.used
    with tuning.override(kernel, WRONG), pytest.raises(AssertionError):
        case.verify()


@pytest.mark.parametrize("kernel", tuning_choice.PATCH_KERNELS)
def test_patches_are_also_verified_with_statistics_and_a_mask(
    kernel, triton_patches_are_the_reference
):
    problem = triton_config.Problem(kernel, 32, torch.uint8, torch.float32)
    case = tuning_patch_cases.make_case(problem, "cpu", **tuning_patch_cases.TOY)
    case.verify()
    triton_patches_are_the_reference.append(lambda *inputs: bool(inputs[8]))  # a mean
    with pytest.raises(AssertionError):
        case.verify()
    triton_patches_are_the_reference[:] = [lambda *inputs: inputs[6] is not None]  # a mask
    with pytest.raises(AssertionError):
        case.verify()


@pytest.mark.interpreter
def test_search_of_the_kernels_themselves(tmp_path):
    options = ["--kernel", "forward", "patch_forward", "patch_weight", "--head-dim", "16"]
    options += ["--patch", "7", "--dtype", "float32", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "mmkernels", "tune", "--dry-run", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    kernels = [name.split()[0] for name in report["problems"]]
    # With and without a mask; of floats and of bytes, in two tile sizes.
    assert kernels == ["forward"] * 2 + ["patch_forward"] * 4 + ["patch_weight"] * 2
    for problem in report["problems"].values():
        assert [t["problem"] for t in problem["trials"]] == [None, None]
    assert report["dry_run"] is True and not list(tmp_path.rglob("*.json"))
