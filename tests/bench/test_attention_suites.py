"""Do the suites of attention run, and list what they should?"""

import itertools

import pytest
import torch

from mmkernels.bench import suite_overhead, suites
from mmkernels.bench.case import OURS, Unavailable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("attention", "scaling", "decode", "overhead")


@pytest.mark.parametrize("suite", NAMES)
def test_a_smoke_test_runs(suite):
    for case in suites.cases([suite], CPU, quick=True):
        problem = case.make()
        for name, prepare in problem.implementations.items():
            if name != "FlexAttention":
                problem.check(prepare()())
            else:
                with pytest.raises(Unavailable, match=r"takes long to compile|no backward pass"):
                    prepare()
        ours, *others = problem.implementations
        assert ours == OURS and not all(other.startswith(OURS) for other in others), str(case)
        rated = case.suite != "overhead"
        assert (problem.flops is not None) == (problem.bytes is not None) == rated


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_cases_are_told_apart(name, quick, device):
    cases = suites.cases([name], device, quick)
    assert cases and len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert case.suite == name and case.name and case.shape and case.mode
        assert (case.scale is not None) == (name == "scaling")


def test_a_full_run_has_every_mask_and_dtype():
    masks = (
        "full", "causal", "prefix-LM", "packed images", "packed windows", "window ", "image spans",
        "left padding",
    )  # fmt: skip
    for device in (CPU, CUDA):
        cases = suites.cases(["attention"], device, quick=False)
        for dtype in (torch.bfloat16, torch.float32):
            found = " ".join(case.mask for case in cases if case.dtype is dtype)
            missing = [mask for mask in masks if mask not in found]
            assert set(missing) <= ({"packed windows"} if dtype is torch.float32 else set())
        modes = {case.mode for case in cases}
        assert {"forward", "forward + backward"} <= modes
        assert ("backward" in modes) == (device is CUDA)


def test_scaling_doubles():
    for device in (CPU, CUDA):
        cases = suites.cases(["scaling"], device, quick=False)
        lengths = {
            mask: [x.scale for x in cases if x.mask == mask] for mask in {x.mask for x in cases}
        }
        assert len(lengths) == 3
        for found in lengths.values():
            assert len(found) >= 4
            assert all(b == 2 * a for a, b in itertools.pairwise(found))


def test_a_wrong_patch_is_seen():
    problem = suite_overhead.PatchProblem(torch.float32, CPU)
    for name, prepare in problem.implementations.items():
        (tokens,) = prepare()()
        assert problem.check((tokens,)) < 1e-3, name
        with pytest.raises(AssertionError, match=r"^tokens: "):
            problem.check((tokens * 1.001,))


def test_overhead_records_a_graph_where_it_says_so():
    graphs = {}
    for case in suites.cases(["overhead"], CPU, quick=True)[:3]:
        problem = case.make()
        graphs[case.mode] = {n: p()()[0].requires_grad for n, p in problem.implementations.items()}
    recorded = {OURS: True, "SDPA": True}
    assert graphs["forward that records a graph"] == recorded
    assert graphs["forward"] == {OURS: False, "SDPA": False}
