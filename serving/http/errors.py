"""Errors in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}.

Routes of Anthropic's API have the shape of `serving.http.anthropic_errors`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException

from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.serving.client.errors import (
    RETRY_SECONDS,
    EngineDied,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RequestTimedOut,
    Unavailable,
)
from dispec.serving.http.anthropic_errors import anthropic_error_body, is_anthropic_path

log = logging.getLogger("dispec.server")

CLIENT_LEFT = 499  # for the access log

_MAX_LOGGED = 200  # characters of a message
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    503: "service_unavailable",
    504: "timeout",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """An error response. `param` is the request's field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
        self.detail = ErrorDetail(message, kind, param, code or _CODES.get(status))
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    def body(self, scope: Mapping[str, Any] | None = None) -> bytes:
        """Return the JSON in the shape of the request's route; in OpenAI's without a `scope`."""
        if scope is not None and is_anthropic_path(scope["path"]):
            return anthropic_error_body(self.status, self.detail.message, scope["state"]["request_id"])
        return msgspec.json.encode(ErrorBody(self.detail))


class ClientLeft(ApiError):
    """The client has disconnected, so that no response can be read."""

    def __init__(self) -> None:
        super().__init__(CLIENT_LEFT, "the client closed the connection")


def to_api_error(error: BaseException) -> ApiError:
    """Return the response to an error. The message of an unexpected one is for the log alone."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case Unavailable():
            code = "overloaded" if isinstance(error, Overloaded) else "not_ready"
            return ApiError(503, message, code=code, retry_after=error.retry_after)
        case RequestTimedOut():
            return ApiError(504, message)
        case EngineDied():
            return ApiError(503, message, code="engine_died", retry_after=RETRY_SECONDS)
        case EngineFailed():
            return ApiError(500, message, code="engine_error")
        case HTTPException():  # some are ValueErrors
            return _of_litestar(error)
        case InvalidField() | InvalidRequest():
            is_overflow = isinstance(error, ContextOverflow)
            return ApiError(400, message, param=error.field, code="context_length_exceeded" if is_overflow else None)
        case ValueError():
            return ApiError(400, message)
    name = type(error).__name__
    return ApiError(500, f"internal error ({name}): the server's log says more", code="internal_error")


def _of_litestar(error: HTTPException) -> ApiError:
    status = error.status_code
    if status == 404:
        return ApiError(404, "there is no such route: see /schema/openapi.json for those that there are")
    if status == 405:
        return ApiError(405, "this route does not take that method", headers=error.headers)
    if status < 500:
        return ApiError(status, error.detail)
    return ApiError(status, "internal error: the server's log says more", code="internal_error")


def handle_error(request: Request, error: Exception) -> Response:
    """Return the response to an error: the exception handler for Litestar's errors and for ours."""
    found = to_api_error(error)
    log_error(request.scope, found, error)
    body = found.body(request.scope)
    return Response(body, status_code=found.status, headers=found.headers, media_type="application/json")


def log_error(scope: Mapping, found: ApiError, error: Exception) -> None:
    """Add the error to the request's line in the access log; log the traceback of an unexpected one."""
    state = scope["state"]
    message = found.detail.message
    state.setdefault("log", {})["error"] = message[:_MAX_LOGGED]
    if found.status == 500:
        log.error("%s", message, exc_info=error, extra={"request_id": state.get("request_id")})
