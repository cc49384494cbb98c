"""A request's body, no larger than it may be, whatever it claims."""

import asyncio

from starlette.requests import Request

from mmkernels.serving.errors import BadRequest, TimedOut

# So much of a body that is too large is still taken off the line: a client that is cut off while it
# sends sees a broken connection, and not what it did wrong.
DRAIN_BYTES = 64 << 20


async def read_body(request: Request, most: int, timeout: float) -> bytes:
    """The bytes of a JSON body.

    Args:
        request: whose.
        most: how many bytes it may have.
        timeout: seconds within which they must have come.

    Raises:
        BadRequest: it is not declared as JSON, is compressed, or is too large (413).
        TimedOut: it did not come in time (408).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(
            f"Content-Type is {kind or 'missing'}; it must be application/json", "Content-Type"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise BadRequest(f"the body has Content-Encoding {encoding}; send it as it is")
    claim = request.headers.get("content-length", "")
    if claim.isdecimal() and int(claim) > most + DRAIN_BYTES:
        raise _too_large(most, f"claims {int(claim)} bytes")
    try:
        return await asyncio.wait_for(_read(request, most), timeout)
    except asyncio.TimeoutError as error:
        late = TimedOut(f"the body did not come within {timeout:g} seconds", code="timeout")
        late.status = 408
        raise late from error


async def _read(request: Request, most: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        else:
            chunks.clear()
        if size > most + DRAIN_BYTES:
            break
    if size > most:
        raise _too_large(most, f"has {size} bytes or more")
    return b"".join(chunks)


def _too_large(most: int, what: str) -> BadRequest:
    message = f"the body {what}; at most {most} are read. Send smaller images, sounds or texts"
    return BadRequest(message, code="request_too_large", status=413)
