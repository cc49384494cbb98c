"""Do the Triton kernels count the rows and keys at the edges of their tiles?"""

import contextlib

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels._core import tuning
from mmkernels.attention.interval import IntervalMask
from tests.attention import backends

BLOCK, LENGTH = 32, 65  # two tiles and one row or key
ROW = torch.arange(LENGTH)
ALL = torch.full((LENGTH,), LENGTH)
NONE = torch.zeros(LENGTH, dtype=torch.long)
MASKS = {
    "all": (NONE, ALL),
    "first tile of rows and one more see a key less": (NONE, ALL - (ROW <= BLOCK).long()),
    "first row ends in the second tile": (NONE, torch.where(ROW == 0, BLOCK + 8, LENGTH)),
    "last row sees a key less": ((ROW == LENGTH - 1).long(), ALL),
    "every other row begins behind the first tile": ((ROW % 2) * (BLOCK + 8), ALL),
    "the last key is of the last row": (NONE, ALL - (ROW < LENGTH - 1).long()),
    "rows end with the first tile of keys": (NONE, torch.where(ROW < 40, BLOCK, BLOCK + 1)),
}


@backends.each("triton")
@pytest.mark.parametrize("name", MASKS)
def test_edges(name, backend):
    mask = IntervalMask(*MASKS[name], LENGTH)
    leaves = [x.requires_grad_() for x in testing.make_qkv(1, LENGTH, LENGTH, 1, 1, 16)]
    results = []
    with contextlib.ExitStack() as stack:
        for kernel in ("forward", "backward_keys", "backward_queries"):
            config = tuning.Config(BLOCK, BLOCK, num_warps=4, num_stages=1)
            stack.enter_context(tuning.override(kernel, config))
        for which in (backend, "reference"):
            out, lse = backends.call(
                mm.attention, *leaves, mask=mask, return_lse=True, backend=which
            )
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            results.append((out, lse, *grads))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
