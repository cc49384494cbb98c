"""Is attention over a spread sequence that of one process, for every mask and layout?"""

import itertools

import pytest
import torch

from mmkernels import testing
from tests.distributed.problems import FORMS, Problem, check

LAYOUTS = ("zigzag", "unequal", "balanced", "scattered")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mask(form, mask, ranks):
    layouts = itertools.cycle(LAYOUTS)
    layout = next(itertools.islice(layouts, list(testing.MASKS).index(mask) + ranks // 4, None))
    check(Problem(form, mask, layout, ranks))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(form, layout):
    check(Problem(form, "image spans", layout, ranks=4, seqlen=61))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "heads, kv_heads, ranks", [(4, 4, 4), (6, 1, 4), (9, 3, 2), (9, 3, 4), (12, 4, 4), (5, 5, 2)]
)
def test_grouped_heads(form, heads, kv_heads, ranks):
    check(Problem(form, "causal", "zigzag", ranks, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim, value_dim", [(8, 24), (24, 8)])
def test_values_of_another_width(form, head_dim, value_dim):
    check(Problem(form, "documents", head_dim=head_dim, value_dim=value_dim))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dtypes(form, dtype, ranks):
    check(Problem(form, "causal", "zigzag", ranks, dtype=dtype, seqlen=130))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softmax_scale": 0.7},
        {"causal": True},
        {"window_size": (9, 3)},
        {"deterministic": False},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_options(form, options):
    check(Problem(form, "none", options=options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["causal", "ragged"])
def test_sinks(form, mask):
    check(Problem(form, mask, ranks=4, sinks=True))


@pytest.mark.parametrize("form", FORMS)
def test_without_lse(form):
    check(Problem(form, lse=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seqlen", [0, 1, 3])
def test_fewer_positions_than_processes(form, seqlen):
    check(Problem(form, "causal", ranks=4, seqlen=seqlen))
