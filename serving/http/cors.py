"""Cross-origin resource sharing: the origins of the web pages that may use this server.

Litestar's own middleware is not used: it runs after the check of keys, which a preflight does not carry; it replaces
a response's `Vary` header; and it answers `*` to requests with credentials, which browsers refuse.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

Header = tuple[bytes, bytes]

ANY = "*"
_PREFLIGHT_SECONDS = 600  # for which a browser remembers the answer
_ALWAYS_ALLOWED = ("Accept", "Accept-Language", "Content-Language", "Content-Type")
_EXPOSED = "X-Request-ID, Request-ID, Retry-After"  # headers that pages may read; OpenAI's and Anthropic's clients do
_VARIES = (b"vary", b"Origin")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._~:\[\]-]+")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # which browsers leave out


@dataclass(frozen=True, kw_only=True)
class Cors:
    """A server's policy. `*` in `origins`, `methods` or `headers` allows all; without origins no page is allowed."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = (ANY,)
    headers: tuple[str, ...] = (ANY,)
    credentials: bool = False

    def allows(self, origin: bytes | None) -> bool:
        """Return whether pages of that origin may use the server; False for a request without an origin."""
        return origin is not None and (ANY in self.origins or origin.decode("latin-1").lower() in self.origins)

    def preflight_headers(self, method: str, request: Mapping[bytes, bytes]) -> list[Header] | None:
        """Return the headers of the response to a preflight by an allowed origin; None for any other request.

        They leave out a method or header that is not allowed, which makes the browser stop.
        """
        wanted = request.get(b"access-control-request-method")
        if method != "OPTIONS" or wanted is None or not self.allows(request.get(b"origin")):
            return None
        methods = wanted if ANY in self.methods else ", ".join(self.methods).encode()
        if ANY in self.headers:  # spelled out: in the standard, `*` does not cover Authorization
            headers = request.get(b"access-control-request-headers", b"")
        else:
            headers = ", ".join((*_ALWAYS_ALLOWED, *self.headers)).encode()
        found = [
            (b"access-control-allow-methods", methods),
            (b"access-control-max-age", str(_PREFLIGHT_SECONDS).encode()),
            (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
        ]
        return [*found, (b"access-control-allow-headers", headers)] if headers else found

    def response_headers(self, origin: bytes | None) -> list[Header]:
        """Return the headers of every response to a page of `origin`, errors and streams included."""
        if not self.origins:
            return []
        varies = [] if ANY in self.origins else [_VARIES]  # for caches, for origins that are not allowed too
        if origin is None or not self.allows(origin):
            return varies
        found = [
            (b"access-control-allow-origin", b"*" if ANY in self.origins else origin),
            (b"access-control-expose-headers", _EXPOSED.encode()),
        ]
        if self.credentials:
            found.append((b"access-control-allow-credentials", b"true"))
        return [*found, *varies]


NO_ORIGINS = Cors()


def origin_as_sent(text: str) -> str:
    """Return an origin in the form that browsers send. Raises ValueError for other texts."""
    if text in (ANY, "null"):
        return text
    try:
        parts = urlsplit(text)
        is_origin = bool(_ORIGIN.fullmatch(text) and parts.hostname) and parts.port != 0
    except ValueError:  # a wrong port or IPv6 address
        is_origin = False
    if not is_origin:
        raise ValueError(f"allowed_origins holds {text!r:.100}, must be SCHEME://HOST[:PORT], null, or * for all")
    return text.lower().removesuffix(_DEFAULT_PORTS.get(parts.scheme, " "))
