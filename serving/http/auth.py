"""Who may ask. With keys set, every route is closed without one, known or unknown, but those that prove liveness."""

import base64
import binascii
import hmac
from collections.abc import Iterable

OPEN_PATHS = frozenset({"/live", "/ping"})
_PAGES = ("/dashboard", "/docs", "/schema")  # what people open in a browser, which asks them for the key by itself


class Keys:
    """The keys of a server. A client sends one as a bearer token, or a browser as the password of basic access."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def allow(self, path: str, authorization: bytes | None) -> bool:
        if not self._keys or path in OPEN_PATHS:
            return True
        given = _credential(authorization or b"")
        # All of them, at the same pace: how long it takes shall tell nothing about any of them.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)

    @staticmethod
    def challenge(path: str) -> str:
        """The WWW-Authenticate header that goes with a refusal."""
        return 'Basic realm="dispec: any name, and the API key"' if path.startswith(_PAGES) else "Bearer"


def _credential(authorization: bytes) -> bytes:
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
