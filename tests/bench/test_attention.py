"""Are the benchmarks' attention problems what they say, and do their checks see what is wrong?"""

import pytest
import torch

import mmkernels as mm
from mmkernels import testing
from mmkernels.bench import attention_expected, attention_peers, suite_attention
from mmkernels.bench import attention_masks as masks
from mmkernels.bench.attention_problem import MODES, AttentionProblem, Size
from mmkernels.bench.case import OURS

CPU = torch.device("cpu")
SHAPES = {name: model.toy for name, model in suite_attention.BY_NAME.items()}


def problem(
    mask, mode="forward + backward", size=None, dtype=torch.float32, peers=None
) -> AttentionProblem:
    size = size or Size(1, 64, 4, 2, 16)
    return AttentionProblem(size, mask, dtype, mode, CPU, peers or {OURS: attention_peers.ours()})


def results(this: AttentionProblem, name: str = OURS) -> list:
    return list(this.implementations[name]()())


@pytest.mark.parametrize("name", SHAPES)
def test_the_forms_of_a_mask_are_one_mask(name):
    size, mask = SHAPES[name]
    position = torch.arange(size.seqlen)
    batch = torch.arange(size.batch)[:, None, None]
    seen = mask.mask_mod(CPU)(batch, torch.tensor(0), position[:, None], position)
    interval = mask.interval(CPU)()
    dense = torch.ones(1, 1, 1, dtype=bool) if interval is None else interval.to_dense()
    assert torch.equal(*torch.broadcast_tensors(seen, dense))
    causal = position[:, None] >= position
    if mask.plain and not mask.lengths:  # what libraries are given says all
        window = torch.ones_like(causal)
        if mask.window is not None:
            window = position[:, None] - position <= mask.window
        plain = (causal & window) if mask.causal else window
        assert torch.equal(*torch.broadcast_tensors(plain, dense[0]))


@pytest.mark.parametrize("sizes", ["gpu", "cpu", "toy"])
def test_shapes_fit_their_masks(sizes):
    for model in suite_attention.MODELS:
        size, mask = getattr(model, sizes)
        interval = mask.interval(CPU)()
        if interval is not None:
            assert interval.shape[1] == interval.seqlen_k == size.seqlen, model.name
            assert interval.shape[0] in (1, size.batch)
            assert (interval.end > interval.start).any(1).all()
        if mask.lengths and not mask.padded:
            assert size.batch == 1 and sum(mask.lengths) == size.seqlen
        if mask.dense:  # the kernels behind a dense mask copy it if its rows are not aligned
            assert sizes != "gpu" or size.seqlen % 16 == 0, model.name


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_result_is_seen(mode):
    this = problem(masks.image_spans(2, 16, 64), mode)
    right = results(this)
    names = MODES[mode][0]
    assert this.check(right) < 1e-5
    for index, name in enumerate(names):
        changed = [x * 1.001 if i == index else x for i, x in enumerate(right)]
        with pytest.raises(AssertionError, match=f"^{name}: "):
            this.check(changed)
        for place in ((0, 0, 0), (-1, -1, -1)):  # a single number, in any head
            changed = [x.detach().clone() for x in right]
            changed[index][place] += 0.1
            with pytest.raises(AssertionError, match=f"^{name}: "):
                this.check(changed)


def test_a_result_that_is_missing_is_seen():
    this = problem(masks.full())
    with pytest.raises(ValueError, match="shorter"):
        this.check(results(this)[:1])


def test_padding_may_hold_anything():
    this = problem(masks.left_padding((64, 40), 64), size=Size(2, 64, 3, 1, 16))
    out, *gradients = results(this)
    out[1, :24] = torch.nan
    assert this.check([out, *gradients]) < 1e-5
    out[1, 24] = 0.0
    with pytest.raises(AssertionError, match=r"^out: "):
        this.check([out, *gradients])


@pytest.mark.parametrize("name", SHAPES)
def test_expected_values_do_not_depend_on_the_run_of_rows(name, monkeypatch):
    size, mask = SHAPES[name]
    monkeypatch.setitem(attention_expected.SCORES_AT_ONCE, "cpu", 7 * size.seqlen)
    this = problem(mask, size=size)
    expected = this._expected
    qkv = [x.detach().double().requires_grad_() for x in this.qkv]
    out, lse = mm.attention(*qkv, mask=this.interval, return_lse=True, backend="reference")
    dout = this._dout.double()
    whole = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, dout), strict=True))
    whole |= {"out": out, "lse": lse.transpose(1, 2), "delta": (out * dout).sum(-1)}
    for key, found in expected._exact.items():
        heads = [expected._head(key, whole[key], *which) for which in expected.checked]
        torch.testing.assert_close(found, torch.stack(heads).detach(), rtol=1e-10, atol=1e-10)


def test_every_head_is_checked_if_there_is_time_and_the_last_in_any_case(monkeypatch):
    size = Size(2, 16, 4, 2, 8)
    every = [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert problem(masks.full(), size=size)._expected.checked == every
    with monkeypatch.context() as patched:
        patched.setattr(attention_expected, "CHECKED_HEADS", 3)
        assert problem(masks.full(), size=size)._expected.checked == [(1, 1), (1, 0), (0, 1)]
    monkeypatch.setitem(attention_expected.CHECKED_SCORES, "cpu", 2 * 2 * 16**2)
    assert problem(masks.full(), size=size)._expected.checked == [(1, 1), (0, 1)]
    monkeypatch.setitem(attention_expected.CHECKED_SCORES, "cpu", 1)
    assert problem(masks.full(), size=size)._expected.checked == [(1, 1)]


def test_flops_and_bytes():
    size = Size(2, 4, 4, 2, 8)  # 10 pairs of a query and a key that a causal mask shows
    q, k, lse = 4 * 2 * 4 * 4 * 8, 4 * 2 * 4 * 2 * 8, 4 * 2 * 4 * 4
    forward = problem(masks.causal(4), "forward", size)
    assert forward.flops == 2 * 10 * 4 * 4 * 8
    assert forward.bytes == 2 * q + 2 * k
    both = problem(masks.causal(4), "forward + backward", size)
    assert both.flops == 3.5 * forward.flops
    assert both.bytes == forward.bytes + q + (q + 2 * k)
    backward = problem(masks.causal(4), "backward", size)
    assert backward.flops == 2.5 * forward.flops
    assert backward.bytes == (2 * q + 2 * k) + q + lse + (q + 2 * k)
    padded = problem(masks.left_padding((4, 2), 4), "forward", size)
    assert padded.flops == (10 + 3) * 4 * 4 * 8
    packed = problem(masks.packed("images", (3, 1)), "forward", size._replace(batch=1))
    assert packed.flops == (9 + 1) * 4 * 4 * 8
    assert problem(masks.full(), "forward", size).flops == 2 * 16 * 4 * 4 * 8


def test_bfloat16_is_held_to_the_rule_of_bfloat16():
    this = problem(masks.causal(64), dtype=torch.bfloat16)
    right = results(this)
    this.check(right)
    with pytest.raises(AssertionError, match=r"^out: "):
        this.check([right[0] + 0.05, *right[1:]])
    assert testing.make_qkv(1, 64, 64, 4, 2, 16, dtype=torch.bfloat16)[0].equal(this.qkv[0])
