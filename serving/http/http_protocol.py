"""uvicorn's HTTP on httptools, which is faster than h11 for events of streams, with bounded headers."""

import uuid
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dispec.serving.http.errors import ApiError


def closing_response(error: ApiError) -> bytes:
    """Return an error as bytes of HTTP that close the connection."""
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": uuid.uuid4().hex,
        "connection": "close",
        **{name.lower(): value for name, value in error.headers.items()},
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


class BoundedHttp(HttpToolsProtocol):
    """Closes a connection that sends more than `max_header_bytes` of headers or trailers: the parser keeps them all."""

    max_header_bytes: int
    _unfinished_bytes = 0

    @classmethod
    def with_limit(cls, max_header_bytes: int) -> "type[BoundedHttp]":
        """Return the protocol with that bound."""
        return type("BoundedHttp", (cls,), {"max_header_bytes": max_header_bytes})

    def data_received(self, data: bytes) -> None:
        self._unfinished_bytes += len(data)
        super().data_received(data)
        if self._unfinished_bytes > self.max_header_bytes and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def send_400_response(self, msg: str) -> None:
        """Send the application's shape of an error for a request that the parser refuses."""
        self.transport.write(closing_response(ApiError(400, msg)))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._unfinished_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished_bytes = 0
        super().on_message_complete()
