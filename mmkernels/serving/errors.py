"""What goes wrong in a conversation, with the HTTP status that says so."""

from typing import Any

__all__ = ["BadRequest", "Closing", "Overloaded", "ServingError", "TimedOut"]


class ServingError(Exception):
    """A conversation that has no answer.

    Args:
        message: what is wrong, what was wanted, and what helps.
        param: the part of the request that it is about, as "messages[0].content[1]".
        code: a short name of it for programs.

    Attributes:
        status: of HTTP.
        kind: OpenAI's name for this class of errors.
    """

    status = 500
    kind = "server_error"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's interface says it."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class BadRequest(ServingError, ValueError):
    """The request cannot be answered as it is.

    Args:
        message: as of `ServingError`.
        param: likewise.
        code: likewise.
        status: 400, or what says it better.
    """

    kind = "invalid_request_error"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        status: int = 400,
    ) -> None:
        super().__init__(message, param, code)
        self.status = status


class Overloaded(ServingError):
    """As many requests are waiting as may; a later try will do.

    Attributes:
        retry_after: seconds until then.
    """

    status = 429
    kind = "rate_limit_error"
    retry_after = 1


class Closing(ServingError):
    """The engine is shutting down."""

    status = 503
    kind = "server_error"


class TimedOut(ServingError):
    """The answer was not finished in the time that it had."""

    status = 504
    kind = "timeout_error"
