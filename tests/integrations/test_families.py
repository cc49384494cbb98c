"""`mm.replace` on every family: eager's numbers, on kernels that really run, and the way back."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

import mmkernels as mm  # noqa: E402
from tests.integrations.counting import kernel_calls  # noqa: E402
from tests.integrations.families import FAMILIES  # noqa: E402
from tests.integrations.family import assert_parity, exactly, measure, result  # noqa: E402

EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
VARIANTS = pytest.mark.parametrize(
    "family, variant",
    [pytest.param(f, v, id=f"{f.name}: {v}") for f in FAMILIES for v in f.inputs],
)
GENERATORS = [(f, cache) for f in FAMILIES if f.generates for cache in f.caches]
NEW_TOKENS = 12


def counts(entries):
    return Counter(entry.kind for entry in entries)


@contextmanager
def watched(model, report) -> Iterator[Counter]:
    """Asserts of every module in the report, at each of its calls, what it claims: one kernel of
    its kind if swapped, none if left. Yields the number of calls of each kind that were swapped."""
    seen: Counter = Counter()
    handles = []

    def watch(entry, module):
        before = []

        def numbers():
            return calls.attention, calls.patch_embed

        def enter(*_):
            before.append(numbers())

        def leave(*_):
            ran = tuple(a - b for a, b in zip(numbers(), before.pop(), strict=True))
            one = (1, 0) if entry.kind == "attention" else (0, 1)
            assert ran == (one if entry.swapped else (0, 0)), f"{entry} ran {ran}"
            seen[entry.kind] += entry.swapped

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    with kernel_calls() as calls:
        for entry in report.entries:
            watch(entry, model.get_submodule(entry.name))
        yield seen
    for handle in handles:
        handle.remove()
    # Nothing ran that no entry speaks of.
    assert (seen["attention"], seen["patch embedding"]) == (calls.attention, calls.patch_embed)


@VARIANTS
def test_eager_parity(family, variant):
    eager, model = family.build("eager"), family.build()
    model.load_state_dict(eager.state_dict())
    mm.replace(model)
    inputs = family.inputs[variant]()
    got, wanted = measure(family, model, inputs), measure(family, eager, inputs)
    assert_parity(got, exactly(family, eager, inputs), wanted)


@EVERY
def test_report(family):
    report = mm.replace(family.build())
    expected = family.expected
    swapped, left = counts(report.swapped), counts(report.left)
    assert (swapped["attention"], left["attention"]) == (expected.attention, expected.left)
    patches = swapped["patch embedding"], left["patch embedding"]
    assert patches == (expected.patches, expected.patches_left)
    assert sorted(report.swapped + report.left, key=str) == sorted(report.entries, key=str)
    assert all(entry.swapped for entry in report.swapped)
    assert all(entry.reason for entry in report.entries)
    for entry in report.entries:
        assert entry.type in str(report)


@VARIANTS
def test_the_report_is_true(family, variant):
    """Without gradients and with them."""
    model, inputs = family.build(), family.inputs[variant]()
    report = mm.replace(model)
    expected = {"attention": family.expected.attention, "patch embedding": family.expected.patches}
    for run in (result, measure):
        with watched(model, report) as seen:
            run(family, model, inputs)
        assert seen == Counter(expected)


@EVERY
def test_parameters_stay(family):
    model = family.build()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    mm.replace(model)
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]


@EVERY
def test_restore(family):
    """Bit for bit, also after a second replacement, which finds what the first found."""
    model = family.build()
    inputs = next(iter(family.inputs.values()))()
    before = result(family, model, inputs)
    report = mm.replace(model)
    result(family, model, inputs)
    again = mm.replace(model)
    assert again.entries == report.entries
    mm.restore(model)
    with kernel_calls() as calls:
        assert torch.equal(result(family, model, inputs), before)
    assert calls.by_op == {}


@EVERY
def test_replaced_for_a_while(family):
    model = family.build()
    inputs = next(iter(family.inputs.values()))()
    before = result(family, model, inputs)
    with mm.replaced(model) as report, watched(model, report) as seen:
        result(family, model, inputs)
    assert seen["attention"] == family.expected.attention
    with kernel_calls() as calls:
        assert torch.equal(result(family, model, inputs), before)
    assert calls.by_op == {}


@pytest.mark.parametrize(
    "family, cache", [pytest.param(f, c, id=f"{f.name}: {c} cache") for f, c in GENERATORS]
)
def test_generate(family, cache):
    """Greedy, of rows that differ in length; the prompt alone is longer than a window."""
    eager, model = family.build("eager"), family.build()
    model.load_state_dict(eager.state_dict())
    inputs = family.generates() | {
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "cache_implementation": None if cache == "dynamic" else cache,
    }
    wanted = eager.generate(**inputs)
    with watched(model, mm.replace(model)) as seen:
        assert torch.equal(model.generate(**inputs), wanted)
    if family.expected.attention:
        assert seen["attention"] >= family.expected.attention + 2 * (NEW_TOKENS - 1)
