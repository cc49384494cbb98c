"""Which backend runs an operation.

A backend of an operation is a plain function with the operation's arguments (all but the trailing
`backend`) beside `why_not`, which takes the same arguments and returns None if the backend can
serve them, else the reason. `only_by_name` does the same for calls that it can serve and that
"auto" had better give to another. A choice by name comes from the `backend=` argument, else
`use_backend`, else the environment variable MMKERNELS_BACKEND (read at import); otherwise "auto"
takes the first backend in order of preference that does not decline.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmkernels.errors import BackendUnavailable, reason_table

# Fastest first. `reference` declines nothing.
PREFERENCE = ("cuda", "triton", "sdpa", "cpu", "reference")


class Backend(NamedTuple):
    """One way to run an operation."""

    name: str
    fn: Callable[..., Any]
    why_not: Callable[..., str | None]
    only_by_name: Callable[..., str | None]

    def declines(self, requested: str, inputs: tuple) -> str | None:
        """Why this backend does not serve a request for `requested` ("auto" or a name)."""
        reason = self.why_not(*inputs)
        if reason is None and requested != self.name:
            reason = self.only_by_name(*inputs)
        return reason


def _never(*inputs: object) -> None:
    """Nothing is served by name alone."""


_table: dict[str, tuple[Backend, ...]] = {}
_planners: dict[Callable[..., Any], Callable[..., "Explanation"]] = {}
_default = os.environ.get("MMKERNELS_BACKEND", "auto")


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    why_not: Callable[..., str | None],
    only_by_name: Callable[..., str | None] = _never,
) -> None:
    """Adds backend `name` to operation `op`; called once, at the end of a backend's file."""
    others = [backend for backend in _table.get(op, ()) if backend.name != name]
    ordered = sorted(
        [*others, Backend(name, fn, why_not, only_by_name)],
        key=lambda backend: PREFERENCE.index(backend.name),
    )
    _table[op] = tuple(ordered)


def operations() -> tuple[str, ...]:
    """The names of all operations that have a backend."""
    return tuple(_table)


def backends(op: str) -> tuple[Backend, ...]:
    """The backends of `op`, in order of preference."""
    return _table[op]


def requested(backend: str) -> str:
    """The backend a call asks for: its argument, else `use_backend` or MMKERNELS_BACKEND."""
    name = _default if backend == "auto" else backend
    if name != "auto" and name not in PREFERENCE:
        raise ValueError(
            f"backend is {name!r}; it must be 'auto' or one of {', '.join(PREFERENCE)}"
        )
    return name


def reasons(op: str, name: str, inputs: tuple) -> dict[str, str | None]:
    """Each backend's reason for declining a request for `name`, None where it would serve it."""
    return {backend.name: backend.declines(name, inputs) for backend in _table[op]}


def select(op: str, name: str, inputs: tuple) -> Callable[..., Any]:
    """The function that serves `inputs`: backend `name`, or for "auto" the first that can.

    Raises:
        BackendUnavailable: the named backend declines or does not exist for `op`.
    """
    for backend in _table[op]:
        if name in ("auto", backend.name) and backend.declines(name, inputs) is None:
            return backend.fn
    table = reasons(op, name, inputs)
    table.setdefault(name, f"mmkernels has no {name} backend for {op}")
    raise BackendUnavailable(op, name, table)


class use_backend:
    """Makes `name` the backend of every call that does not pass one.

    Takes effect at once and, used as a context manager, is undone at its end. Process-wide, like
    `torch.nn.attention.sdpa_kernel`; a compiled function that was traced under another choice is
    traced again.

    Args:
        name: "auto" or a backend's name.

    Raises:
        ValueError: there is no such backend.
    """

    def __init__(self, name: str) -> None:
        self.name = "auto" if name == "auto" else requested(name)
        self.previous = _default
        self._set()

    def _set(self) -> None:
        global _default
        _default = self.name

    def __enter__(self) -> None:
        if _default != self.name:  # entered again, or later than made
            self.previous = _default
            self._set()

    def __exit__(self, *_: object) -> None:
        global _default
        _default = self.previous


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        op: the operation.
        backend: name of the backend that would run; None if the requested one cannot.
        reasons: backend name -> why it declines, or None where it could serve the call.
        backward: the same for the backward pass, where the call would need one.
    """

    op: str
    backend: str | None
    reasons: Mapping[str, str | None]
    backward: "Explanation | None" = None

    def __str__(self) -> str:
        text = f"{self.op}: {self.backend or 'no backend'}\n{reason_table(self.reasons)}"
        return f"{text}\n{self.backward}" if self.backward else text


def explain_op(
    op: str, name: str, inputs: tuple, backward: Explanation | None = None
) -> Explanation:
    """The `Explanation` for one operation and its checked inputs."""
    table = reasons(op, name, inputs)
    if name == "auto":
        chosen = next((key for key, reason in table.items() if reason is None), None)
    else:
        table.setdefault(name, f"mmkernels has no {name} backend for {op}")
        chosen = name if table[name] is None else None
    return Explanation(op, chosen, table, backward)


def explainable(function: Callable[..., Any], planner: Callable[..., Explanation]) -> None:
    """Registers how `explain` answers for a public function: `planner` takes the same arguments."""
    _planners[function] = planner


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call would run on, and why every other declines; runs nothing.

    Args:
        function: a public operator, e.g. ``mmkernels.attention``.
        *args: the call's positional arguments.
        **kwargs: the call's keyword arguments, `backend` among them.

    Returns:
        An `Explanation`; print it for a table. It has op, the operation; backend, the one that
        would run, or None; reasons, by backend why it declines, or None where it could serve; and
        backward, the same for the backward pass, where the call would need one.

    Raises:
        TypeError: `function` is not an operator of mmkernels.
        ValueError: the arguments are ones that `function` itself refuses.
    """
    planner = _planners.get(function) if callable(function) else None
    if planner is None:
        raise TypeError(
            f"function is {function!r}; explain wants one of mmkernels' own: "
            f"{', '.join(f.__name__ for f in _planners)}. Call it as explain(mmkernels.attention, "
            "q, k, v)."
        )
    return planner(*args, **kwargs)
