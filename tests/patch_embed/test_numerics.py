"""Does every backend obey the error rule, forward and backward, with every argument?"""

import functools
import itertools

import pytest

import mmkernels as mm
from mmkernels import testing
from tests.attention import backends
from tests.patch_embed.cases import BACKENDS, CASES, Case, check


def run(backend: str, case: Case):
    moved = case.to(case.options["weight"].dtype, testing.device_for(backend))
    results = moved.results(mm.patch_embed, backend=backend)
    return {name: x.cpu() for name, x in results.items()}


def backends_and_dtypes():
    return [
        backends.param(name, dtype, on=name, id=f"{name}-{backends.short(dtype)}")
        for name, dtype in itertools.product(BACKENDS, backends.DTYPES)
        if backends.serves(name, dtype)
    ]


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
@pytest.mark.parametrize("name", CASES)
def test_error_rule(name, backend, dtype):
    check(CASES[name](), dtype, functools.partial(run, backend))
