"""Do the predictions of docs/scaling.md follow from their assumptions, and are they there?"""

import itertools
import re

import pytest

from tools.scaling import assumptions as a
from tools.scaling import attention, balance, page
from tools.scaling.plan import FORMS, Plan
from tools.scaling.predict import Prediction, best, plans

RATE = 989e12 * 0.6
# bfloat16 k and v of one position: 8 heads of 128 each.
KV = 8 * 256 * 2


def test_page_is_what_the_assumptions_predict():
    assert page.PAGE.read_text() == page.page(), "run `make docs`"


def test_every_generated_part_says_that_nothing_was_measured():
    parts = re.findall(r"<!-- begin (.*?) -->\n(.*?)<!-- end", page.PAGE.read_text(), re.DOTALL)
    assert len(parts) == 5
    for name, text in parts:
        assert re.search("not measure(d|ments)", text), name


def test_parameters_by_hand():
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert 32 * layer + 2 * 4096 * 128_256 == a.PARAMETERS
    assert 8.02e9 < a.PARAMETERS < 8.04e9  # Llama 3 8B; norms are left out


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (8, 1), (64, 8)])
def test_steps_of_the_ring_add_up_to_the_formulas(sp, tp, backward):
    plan = Plan("ring", 1, sp, tp)
    steps = list(attention.ring_steps(plan, backward))
    assert sum(sent for _, sent in steps) == attention.sent(plan, backward)
    assert sum(pairs for pairs, _ in steps) * sp == attention.VISIBLE


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_zigzag_gives_every_step_of_the_ring_as_many_pairs(ranks):
    """As ring_steps says: half of all pairs, and in the first step half a row more."""
    rows = 64 // ranks
    work = balance.pairs(balance.causal(64), "zigzag", ranks)
    for rank in range(ranks):
        assert work[rank][rank] == rows * (rows + 1) // 2
        assert all(work[rank][rank - step] == rows**2 // 2 for step in range(1, ranks))


def test_a_ring_that_waits_for_its_transfers_by_hand():
    """1024 positions a rank: every step but the last takes as long as its transfer."""
    transfer = 10e-6 + 1024 * KV / 50e9
    last = 1024 * 1024 // 2 * 4 * 128 * 32 / RATE + 1024 * 4096 * 10 / 4.8e12
    assert last < transfer
    seconds = attention.seconds(Plan("ring", 1, 1024, 1), backward=False)
    assert seconds == pytest.approx(1023 * transfer + last)


def test_a_ring_that_hides_its_transfers_by_hand():
    """Two ranks, backward: two steps of kernels, one merge of dq, dk and dv, and dk, dv home."""
    rows = 2**19
    kernels = (rows * (rows + 1) // 2 + rows * rows // 2) * 10 * 128 * 32 / RATE
    merge = rows * (4096 + 2048) * 10 / 4.8e12
    home = 10e-6 + rows * 2048 * 4 / 450e9
    seconds = attention.seconds(Plan("ring", 1, 2, 1), backward=True)
    assert seconds == pytest.approx(kernels + merge + home)


@pytest.mark.parametrize(("sp", "near"), [(8, 8), (32, 8)])
def test_an_exchange_by_hand(sp, near):
    """Four query heads and a kv head to each of 8 ranks, or one of each to each of 32."""
    heads, rows = 32 // sp, 2**20 // sp
    to_each = rows * (heads * 128 + 256) * 2 + rows * heads * 128 * 2
    links = max((near - 1) * to_each / 450e9, (sp - near) * to_each / 50e9)
    kernels = 2**20 * (2**20 + 1) // 2 * 4 * 128 * heads / RATE
    seconds = attention.seconds(Plan("all_to_all", 1, sp, 1), backward=False)
    assert seconds == pytest.approx(kernels + links + 20e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_a_ring_hides_its_transfers_from_the_least_rows_on(backward):
    rows = attention.least_rows(a.NETWORK, backward)
    kernels = rows**2 / 2 * 4 * 128 * 32 * (2.5 if backward else 1) / RATE
    assert kernels == pytest.approx(rows * KV * (3 if backward else 1) / 50e9)


@pytest.mark.parametrize("form", FORMS)
def test_one_gpu_sends_nothing_and_waits_for_nothing(form):
    prediction = Prediction(Plan(form, 1, 1, 1))
    assert not any(prediction.sent.values())
    assert prediction.memory["buffers"] == 0
    assert prediction.efficiency == pytest.approx(1)


def test_bytes_of_a_step_by_hand():
    sent = Prediction(Plan("ring", 2, 4, 2)).sent
    rows = 2**18
    ring = 2 * 3 * rows * KV // 2 + 3 * rows * KV // 2 + 4 * rows * KV  # float32: twice the bytes
    assert sent["attention"] == 32 * ring
    assert sent["parameters"] == a.PARAMETERS / 2 * (2 + 2 + 4) * 7 / 8
    # Six all-reduces a layer over two GPUs, which each send half twice.
    assert sent["activations"] == 32 * 6 * rows * 4096 * 2


def test_memory_by_hand():
    memory = Prediction(Plan("ring", 1, 8, 1)).memory
    assert memory["states"] == 16 * a.PARAMETERS / 8
    assert memory["checkpoints"] == 32 * 2**17 * 4096 * 2
    assert memory["buffers"] == 2**17 * (3 * 2048 + 4096) * (2 + 4)
    assert memory["logits"] == 2 * 4096 * 128_256 * 4
    # q, k, v and out of all positions with 4 query heads and 1 kv head, and their gradients.
    exchanged = Prediction(Plan("all_to_all", 1, 8, 1)).memory["buffers"]
    assert exchanged == 2 * 2**20 * (4 + 1 + 1 + 4) * 128 * 2


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_reported(form):
    prediction = best(4, form, 4)
    assert prediction is not None and not prediction.fits
    assert "does not fit 127 GB" in page.step_row(4, form, prediction)
    assert best(8, form, 8).fits


def test_more_gpus_a_sequence_than_heads_are_reported():
    assert best(1024, "all_to_all", 16) is None
    assert "more GPUs a sequence than the 32 query heads" in page.step_row(1024, FORMS[1], None)[2]
    assert best(512, "all_to_all", 16).plan == Plan("all_to_all", 16, 32, 1)


@pytest.mark.parametrize("form", FORMS)
def test_more_gpus_never_take_longer_or_need_more_memory(form):
    few = best(8, form, 16)
    for gpus in (16, 64, 128, 512):
        more = best(gpus, form, 16)
        assert more.plan.gpus == gpus and more.plan.dp <= 16
        assert more.step / more.plan.dp <= few.step / few.plan.dp
        assert more.bytes_held <= few.bytes_held
        assert more.of_peak < more.efficiency <= 1
        few = more


def test_more_ranks_hold_less_and_hide_less():
    predictions = [Prediction(Plan("ring", 1, 2**power, 1)) for power in range(11)]
    for few, more in itertools.pairwise(predictions):
        assert more.bytes_held < few.bytes_held
        assert more.sent["attention"] > few.sent["attention"]
        assert more.efficiency < few.efficiency + 1e-12


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (("tree", 1, 1, 1), "form is 'tree'"),
        (("ring", 1, 3, 1), "sp is 3; it must divide 1048576"),
        (("ring", 1, 1, 16), "tp is 16; it must divide 8 kv heads"),
    ],
)
def test_what_is_no_plan_is_refused(plan, told):
    with pytest.raises(ValueError, match=told):
        Plan(*plan)


def test_splits_are_of_powers_of_two():
    assert {plan.gpus for form in FORMS for plan in plans(64, form, 64)} == {64}
    with pytest.raises(ValueError, match="gpus is 12"):
        plans(12, "ring", 12)


@pytest.mark.parametrize("layout", balance.LAYOUTS)
@pytest.mark.parametrize("mask", balance.MASKS.values(), ids=balance.MASKS)
def test_every_visible_pair_is_counted_once(mask, layout):
    rows = mask(64)
    work = balance.pairs(rows, layout, 4)
    assert sum(map(sum, work)) == sum(end - start for start, end in rows)
    assert 1 <= balance.slowest(work) <= balance.in_step(work)


def test_contiguous_shards_of_a_causal_mask_by_hand():
    """Eight rows on two ranks: 1 + 2 + 3 + 4 pairs, and 5 + 6 + 7 + 8 of which 16 in the past."""
    work = balance.pairs(balance.causal(8), "contiguous", 2)
    assert work == [[10, 0], [16, 10]]
    assert balance.slowest(work) == balance.in_step(work) == 26 / 18


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="mask has 10 rows; 2 ranks need a multiple of 4"):
        balance.pairs(balance.causal(10), "zigzag", 2)
