"""Is README's support matrix what the backends say, about every operation?"""

import pytest

from mmkernels._core import registry
from tools import support_matrix
from tools.generated import replaced


def test_readme_shows_it():
    readme = support_matrix.README.read_text()
    expected = replaced(readme, "support matrix", support_matrix.matrix())
    assert readme == expected, "run python -m tools.support_matrix"


def test_every_operation_has_a_row():
    asked = {explanation.op for row in support_matrix.rows() for explanation in row.explain()}
    assert asked == set(registry.operations())


def test_every_backend_has_a_column():
    names = {backend.name for op in registry.operations() for backend in registry.backends(op)}
    header = support_matrix.matrix().partition("\n")[0]
    assert all(f"`{name}`" in header for name in names)


def test_a_backend_that_declines_is_shown_with_its_reason(monkeypatch):
    def without(op, dtype_reason):
        return tuple(
            backend._replace(why_not=lambda *_: dtype_reason) if backend.name == "cpu" else backend
            for backend in registry.backends(op)
        )

    monkeypatch.setitem(
        registry._table, "attention_backward", without("attention_backward", "it is Tuesday")
    )
    text = support_matrix.matrix()
    assert "| float32 | `attention` | forward | yes |" in text
    assert "it is Tuesday" in text


def test_text_without_the_comments_is_refused():
    with pytest.raises(ValueError, match="support matrix"):
        replaced("no comments here", "support matrix", "")
