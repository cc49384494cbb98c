"""Is fine-tuning on the assistant's words alone, in the shares that were asked for?"""

import collections

import pytest
import torch

for library in ("tokenizers", "safetensors", "sklearn"):
    pytest.importorskip(library)

from mmkernels.training import finetune  # noqa: E402 (may be absent)
from mmkernels.training.examples import make  # noqa: E402
from mmkernels.training.finetune import Finetuning  # noqa: E402
from mmkernels.training.recipes import LOOK, SHARES  # noqa: E402
from mmkernels.training.stages import pack  # noqa: E402
from tests.training import small  # noqa: E402
from tests.training.test_pretrain import same  # noqa: E402

MODEL = small.model()
TOKENIZER, VOCABULARY = MODEL.tokenizer, MODEL.vocabulary
ASSISTANT = [TOKENIZER.start, *TOKENIZER.encode("assistant\n")]


def finetuning(shares=SHARES, seed=0, count=50):
    return Finetuning(MODEL, small.material(), shares, seed, count)


def turns(document):
    """[(role, first and end of what it says, with the mark that ends it)]."""
    found, place = [], 0
    while place < len(document):
        assert document.ids[place] == TOKENIZER.start
        end = document.ids.index(TOKENIZER.end, place)
        found.append((place, end + 1))
        place = end + 1 + len(TOKENIZER.encode("\n"))
    return found


def test_only_the_assistants_tokens_are_learned():
    answers = 0
    for document in finetuning(count=200)(0, 0):
        want = [False] * len(document)
        for begin, end in turns(document):
            if document.ids[begin : begin + len(ASSISTANT)] == ASSISTANT:
                want[begin + len(ASSISTANT) : end] = [True] * (end - begin - len(ASSISTANT))
                answers += 1
        assert document.learned == want
    assert answers == 200


def test_what_is_shown_and_played_is_never_learned():
    batch = pack(finetuning(count=100)(0, 0), 256)
    targets = batch.targets[batch.targets >= 0]
    assert int(targets.max()) < VOCABULARY.size
    assert not set(targets.tolist()) & {VOCABULARY.image_patch, VOCABULARY.audio_patch}


def test_documents_follow_from_seed_step_and_micro_batch_alone():
    first = [finetuning(count=12)(step, micro) for step in range(3) for micro in range(2)]
    for index in (4, 1, 5, 0, 2, 3):
        torch.manual_seed(index)
        again = finetuning(count=12)(*divmod(index, 2))
        assert all(same(*pair) for pair in zip(first[index], again, strict=True))
    every = [tuple(tuple(document.ids) for document in some) for some in first]
    assert len(set(every)) == 6
    others = tuple(tuple(document.ids) for document in finetuning(seed=1, count=12)(0, 0))
    assert others not in every


@pytest.mark.parametrize("shares", [SHARES, LOOK, {"talk": 3.0, "say": 1.0}], ids=str)
def test_tasks_have_their_shares(shares, monkeypatch):
    drawn = []

    def noted(tasks, material, generator):
        drawn.extend(tasks)
        return make(["talk"] * len(tasks), material, generator)

    monkeypatch.setattr(finetune, "make", noted)
    of = finetuning(shares, count=1000)
    for step in range(4):
        of(step, 0)
    found = collections.Counter(drawn)
    assert set(found) == set(shares)
    for task, share in shares.items():
        share /= sum(shares.values())
        assert abs(found[task] - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("count", [1, 9, 10, 50, 96])
def test_every_question_is_asked_once(count):
    """A tenth of them is followed by another one."""
    documents = finetuning(count=count)(0, 0)
    answers = [
        sum(
            document.ids[begin : begin + len(ASSISTANT)] == ASSISTANT
            for begin, _ in turns(document)
        )
        for document in documents
    ]
    assert sum(answers) == count
    assert answers.count(2) == int(count * finetune.TWO_TURNS)
    assert set(answers) <= {1, 2}


def test_documents_fit_into_a_row():
    assert max(len(document) for document in finetuning(count=400)(0, 0)) <= 256
