"""Is pretraining on unlabelled documents, the same for each step whatever came before?"""

import collections

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn"):
    pytest.importorskip(library)

from dataclasses import replace  # noqa: E402

from mmkernels.training import pretrain  # noqa: E402 (may be absent)
from mmkernels.training.pretrain import SHARES, Pretraining, seeded  # noqa: E402
from tests.training import small  # noqa: E402

MODEL = small.model()
VOCABULARY = MODEL.vocabulary
WORDS = torch.tensor(small.tokenizer().encode(small.TEXT))


def pretraining(seed=0, count=60, **changes):
    material = replace(small.material(), **changes)
    return Pretraining(MODEL, material, WORDS, seed, count)


def kind(document):
    """Which of SHARES a document is."""
    if document.images:
        return "seen"
    if document.audios:
        return "heard"
    begins = {VOCABULARY.image_start: "image", VOCABULARY.audio_start: "audio"}
    return begins.get(document.ids[0], "text")


def same(a, b):
    fields = ("ids", "learned", "spans")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and all(
        len(x) == len(y) and all(map(torch.equal, x, y))
        for x, y in ((a.images, b.images), (a.audios, b.audios))
    )


def codes(document, kind):
    """Those of an image or a sound at a document's end."""
    begin, first = {
        "image": (VOCABULARY.image_start, VOCABULARY.first_image_code),
        "audio": (VOCABULARY.audio_start, VOCABULARY.first_audio_code),
    }[kind]
    place = document.ids.index(begin)
    assert document.ids[-1] == begin + 1
    return [code - first for code in document.ids[place + 1 : -1]]


def test_documents_follow_from_seed_step_and_micro_batch_alone():
    first = [pretraining()(step, micro) for step in range(3) for micro in range(2)]
    again = pretraining()
    for index in (5, 0, 3, 1, 4, 2):
        torch.manual_seed(index)
        for a, b in zip(first[index], again(*divmod(index, 2)), strict=True):
            assert same(a, b)


def test_every_seed_step_and_micro_batch_has_its_own():
    places = [(s, t, m) for s in (0, 1, 2, 1 << 30) for t in (0, 1, 2, 999) for m in (0, 1, 4096)]
    drawn = [tuple(torch.rand(4, generator=seeded(*place)).tolist()) for place in places]
    assert len(set(drawn)) == len(places)
    texts = [tuple(map(tuple, (d.ids for d in pretraining(seed)(0, 0)))) for seed in range(3)]
    assert len(set(texts)) == 3


def test_each_kind_has_its_share():
    assert sum(SHARES.values()) == pytest.approx(1)
    found = collections.Counter(kind(document) for document in pretraining(count=4000)(0, 0))
    assert found.total() == 4000
    for name, share in SHARES.items():
        assert abs(found[name] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_no_document_carries_a_label():
    """Text stands alone; beside what is shown and played there are codes and marks."""
    for document in pretraining(count=300)(0, 0):
        if kind(document) == "text":
            assert all(document.learned)
            assert max(document.ids) < VOCABULARY.text_size
            assert len(document) == 64
        else:
            assert min(document.ids) >= VOCABULARY.text_size


def test_labels_change_nothing():
    material = small.material()
    digits = replace(material.digits, labels=torch.zeros_like(material.digits.labels))
    speech = replace(material.speech, digits=torch.zeros_like(material.speech.digits))
    with_labels, without = pretraining()(2, 0), pretraining(digits=digits, speech=speech)(2, 0)
    assert all(same(*pair) for pair in zip(with_labels, without, strict=True))


def test_text_is_a_stretch_of_the_corpus():
    corpus = WORDS.tolist()
    stretches = {tuple(corpus[i : i + 64]) for i in range(len(corpus) - 63)}
    texts = [d for d in pretraining(count=300)(0, 0) if kind(d) == "text"]
    assert texts and all(tuple(document.ids) in stretches for document in texts)


def test_codes_are_learned_and_what_is_given_is_not():
    for document in pretraining(count=300)(0, 0):
        for token, learned, span in zip(
            document.ids, document.learned, document.spans, strict=True
        ):
            given = token in (VOCABULARY.image_patch, VOCABULARY.audio_patch)
            assert learned == (not given) and (span >= 0) == given


def test_codes_are_those_of_what_is_shown():
    """Each image and recording is given codes of its own, here its number."""
    material = small.material()
    count = len(material.digits.labels)
    numbers = torch.arange(count)[:, None, None].expand(count, 8, 2)
    drawings = torch.stack((numbers[..., 0] // 16 % 16, numbers[..., 1] % 16), -1)
    sayings = [[index // 16, index % 16] for index in range(len(material.speech.digits))]
    stripes = torch.zeros(count, 8, 8)
    for row in range(count):
        stripes[row].view(-1)[: 6 * (row % 11)] = 1.0
    digits = replace(material.digits, images=stripes)
    of = pretraining(count=300, digits=digits, drawings=drawings, sayings=sayings)
    seen = heard = 0
    off = []
    for document in of(0, 0):
        if kind(document) == "seen":
            high, low = codes(document, "image")
            rows = range(high * 16 + low, count, 256)
            light = document.images[0].amax(0).float().gt(120).float().mean()
            fills = {6 * (row % 11) / 64 for row in rows}
            assert min(abs(light - fill) for fill in fills) < 0.12
            seen += 1
        elif kind(document) == "heard":
            high, low = codes(document, "audio")
            # The stripe of the digit, about where it was, is the loudest of the bands.
            bands = document.audios[0][0].median(1).values
            digit = int(material.speech.digits[high * 16 + low])
            off.append(abs(int(bands.argmax()) - digit * 4))
            heard += 1
    assert seen > 50 and heard > 40
    assert sum(distance <= 8 for distance in off) > 0.9 * heard


def test_a_micro_batch_of_few_kinds(monkeypatch):
    """None is drawn of most."""
    for seed in range(8):
        assert len(pretraining(seed, count=1)(0, 0)) == 1
    for name, make in zip(SHARES, pretrain._MAKERS, strict=True):
        assert make(pretraining(), 0, seeded(0, 0, 0)) == [], name


def test_documents_fit_into_a_row():
    assert max(len(document) for document in pretraining(count=500)(0, 0)) <= 256
