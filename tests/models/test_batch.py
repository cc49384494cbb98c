"""Rows of documents: what stands where, and who sees whom."""

import pytest
import torch
from torch import Tensor

from mmkernels.models.batch import IGNORED, Batch
from mmkernels.models.chat_format import Document

IMAGE, AUDIO = 90, 91


def document(layout: str, learned: str = "") -> Document:
    """a letter is a token, a run of one digit an image, of one of !?. a sound."""
    made = Document()
    position = 0
    while position < len(layout):
        letter = layout[position]
        end = position + 1
        while not letter.isalpha() and layout[end : end + 1] == letter:
            end += 1
        if letter.isdigit():
            made.add_image(torch.zeros(3, 8, 8), IMAGE, end - position)
        elif not letter.isalpha():
            made.add_audio(torch.zeros(1, 40, 4), AUDIO, end - position)
        else:
            made.add([ord(letter) - ord("a")], letter in learned)
        position = end
    return made


def expected(row: list[str], seqlen: int) -> Tensor:
    """Who sees whom, pair by pair; padding sees itself alone, so that no row is without a key."""
    tokens = [
        (number, place, layout[place])
        for number, layout in enumerate(row)
        for place in range(len(layout))
    ]
    seen = torch.eye(seqlen, dtype=torch.bool)
    for i, (document_i, place_i, kind_i) in enumerate(tokens):
        for j, (document_j, place_j, kind_j) in enumerate(tokens):
            same_input = not kind_i.isalpha() and kind_i == kind_j
            seen[i, j] = document_i == document_j and (place_j <= place_i or same_input)
    return seen


# Within a document each input has a sign of its own; "1122" are two images side by side.
ROWS = [
    [["abc"]],
    [["abc", "de", "f"]],
    [["a111b"], ["ab"]],
    [["1122a", "11b"], ["a"]],
    [["a11!!!22b", "c", "!!..d"], ["11"]],
    [["11", "11", "!!"], ["ab1a!b2c"]],
    [[], ["ab", "1"]],
]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_mask(rows: list[list[str]], padding: int) -> None:
    seqlen = max(sum(map(len, row)) for row in rows) + padding
    batch = Batch.of([[document(layout) for layout in row] for row in rows], seqlen)
    want = torch.stack([expected(row, seqlen) for row in rows])
    torch.testing.assert_close(batch.mask().to_dense(), want)


def test_tokens_stand_where_they_should() -> None:
    rows = [[document("ab11c"), document("22!d")], [document("e")]]
    batch = Batch.of(rows, 10)
    assert batch.ids.tolist() == [
        [0, 1, IMAGE, IMAGE, 2, IMAGE, IMAGE, AUDIO, 3, 0],
        [4] + [0] * 9,
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0] * 10]
    assert batch.documents.tolist() == [[0] * 5 + [1] * 4 + [-1], [0] + [-1] * 9]
    # Numbered in the row, so that neighbours in two documents are not taken for one input.
    assert batch.spans.tolist() == [[-1, -1, 0, 0, -1, 1, 1, 2, -1, -1], [-1] * 10]
    assert batch.adapted.tolist() == [[True] * 9 + [False], [False] * 10]
    assert batch.lengths.tolist() == [9, 1] and batch.lengths.dtype == torch.int32


def test_documents_with_inputs_are_told_from_those_without() -> None:
    batch = Batch.of([[document("ab"), document("c1"), document("d"), document("!e")]])
    assert batch.adapted[0].tolist() == [False, False, True, True, False, True, True]


def test_inputs_keep_the_order_of_their_placeholders() -> None:
    documents = [document("11!!22"), document("33")]
    batch = Batch.of([documents, [document("!")]])
    assert [id(x) for x in batch.images] == [id(x) for d in documents for x in d.images]
    assert len(batch.audios) == 2
    again = Batch.of([documents, []])  # documents are left as they were
    assert again.spans.tolist()[0] == batch.spans.tolist()[0]


def test_the_target_is_the_next_token_of_the_same_document() -> None:
    # b and c are learned of the first, d of the second, whose first token nothing predicts.
    row = [document("abc", "bc"), document("de", "d"), document("fg", "g")]
    batch = Batch.of([row], 9)
    no = IGNORED
    assert batch.targets.tolist() == [[1, 2, no, no, no, 6, no, no, no]]


def test_a_token_after_an_image_is_predicted_from_its_last_placeholder() -> None:
    batch = Batch.of([[document("a11b", "b")]])
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 1, IGNORED]]


def test_a_row_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a row has 5 tokens; seqlen is 4"):
        Batch.of([[document("ab")], [document("abc"), document("de")]], 4)


@pytest.mark.parametrize("rows", [[], [[]], [[], []], [[Document()]]])
def test_rows_without_tokens(rows: list[list[Document]]) -> None:
    batch = Batch.of(rows)
    assert batch.ids.shape == (len(rows), 0) and batch.targets.shape == (len(rows), 0)
    padded = Batch.of(rows, 3)
    assert padded.ids.shape == (len(rows), 3)
    assert (padded.targets == IGNORED).all() and (padded.documents == -1).all()


def test_everything_moves() -> None:
    batch = Batch.of([[document("a1!b", "b")]])
    moved = batch.to("meta")
    assert all(x.is_meta for x in vars(moved).values() if isinstance(x, Tensor))
    assert all(x.is_meta for x in (*moved.images, *moved.audios))
    assert len(vars(moved)) == len(vars(batch))
