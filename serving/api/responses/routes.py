"""/v1/responses: create, retrieve, cancel and delete responses, and list the items that they answer.

The server keeps responses in its memory (`serving.api.responses.store`).
"""

import time
from typing import Any

import msgspec
from litestar import Request, delete, get, post
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import UNSET

from dispec.engine.errors import ContextOverflow
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.api.chat_generation import ChatGeneration
from dispec.serving.api.context import ApiContext, ServedModel, context_of
from dispec.serving.api.http_responses import OPENAI_STREAM, EventStream, JsonResponse, abort_on_disconnect
from dispec.serving.api.openapi import describe
from dispec.serving.api.responses.background import BackgroundResponse, Follower
from dispec.serving.api.responses.input_items import new_id, read_items, to_conversation
from dispec.serving.api.responses.protocol import DeletedResponse, InputItemList, Response, ResponsesRequest
from dispec.serving.api.responses.requests import check_request, own_names, to_chat_request, wants_logprobs
from dispec.serving.api.responses.run import ResponseRun, RunOptions
from dispec.serving.api.responses.store import StoredResponse, page_of
from dispec.serving.api.responses.truncation import drop_oldest_turns
from dispec.serving.client.errors import Overloaded
from dispec.serving.http.errors import ApiError

_STREAM = OPENAI_STREAM._replace(end=b"")
_MAX_PAGE, _DEFAULT_PAGE = 100, 20  # input items


@post("/v1/responses", status_code=200, **describe(ResponsesRequest, Response, streams=True, tag="Responses"))
async def create_response(request: Request) -> ASGIApp:
    """Answer a conversation of items. `previous_response_id` continues that of a response that the server keeps."""
    context = context_of(request)
    model = context.open_model()
    body = await context.body(request, ResponsesRequest)
    model.check_name(body.model)
    run = await _start(request, context, model, body)
    if body.background:
        request.scope["state"].setdefault("log", {}).update(run.log_fields())
        queued = JsonResponse(run.response)  # before the work begins
        background = BackgroundResponse(run, context.responses, keeps_events=bool(body.stream))
        return queued if background.events is None else _follow(context, background.events, background)
    if body.stream:
        return EventStream(run, run.events(), context.settings.keep_alive_seconds, _STREAM)
    return JsonResponse(await abort_on_disconnect(request.scope, request.receive, run, run.whole()))


@get("/v1/responses/{response_id:str}", **describe(None, Response, streams=True, tag="Responses"))
async def retrieve_response(request: Request, response_id: FromPath[str]) -> ASGIApp:
    """A response that the server keeps, or that is under way in the background.

    `?stream=true` repeats the events of a response that was created with `background` and `stream`, those to come
    included; `starting_after=NUMBER` leaves out the first ones.
    """
    context = context_of(request)
    query = request.query_params
    found = _find(context, response_id)
    _refuse_include(query)
    stream = query.get("stream", "false").lower()
    if stream not in ("true", "false"):
        raise ApiError(400, f"stream is {stream!r:.50}, must be true or false", param="stream")
    if stream == "false":
        if "starting_after" in query:
            raise ApiError(400, "starting_after is only for requests with stream true", param="starting_after")
        return JsonResponse(found.run.response if isinstance(found, BackgroundResponse) else found.body)
    if found.events is None:
        said = "stream is true, must be false for a response that was not created with background and stream"
        raise ApiError(400, said, param="stream")
    after = query.get("starting_after")
    first = 0 if after is None else _number(after, "starting_after", 0, 2**31) + 1
    return _follow(context, found.events, found if isinstance(found, BackgroundResponse) else None, first)


@post("/v1/responses/{response_id:str}/cancel", status_code=200, **describe(None, Response, tag="Responses"))
async def cancel_response(request: Request, response_id: FromPath[str]) -> ASGIApp:
    """End a response in the background. One that has ended is returned as it is."""
    found = _find(context_of(request), response_id)
    if isinstance(found, BackgroundResponse):
        await found.cancel()
        return JsonResponse(found.run.response)
    if not found.is_background:
        said = f"the response {response_id!r:.100} was not created with background, and so cannot be cancelled"
        raise ApiError(400, said, param="response_id")
    return JsonResponse(found.body)


@delete("/v1/responses/{response_id:str}", status_code=200, **describe(None, DeletedResponse, tag="Responses"))
async def delete_response(request: Request, response_id: FromPath[str]) -> ASGIApp:
    """Drop a response. One that is under way in the background is ended."""
    context = context_of(request)
    found = _find(context, response_id)
    if isinstance(found, BackgroundResponse):
        await found.delete()
    else:
        context.responses.delete(response_id)
    return JsonResponse(DeletedResponse(response_id))


