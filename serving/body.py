"""Reading the body of a request, which may be larger or slower than it should be."""

import asyncio

from litestar import Request

from serving.errors import ApiError, ClientLeft

_THROWN_AWAY = 64 * 2**20  # bytes that are read only so that the client gets to see the refusal


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """The whole body. Raises ApiError with status 413 if it is longer than `limit` bytes, 408 if it is too slow."""
    try:
        async with asyncio.timeout(timeout):
            return await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {timeout:g} s to arrive", code="timeout") from None


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")  # type: ignore[assignment]
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > limit + _THROWN_AWAY:
            break
    if size > limit:
        raise ApiError(413, f"the body holds {size} bytes or more, must be at most {limit}")
    return b"".join(parts)
