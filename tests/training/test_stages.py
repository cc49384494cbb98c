"""Does the learning rate go as it should, and does packing lose nothing?"""

import random

import pytest
import torch

from mmkernels.models.batch import IGNORED
from mmkernels.models.chat_format import Document
from mmkernels.training.stages import Stage, pack


def stage(**settings):
    return Stage("one", documents=lambda step, micro: [], **settings)


def document(size, first=1):
    made = Document()
    made.add(range(first, first + size), True)
    return made


@pytest.mark.parametrize("final", [0.05, 0.1, 1.0])
def test_it_rises_in_a_line_and_falls_in_a_cosine(final):
    rate = stage(steps=110, learning_rate=2.0, warmup=10, final=final).rate
    torch.testing.assert_close([rate(step) for step in range(10)], [0.2 * n for n in range(1, 11)])
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.0 + final)  # half-way
    assert rate(35) == pytest.approx(2 * (final + (1 - final) * (1 + 0.5**0.5) / 2))
    assert rate(110) == pytest.approx(2 * final)
    rates = [rate(step) for step in range(9, 110)]
    assert rates == sorted(rates, reverse=True)
    assert 2 * final <= rates[-1] <= 2 * final + 0.01


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 30), (1, 30), (7, 0)])
def test_it_is_never_above_its_peak_nor_zero(steps, warmup):
    made = stage(steps=steps, learning_rate=1.0, warmup=warmup)
    assert all(0 < made.rate(step) <= 1 for step in range(steps))


def test_packing_keeps_every_document_whole():
    chance = random.Random(1)
    documents = [document(chance.randrange(1, 60), 100 * i + 1) for i in range(80)]
    batch = pack(documents, 64)
    found = []
    for row in range(len(batch.ids)):
        for number in range(int(batch.documents[row].max()) + 1):
            where = batch.documents[row] == number
            found.append(batch.ids[row][where].tolist())
            assert batch.positions[row][where].tolist() == list(range(int(where.sum())))
            # The first token is nobody's target: no document predicts the next one's.
            last = int(where.nonzero()[-1])
            assert batch.targets[row][last] == IGNORED
            assert batch.targets[row][where][:-1].tolist() == batch.ids[row][where][1:].tolist()
    assert sorted(found) == sorted(one.ids for one in documents)
    assert int(batch.lengths.sum()) == sum(map(len, documents))
    assert int(batch.lengths.max()) <= 64
    # First fit: no two rows would have fit into one.
    assert sorted(batch.lengths.tolist())[0] + sorted(batch.lengths.tolist())[1] > 64


def test_packing_does_not_change_what_it_is_given():
    documents = [document(size) for size in (3, 9, 5)]
    pack(documents, 10)
    assert [len(one) for one in documents] == [3, 9, 5]


def test_documents_fill_a_row():
    assert pack([document(5), document(3)], 8).ids.shape == (1, 8)
    batch = pack([document(8), document(8)], 8)
    assert batch.ids.shape == (2, 8)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="has 9 tokens, and a row 8; give the stage a longer"):
        pack([document(3), document(9)], 8)
