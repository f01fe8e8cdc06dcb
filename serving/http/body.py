"""Reads the body of a request within limits of size, time and type."""

import asyncio

from litestar import Request

from dispec.serving.http.errors import ApiError, ClientLeft

_UNSUPPORTED = "unsupported_media_type"
_DISCARDED_BYTES = 64 * 2**20  # read past the limit, because clients read no response before they have sent all


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """Return the whole body. Raises ApiError: status 415 if it is not plain JSON, 413 if it is longer than `limit`
    bytes, 408 if it is too slow.
    """
    _check_content(request)
    try:
        async with asyncio.timeout(timeout):
            return await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {timeout:g} s to arrive", code="timeout") from None


def _check_content(request: Request) -> None:
    """Raise ApiError unless the body is JSON in UTF-8, not compressed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(
            415,
            f"the body's content encoding is {coding!r:.50}, must be left out: bodies are not decompressed",
            code=_UNSUPPORTED,
            headers={"Accept-Encoding": "identity"},
        )
    kind, options = request.content_type
    charset = options.get("charset", "utf-8").lower()
    if not kind:
        # Command-line tools leave the type out. A web page must not, because its browser then sends no preflight.
        is_json = "origin" not in request.headers
    else:
        is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    if not is_json or charset not in ("utf-8", "utf8", "us-ascii"):
        given = request.headers.get("content-type", "missing")
        raise ApiError(
            415,
            f"the body's content type is {given:.100}, must be application/json in UTF-8",
            code=_UNSUPPORTED,
            headers={"Accept": "application/json"},
        )


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
        if not message.get("more_body", False) or size > limit + _DISCARDED_BYTES:
            break
    if size > limit:
        raise ApiError(413, f"the body holds {size} bytes or more, must be at most {limit}")
    return b"".join(parts)
