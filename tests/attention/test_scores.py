"""Does whatever changes scores obey the error rule, with its gradients: bias, ALiBi, softcap, ...?

Bias in every broadcast shape, bool masks that are no intervals, ALiBi by head and by batch, sinks,
softcap, scales that are not positive, and all of them together.
"""

import pytest
import torch
from torch import Tensor

import mmkernels as mm
from mmkernels import testing
from mmkernels._core.ops import lse_dtype
from tests.attention import backends

B, SQ, SK, HQ, HKV, D, DV = 2, 37, 70, 2, 1, 16, 24
# cpu has neither softcap nor a gradient for bias; auto mixes it with reference.
BACKENDS = ("reference", "auto", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bias(*shape: int) -> dict:
    return {"bias": normal(*shape, seed=11)}


def hiding_bias() -> dict:
    """-inf in half of the cells, in a whole tile, and in a whole row of one head."""
    x = normal(1, HQ, SQ, SK, seed=11)
    x = x.masked_fill(normal(1, HQ, SQ, SK, seed=12) < 0, -torch.inf)
    x[:, 0, :, :65], x[:, 1, 5] = -torch.inf, -torch.inf
    return {"bias": x}


def shown(*shape: int) -> dict:
    """A dense mask that is no interval, with a row or a tile that sees nothing."""
    mask = normal(*shape, seed=13) > 0.3
    mask[..., :1, :66] = False
    return {"mask": mask}


SLOPES = torch.tensor([0.5, 0.1])
BATCHED_SLOPES = torch.tensor([[0.5, 0.0], [0.1, 2.0]])
SINKS = torch.tensor([0.3, 4.0])

# Name -> the options of the call; a float bias and sinks get a gradient.
SCORES = {
    "bias": lambda: bias(B, HQ, SQ, SK),
    "bias of a head": lambda: bias(HQ, SQ, SK),
    "bias of a batch element": lambda: bias(B, 1, SQ, SK),
    "bias of a cell": lambda: bias(SQ, SK),
    "bias of a key": lambda: bias(SK),
    "bias of a key and batch element": lambda: bias(B, 1, 1, SK),
    "bias of a key and head": lambda: bias(1, HQ, 1, SK),
    "bias of a row": lambda: bias(SQ, 1),
    "bias of a row and head": lambda: bias(B, HQ, SQ, 1),
    "bias of a batch element and head": lambda: bias(B, HQ, 1, 1),
    "one bias": lambda: bias(1, 1, 1, 1),
    "bias in odd strides": lambda: {
        "bias": normal(SK, HQ, 1, SQ, seed=11).permute(2, 1, 3, 0)
    },
    "bias that hides": hiding_bias,
    "bias, causal": lambda: bias(B, 1, SQ, SK) | {"causal": True},
    "mask": lambda: shown(B, HQ, SQ, SK),
    "mask of a head": lambda: shown(HQ, SQ, SK),
    "mask of a batch element": lambda: shown(B, 1, SQ, SK),
    "mask of a key": lambda: shown(B, 1, 1, SK),
    "mask and bias": lambda: shown(B, 1, SQ, SK) | bias(HQ, 1, SK),
    "mask, causal": lambda: shown(HQ, SQ, SK) | {"causal": True},
    "alibi": lambda: {"alibi_slopes": SLOPES},
    "alibi, causal": lambda: {"alibi_slopes": SLOPES, "causal": True},
    "alibi of a batch element": lambda: {"alibi_slopes": BATCHED_SLOPES},
    "alibi and bias": lambda: {"alibi_slopes": BATCHED_SLOPES} | bias(HQ, SQ, 1),
    "sinks": lambda: {"sinks": SINKS},
    "sinks, window": lambda: {"sinks": SINKS, "window_size": (9, 0)},
    "infinite sinks": lambda: {"sinks": torch.tensor([-2.0, -torch.inf]), "causal": True},
    "softcap": lambda: {"softcap": 0.9},
    "softcap, causal": lambda: {"softcap": 0.9, "causal": True},
    "negative scale": lambda: {"softmax_scale": -0.4, "causal": True},
    "scale 0": lambda: {"softmax_scale": 0.0, "window_size": (20, 9)},
    "negative scale and the rest": lambda: {
        "softmax_scale": -0.4, "softcap": 0.9, "alibi_slopes": SLOPES, "sinks": SINKS
    } | bias(SQ, SK),
    "all at once": lambda: {
        "window_size": (40, 3), "softmax_scale": 0.6, "softcap": 0.9,
        "alibi_slopes": BATCHED_SLOPES, "sinks": SINKS,
    } | shown(B, 1, SQ, SK) | bias(B, HQ, SQ, SK),
}  # fmt: skip


def visible(options: dict) -> Tensor:
    """(B, HQ, SQ, SK) bool: what the call's masks show."""
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    cells = mm.masks.window(SQ, SK, window_size=(left, right)).to_dense()[:, None]
    return (cells & options.get("mask", torch.tensor(True))).expand(B, HQ, SQ, SK)


def eager(leaves: dict, options: dict) -> tuple[Tensor, Tensor]:
    """out and lse in the leaves' dtype."""
    scores = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
    mask = visible(options)
    if "bias" in scores:  # the yardstick knows rows that see nothing by their mask
        mask = mask & (scores["bias"] > -torch.inf)
    numbers = {name: options[name] for name in ("softmax_scale", "softcap") if name in options}
    if (slopes := options.get("alibi_slopes")) is not None:
        row = torch.arange(SQ)[:, None] + SK - SQ
        distance = slopes.expand(B, HQ)[..., None, None] * (row - torch.arange(SK)).abs()
        distance = -distance.to(leaves["q"].dtype)
        scores["bias"] = scores["bias"] + distance if "bias" in scores else distance
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    return testing.eager_attention(q, k, v, mask=mask, **scores, **numbers)


def results(attend, tensors: dict, dtype: torch.dtype, cotangents: tuple) -> dict:
    """out, lse and the gradient of every tensor, by name, with everything rounded to dtype."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    out, lse = attend(leaves)
    grads = torch.autograd.grad(
        (out, lse.where(lse > -torch.inf, 0.0)),
        list(leaves.values()),
        [x.to(y.dtype) for x, y in zip(cotangents, (out, lse), strict=True)],
    )
    found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | found


def cancelled(exact: dict, tensors: dict, options: dict, cotangents: tuple, size: Tensor) -> dict:
    """How much larger the terms of a gradient are than their sum, for those that are long sums."""
    ratios = {}
    if "bias" in tensors:
        whole = tensors["bias"].double().expand(B, HQ, SQ, SK).clone().requires_grad_()
        rest = {name: x.double() for name, x in tensors.items() if name != "bias"}
        out, lse = mm.attention(**rest, **options, bias=whole, return_lse=True, backend="reference")
        lse = lse.where(lse > -torch.inf, 0.0)
        (terms,) = torch.autograd.grad((out, lse), whole, [x.double() for x in cotangents])
        terms = terms.abs().sum_to_size(exact["dbias"].shape)
        ratios["dbias"] = float(terms.max() / exact["dbias"].abs().max())
    if "sinks" in tensors:
        terms = torch.exp(tensors["sinks"].double()[:, None] - exact["lse"])
        terms = terms.where(exact["lse"] > -torch.inf, 0.0) * size
        ratios["dsinks"] = float(terms.sum((0, 2)).max() / exact["dsinks"].abs().max())
    return ratios


@backends.each_in(DTYPES, *BACKENDS)
@pytest.mark.parametrize("kind", SCORES)
def test_do_results_and_gradients_obey_the_error_rule(kind, backend, dtype):
    options = SCORES[kind]()
    qkv = testing.make_qkv(B, SQ, SK, HQ, HKV, D, DV, dtype=dtype)
    tensors = dict(zip("qkv", qkv, strict=True))
    for name in options.keys() & {"bias", "sinks"}:
        tensors[name] = options.pop(name).to(dtype)
    cotangents = (
        normal(B, SQ, HQ, DV, seed=8).to(dtype),
        normal(B, HQ, SQ, seed=9).to(lse_dtype(dtype)),
    )

    def attend(name: str):
        return lambda leaves: backends.call(
            mm.attention, **leaves, **options, return_lse=True, backend=name
        )

    exact = results(attend("reference"), tensors, torch.float64, cotangents)
    yardstick = results(lambda leaves: eager(leaves, options), tensors, dtype, cotangents)
    with backends.wide_tiles(64):
        got = results(attend(backend), tensors, dtype, cotangents)
    delta = (cotangents[0].double() * exact["out"]).sum(-1).transpose(1, 2) - cotangents[1]
    rounding = testing.attention_rounding(dtype, exact["lse"], delta)
    ratios = cancelled(exact, tensors, options, cotangents, delta.abs())
    for name, value in got.items():
        limit = rounding * max(ratios.get(name, 1.0), 1.0)
        testing.assert_accurate(name, value, exact[name], yardstick[name], rounding=limit)


@backends.each(*backends.ALL)
def test_sinks_may_have_any_strides(backend):
    q, k, v = testing.make_qkv(1, 9, 9, 4, 2, 16)
    for sinks in (torch.randn(1).expand(4), torch.randn(8)[::2]):
        got = backends.call(mm.attention, q, k, v, sinks=sinks, backend=backend)
        wanted = mm.attention(q, k, v, sinks=sinks.contiguous(), backend="reference")
        torch.testing.assert_close(got, wanted, **backends.tolerance(torch.float32))