@get("/v1/responses/{response_id:str}/input_items", **describe(None, InputItemList, tag="Responses"))
async def input_items(request: Request, response_id: FromPath[str]) -> ASGIApp:
    """The items that a response answers, those of earlier responses included, the last ones first.

    `order=asc` begins with the first one, `limit` (1 to 100) is the most on a page, and `after` is the id of the last
    one of the page before.
    """
    query = request.query_params
    found = _find(context_of(request), response_id)
    _refuse_include(query)
    limit = _number(query["limit"], "limit", 1, _MAX_PAGE) if "limit" in query else _DEFAULT_PAGE
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order is {order!r:.50}, must be asc or desc", param="order")
    items = found.run.items if isinstance(found, BackgroundResponse) else msgspec.json.decode(found.input_items)
    page, has_more = page_of(items, query.get("after"), limit, order)
    return JsonResponse(
        InputItemList(page, page[0]["id"] if page else None, page[-1]["id"] if page else None, has_more)
    )


async def _start(request: Request, context: ApiContext, model: ServedModel, body: ResponsesRequest) -> ResponseRun:
    """Submit a body, and return its run when the engine has accepted it. Raises as `ChatGeneration.start`."""
    store = context.responses
    check_request(body, store.max_responses)
    if body.background and len(store.running) >= store.max_responses:
        raise Overloaded(f"{len(store.running)} responses are under way in the background: wait for one of them")
    previous = store.conversation(body.previous_response_id) if body.previous_response_id else []
    items = read_items(body.input, store.find_item)
    conversation = to_conversation(body.instructions, previous, items)
    chat_request = to_chat_request(body, conversation.messages)
    with own_names(conversation.places):
        try:
            chat = await ChatGeneration.start(request, chat_request)
        except ContextOverflow:
            if body.truncation != "auto":
                raise
            await drop_oldest_turns(model, chat_request, conversation)
            chat = await ChatGeneration.start(request, chat_request)
        try:
            await chat.generation.accepted()
        except BaseException:
            chat.generation.abort()
            raise
    response = _new_response(body, model)
    response.store = body.store is not False and store.max_responses > 0
    if chat.generation.transfer.response:
        response.kv_transfer_params = chat.generation.transfer.response
    options = RunOptions(
        bool(body.stream),
        (body.top_logprobs or 0) if wants_logprobs(body) else None,
        response.store and not body.background,
    )
    return ResponseRun(request.scope, chat, response, [*previous, *items], store, options)


def _new_response(body: ResponsesRequest, model: ServedModel) -> Response:
    defaults = {"temperature": SamplingParams.temperature, "top_p": SamplingParams.top_p, **model.defaults}
    text = msgspec.to_builtins(body.text) if body.text is not None else {}
    form = text.get("format") or {"type": "text"}
    reasoning = body.reasoning
    return Response(
        id=new_id("resp"),
        created_at=int(time.time()),
        model=model.name,
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        store=False,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": None if reasoning is None else reasoning.effort, "summary": None},
        safety_identifier=body.safety_identifier,
        service_tier=None if body.service_tier is None else "default",
        temperature=defaults["temperature"] if body.temperature is None else body.temperature,
        text={"format": {name: value for name, value in form.items() if value is not None}},
        tool_choice=body.tool_choice or "auto",
        tools=[{"strict": None, **tool} for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults["top_p"] if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
        kv_transfer_params=UNSET,
    )


def _follow(context: ApiContext, events: Any, running: BackgroundResponse | None, first: int = 0) -> ASGIApp:
    follower = Follower(events, running, first)
    return EventStream(follower, follower.read(), context.settings.keep_alive_seconds, _STREAM)


def _find(context: ApiContext, response_id: str) -> BackgroundResponse | StoredResponse:
    """Return a response that is under way in the background or kept. Raises ApiError."""
    store = context.responses
    found: BackgroundResponse | StoredResponse | None = store.running.get(response_id) or store.get(response_id)
    if found is None:
        said = f"there is no response {response_id!r:.100}: this server keeps the last {store.max_responses}"
        raise ApiError(404, said, param="response_id")
    return found


def _refuse_include(query: Any) -> None:
    for name in ("include", "include[]"):
        if query.get(name):
            said = "include is not supported here: a response has what it was created with"
            raise ApiError(400, said, param="include", code="not_supported")


def _number(text: str, name: str, least: int, most: int) -> int:
    value = int(text) if text.isdecimal() and len(text) <= 10 else None
    if value is None or not least <= value <= most:
        raise ApiError(400, f"{name} is {text!r:.50}, must be between {least} and {most}", param=name)
    return value
