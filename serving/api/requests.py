"""From a checked request to a call in the engine: what chat and plain completions do alike."""

from collections.abc import Sequence

from litestar import Request

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.api.call import Call
from dispec.serving.api.kv_transfer import transfer
from dispec.serving.api.prompts import Prompt
from dispec.serving.api.protocol import Sampling
from dispec.serving.api.service import ApiContext
from dispec.serving.http.errors import ApiError, invalid

_ID_LENGTH = 128
_PRIORITY = 2**31


def begin(
    service: ApiContext, request: Request, body: Sampling, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> Call:
    """Hand the prompts to the engine. Raises what the engine's client does, and ApiError."""
    settings = service.settings
    if len(prompts) > settings.max_queued_requests:
        raise invalid("prompt", f"prompt holds {len(prompts)} prompts, must be at most {settings.max_queued_requests}")
    priority = body.priority or 0
    if not -_PRIORITY <= priority < _PRIORITY:
        raise invalid("priority", f"priority is {priority}, must be between {-_PRIORITY} and {_PRIORITY - 1}")
    try:
        slo = settings.find_slo(body.slo)
    except ValueError as error:
        raise ApiError(400, str(error), param="slo") from None
    return Call(
        service.client,
        request_id(request, body.request_id),
        prompts,
        params,
        priority=priority,
        cache_salt=body.cache_salt,
        timeout=settings.request_timeout,
        slo=slo,
        transfer=transfer(body.kv_transfer_params, service.open_model().info, settings.role, len(prompts)),
    )


def request_id(request: Request, given: str | None) -> str:
    """The id of the request, which a header may have given, or the body: then it is the one from here on."""
    if given:
        if len(given) > _ID_LENGTH or not given.isascii() or not given.isprintable() or " " in given:
            must_be = f"must be at most {_ID_LENGTH} printable ASCII characters"
            raise invalid("request_id", f"request_id is {given!r:.50}, {must_be}")
        request.scope["state"]["request_id"] = given
    return request.scope["state"]["request_id"]


def stream_usage(body: Sampling) -> tuple[bool, bool]:
    """Whether a stream tells what was used at its end, and with every chunk."""
    options = body.stream_options
    at_end = bool(options and options.include_usage)
    return at_end, at_end and bool(options and options.continuous_usage_stats)
