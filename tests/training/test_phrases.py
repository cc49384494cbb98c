"""Are all questions and answers right, and are numbers read from any answer?"""

import re

import pytest

from mmkernels.training import phrases
from mmkernels.training.phrases import DIGITS, NUMBERS, QUESTIONS, TASKS, numbers_in


def test_numbers_are_in_order():
    assert len(NUMBERS) == len(set(NUMBERS)) == 19
    assert [NUMBERS.index(word) for word in ("zero", "nine", "ten", "thirteen", "eighteen")] == [
        0, 9, 10, 13, 18,
    ]  # fmt: skip
    assert len(DIGITS) == 10


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("Nothing at all.", []),
        ("I see a seven.", [7]),
        ("Seven plus FIVE is twelve.", [7, 5, 12]),
        ("It reads zero one eight.", [0, 1, 8]),
        ("7 plus 5 is 12.", [7, 5, 12]),
        ("sixteen, not six; fourteen, not four", [16, 6, 14, 4]),
        ("seventyseven sevens phone tone often", []),
        ("one-two", [1, 2]),
        ("007", [7]),
        ("nineteen", []),
        ("two\nthree", [2, 3]),
    ],
)
def test_numbers_in(text, numbers):
    assert numbers_in(text) == numbers


def test_every_task_has_questions():
    assert set(QUESTIONS) == {*TASKS, "draw plain"} - {"talk"}
    for task, questions in QUESTIONS.items():
        assert len(set(questions)) == len(questions) > 1, task
        for question in questions:
            fields = set(re.findall(r"{(\w*)}", question))
            want = {"draw": {"digit", "colour"}, "draw plain": {"digit"}, "say": {"digit"}}
            assert fields == want.get(task, set()), question


def test_no_question_belongs_to_two_tasks():
    every = [question for questions in QUESTIONS.values() for question in questions]
    assert len(every) == len(set(every))
    assert not {question for question, _ in phrases.talk()} & set(every)


def test_talk_gives_one_answer_to_each_question():
    pairs = phrases.talk()
    assert len({question for question, _ in pairs}) == len(pairs)
    assert not any("{" in question + answer for question, answer in pairs)


def test_talk_is_right():
    """Sums, neighbours and the larger of two, worked out from the words of the question."""
    checked = 0
    for question, answer in phrases.talk():
        asked, told = numbers_in(question), numbers_in(answer)
        if not asked:
            assert (question, answer) in phrases._TALK
            continue
        checked += 1
        if "plus" in question or "Add" in question:
            assert told == [*asked, sum(asked)]
        elif "after" in question or "follows" in question:
            assert told == [asked[0] + 1]
        elif "before" in question:
            assert told == [asked[0] - 1]
        else:
            assert re.search("larger|more", question)
            assert told == [max(asked)] and asked[0] != asked[1]
    assert checked == 100 * 3 + 10 * 2 + 9 * 2 + 90 * 2


def test_talk_is_a_list_of_its_own():
    phrases.talk().clear()
    assert phrases.talk()
