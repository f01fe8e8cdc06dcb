"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes."""

from litestar import Request, post
from litestar.types import ASGIApp, Receive, Scope, Send

from dispec.serving.api.anthropic_protocol import CountTokensRequest, Message, MessagesRequest, TokensCount
from dispec.serving.api.anthropic_requests import TranslatedRequest
from dispec.serving.api.anthropic_responses import ANTHROPIC_STREAM, MessageResponses
from dispec.serving.api.chat_generation import ChatGeneration
from dispec.serving.api.chat_request import chat_prompt
from dispec.serving.api.context import context_of
from dispec.serving.api.openapi import describe
from dispec.serving.api.responses import EventStream, JsonResponse, abort_on_disconnect
from dispec.serving.http.anthropic_errors import AnthropicErrorBody


@post(
    "/v1/messages",
    status_code=200,
    **describe(MessagesRequest, Message, error=AnthropicErrorBody, streams=True, tag="Generation"),
)
async def messages(request: Request) -> ASGIApp:
    """Answer a conversation, as Anthropic's API."""
    context = context_of(request)
    model = context.open_model()
    body = await context.body(request, MessagesRequest)
    translated = TranslatedRequest(body, model.prompts.tokenizer.template_variables, model.reasoning is not None)
    with translated.own_names():
        chat = await ChatGeneration.start(request, translated.chat)
        responses = MessageResponses(chat, body.max_tokens)
        if not body.stream:
            choices = await abort_on_disconnect(request.scope, request.receive, chat.generation, chat.collect())
            return JsonResponse(responses.whole(choices[0]))
    keep_alive_seconds = context.settings.keep_alive_seconds
    stream = EventStream(chat.generation, responses.events(), keep_alive_seconds, ANTHROPIC_STREAM)

    async def with_own_names(scope: Scope, receive: Receive, send: Send) -> None:
        with translated.own_names():  # the engine may refuse a field, such as a grammar
            await stream(scope, receive, send)

    return with_own_names


@post(
    "/v1/messages/count_tokens",
    status_code=200,
    **describe(CountTokensRequest, TokensCount, error=AnthropicErrorBody, tag="Tokenizer"),
)
async def count_tokens(request: Request) -> ASGIApp:
    """The number of tokens of a message's prompt, which need not fit the context."""
    context = context_of(request)
    model = context.model()
    body = await context.body(request, CountTokensRequest)
    model.check_name(body.model)
    translated = TranslatedRequest(body, model.prompts.tokenizer.template_variables)
    with translated.own_names():
        prompt = await chat_prompt(model, translated.chat)
    return JsonResponse(TokensCount(len(prompt.token_ids)))
