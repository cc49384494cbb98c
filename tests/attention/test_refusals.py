"""Does a backend that is wrong, or cannot, say so, and leave everything as it was?"""

import pytest

import mmkernels as mm
from tests.attention.right_calls import (
    SK,
    SQ,
    attention,
    decode,
    ones,
)


def chosen() -> str | None:
    q = ones(1, 2, 1, 8)
    return mm.explain(mm.attention, q, q, q).backend


def test_is_a_refused_use_backend_without_effect():
    before = chosen()
    with pytest.raises(ValueError):
        mm.use_backend("flash")
    assert chosen() == before


def test_does_use_backend_end_with_its_block_even_after_an_error():
    before = chosen()
    for name in ("reference", "cpu"):
        with pytest.raises(ZeroDivisionError), mm.use_backend(name):
            assert chosen() == name
            raise ZeroDivisionError
    assert chosen() == before


DECLINED = {
    "softcap": lambda **kw: attention(softcap=3.0, backend="cpu", **kw),
    "dropout_p": lambda **kw: attention(dropout_p=0.5, backend="cpu", **kw),
    "bias needs a gradient": lambda **kw: attention(
        bias=ones(SQ, SK, requires_grad=True), backend="cpu", **kw
    ),
    "softcap:": lambda **kw: decode(softcap=3.0, backend="cpu", **kw),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_does_a_forced_backend_that_declines_say_why_and_what_auto_would_take(reason):
    with pytest.raises(mm.BackendUnavailable) as raised:
        DECLINED[reason]()
    error, text = raised.value, str(raised.value)
    assert error.backend == "cpu" and reason in error.reasons["cpu"]
    assert error.reasons["reference"] is None
    assert "backend='cpu'" in text and "auto" in text and "'reference'" in text
    for name, why in error.reasons.items():
        assert name in text and (why or "serves this call") in text


@pytest.mark.parametrize("call", [attention, decode])
def test_does_a_backend_for_gpus_decline_cpu_tensors(call):
    for name in ("cuda", "sdpa"):
        with pytest.raises(mm.BackendUnavailable) as raised:
            call(backend=name)
        assert raised.value.reasons[name]
        assert "auto" in str(raised.value) and "'cpu'" in str(raised.value)


# Odd inputs that are right.
