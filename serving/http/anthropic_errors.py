"""Errors in the shape that Anthropic's clients read: {"type": "error", "error": {"type", "message"}, "request_id"}."""

import msgspec

_MESSAGES = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, tag_field="type", tag="error"):
    error: AnthropicErrorDetail
    request_id: str


def is_anthropic_path(path: str) -> bool:
    """Return whether the clients of a route are Anthropic's, those of unknown routes below /v1/messages included."""
    return path == _MESSAGES or path.startswith(f"{_MESSAGES}/")


def anthropic_error_body(status: int, message: str, request_id: str) -> bytes:
    """Return the JSON of an error. Anthropic's own status for overload, 529, is 503 here, which clients retry as well.

    Proxies and load balancers know 503 and its `Retry-After`.
    """
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return msgspec.json.encode(AnthropicErrorBody(AnthropicErrorDetail(kind, message), request_id))
