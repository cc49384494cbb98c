"""Does tuning hold every kernel to the error rule?"""

import os
import subprocess
import sys

import pytest
import torch

from mmkernels._core import registry, tuning, tuning_store
from mmkernels._core.triton_runtime import KNOWN_GPUS
from mmkernels._core.tuning import Config, Problem
from mmkernels._core.tuning_cases import Sizes, make_case

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


@pytest.mark.interpreter
def test_search_of_the_kernels_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = """
import torch
from mmkernels import tune
from mmkernels._core import tuning, tuning_cases
from mmkernels._core.triton_runtime import KNOWN_GPUS
sizes = tuning_cases.Sizes(1, 19, 35, 2, 1)
results = tune.tune(
    [tuning.Problem("forward", 16, 16, torch.float32, True)], KNOWN_GPUS["sm_90"],
    lambda p: tuning_cases.make_case(p, "cpu", timed=sizes, checked=sizes),
    measure=lambda run: (run(), 1.0)[1], quick=True,
)
[print(tune.render(r)) for r in results]
assert all(t.problem is None for t in results[0].trials), results
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("forward D16 Dv16 float32 masked: ")
    [entry] = tuning_store.read(GPU.name)
    assert entry["problem"] == "forward D16 Dv16 float32 masked"
