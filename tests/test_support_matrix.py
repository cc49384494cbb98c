"""Is README's support matrix what the backends say, about every operation?"""

import pytest

from mmkernels._core import registry, triton_runtime
from tools import support_matrix
from tools.generated import replaced

DEVICES = pytest.mark.parametrize("device", support_matrix.LEFT_OUT)


def needs_triton(device: str) -> None:
    """What serves CUDA tensors depends on it."""
    if device == "cuda" and (reason := triton_runtime.import_error()):
        pytest.skip(reason)


@DEVICES
def test_readme_shows_it(device):
    needs_triton(device)
    readme = support_matrix.README.read_text()
    assert support_matrix.matrix(device) in readme, "run python -m tools.support_matrix"


def test_readme_shows_nothing_else():
    needs_triton("cuda")
    readme = support_matrix.README.read_text()
    assert readme == replaced(readme, "support matrix", support_matrix.block())


@DEVICES
def test_every_operation_has_a_row(device):
    needs_triton(device)
    asked = {one.op for _, explanations in support_matrix.answers(device) for one in explanations}
    assert asked == set(registry.operations())


@DEVICES
def test_every_backend_has_a_column_or_a_sentence(device):
    needs_triton(device)
    names = {backend.name for op in registry.operations() for backend in registry.backends(op)}
    text = support_matrix.matrix(device)
    header, last = text.partition("\n")[0], text.rpartition("\n")[2]
    assert all((f"`{name}`" in header) != (f"`{name}`" in last) for name in names)


@DEVICES
def test_the_interpreter_changes_nothing(device, monkeypatch):
    needs_triton(device)
    texts = set()
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        texts.add(support_matrix.matrix(device))
    assert len(texts) == 1


@DEVICES
def test_a_backend_that_declines_is_shown_with_its_reason(device, monkeypatch):
    needs_triton(device)
    name = support_matrix.backends(device)[-1]
    declining = tuple(
        backend._replace(why_not=lambda *_: "it is Tuesday") if backend.name == name else backend
        for backend in registry.backends("attention_backward")
    )
    monkeypatch.setitem(registry._table, "attention_backward", declining)
    text = support_matrix.matrix(device)
    (line,) = (line for line in text.splitlines() if line.startswith("| float32 |"))
    assert line.endswith("| forward |")
    assert f"Why `{name}` declines:\n\n- it is Tuesday" in text


def test_text_without_the_comments_is_refused():
    with pytest.raises(ValueError, match="support matrix"):
        replaced("no comments here", "support matrix", "")
