"""The exceptions of the package that are not plain `ValueError` or `TypeError`."""

from collections.abc import Mapping


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call.

    Attributes:
        op: name of the operation, e.g. ``"attention_forward"``.
        backend: the backend that was asked for.
        reasons: backend name -> why it declines, or ``None`` where it would serve the call.
    """

    def __init__(self, op: str, backend: str, reasons: Mapping[str, str | None]) -> None:
        self.op, self.backend, self.reasons = op, backend, dict(reasons)
        fallback = next((name for name, reason in reasons.items() if reason is None), None)
        fix = (
            f"backend='auto' would take {fallback!r}"
            if fallback
            else "no backend serves this call: change the inputs as the reasons say"
        )
        super().__init__(
            f"{op}: backend={backend!r} cannot serve this call; {fix}.\n{reason_table(reasons)}"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.op, self.backend, self.reasons)


def reason_table(reasons: Mapping[str, str | None]) -> str:
    """One line a backend, in order of preference: its name and "serves this call" or why not."""
    width = max(map(len, reasons), default=0)
    return "\n".join(
        f"  {name:<{width}}  {reason or 'serves this call'}" for name, reason in reasons.items()
    )
