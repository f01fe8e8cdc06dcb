"""API keys. With keys set, every route needs one, unknown routes too, except those that prove liveness and readiness.

Probes of containers, load balancers and routers carry no key.
"""

import base64
import binascii
import hmac
from collections.abc import Iterable

OPEN_PATHS = frozenset({"/health", "/live", "/ping"})
_PAGES = ("/dashboard", "/docs", "/schema", "/metrics")  # pages, for which a browser asks for the key


class Keys:
    """The keys of a server.

    OpenAI's clients send one as a bearer token, Anthropic's as `x-api-key`, and browsers as the password of basic
    authentication.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def allow(self, path: str, authorization: bytes | None, x_api_key: bytes | None = None) -> bool:
        """Return whether a request with these headers may use the path: either may have the key."""
        if not self._keys or path in OPEN_PATHS:
            return True
        given = (_credential(authorization or b""), (x_api_key or b"").strip())
        # All keys are compared, in constant time, so that the time tells nothing about them.
        matches = [hmac.compare_digest(credential, key) for credential in given for key in self._keys]
        return any(matches)

    @staticmethod
    def challenge(path: str) -> str:
        """Return the WWW-Authenticate header of a refusal."""
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
