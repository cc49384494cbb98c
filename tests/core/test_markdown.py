"""Are tables valid Markdown, whatever is in a cell?"""

from mmkernels._core.markdown import aligned_table, table


def test_a_table_has_a_line_for_each_row():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_bar_within_a_cell_begins_no_column():
    assert table(["mask"], [["causal | spans"]]).endswith("\n| causal \\| spans |")


def test_columns_are_aligned():
    lines = aligned_table(("a", "long name"), [("much longer", "1"), ("b", "2")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| much longer | 1         |"
