"""Are generated blocks replaced between their comments, and nothing else?"""

import pytest

from tools.generated import replaced


def test_a_block_is_replaced_between_its_comments():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert replaced(text, "x", "new") == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n"


def test_a_missing_block_is_refused():
    with pytest.raises(ValueError, match="no block between '<!-- begin x -->'"):
        replaced("a\n<!-- begin x -->\nold\n", "x", "new")
