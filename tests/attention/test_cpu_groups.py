"""Are gradients of keys that many query heads share as exact on the cpu backend as in eager torch?

Without a gradient of lse, which makes that backend compute in float32.
"""

import pytest
import torch

import mmkernels as mm
from mmkernels import testing


def masks(batch: int, rows: int, heads: int) -> dict[str, torch.Tensor | None]:
    """What (batch, heads, row, key) shows, by how much of it is shared."""
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    shown = torch.rand(batch, heads, rows, rows, generator=torch.Generator().manual_seed(3)) < 0.7
    shown |= torch.eye(rows, dtype=torch.bool)
    return {
        "full": None,
        "causal": causal[None, None],
        "per element": shown[:, :1],
        "per head": shown[:1],
        "all": shown,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", masks(1, 1, 1))
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients(kv_heads, name, dtype):
    batch, rows, heads, dim = 2, 129, 16, 32
    q, k, v = testing.make_qkv(batch, rows, rows, heads, kv_heads, dim, dtype=dtype)
    shown = masks(batch, rows, heads)[name]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def attended(function, dtype, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = function(*leaves, **options)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    option = {"causal": True} if name == "causal" else {"mask": shown}
    got = attended(mm.attention, dtype, backend="cpu", **option)
    exact = attended(mm.attention, torch.float64, backend="reference", mask=shown)
    eager = attended(testing.eager_attention, dtype, mask=shown)
    wide = (x.double() for x in (q, k, v))
    _, lse = mm.attention(*wide, mask=shown, return_lse=True, backend="reference")
    delta = (dout.double() * exact[0]).sum(-1)
    rounding = testing.attention_rounding(dtype, lse, delta)
    for what, *values in zip(("out", "dq", "dk", "dv"), got, exact, eager, strict=True):
        testing.assert_accurate(what, *values, rounding=rounding)
