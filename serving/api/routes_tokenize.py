"""POST /tokenize and /detokenize, in vLLM's shape."""

from litestar import Request, post
from litestar.types import ASGIApp

from dispec.engine.errors import ContextOverflow
from dispec.engine.request_checks import check_token_ids
from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol import DetokenizeRequest, TokenizeRequest
from dispec.serving.api.protocol_answers import DetokenizeAnswer, TokenizeAnswer
from dispec.serving.api.service import service_of
from dispec.serving.api.streaming import JsonAnswer


@post("/tokenize", status_code=200, **describe(TokenizeRequest, TokenizeAnswer, tag="Tokenizer"))
async def tokenize(request: Request) -> ASGIApp:
    """The token ids of a text, or of messages in the model's chat template."""
    service = service_of(request)
    model = service.model()
    body = await service.body(request, TokenizeRequest)
    model.check_name(body.model)
    token_ids = await model.prompts.of_tokenize(body)
    strings = list(map(model.prompts.tokenizer.token_string, token_ids)) if body.return_token_strs else None
    return JsonAnswer(TokenizeAnswer(len(token_ids), model.info.max_model_len, token_ids, strings))


@post("/detokenize", status_code=200, **describe(DetokenizeRequest, DetokenizeAnswer, tag="Tokenizer"))
async def detokenize(request: Request) -> ASGIApp:
    """The text of token ids, special tokens spelled out."""
    service = service_of(request)
    model = service.model()
    body = await service.body(request, DetokenizeRequest)
    model.check_name(body.model)
    check_token_ids(body.tokens, model.info.vocab_size, "tokens")
    if len(body.tokens) > model.info.max_model_len:
        raise ContextOverflow("tokens", f"tokens holds {len(body.tokens)}", model.info.max_model_len)
    decode = model.prompts.tokenizer.decode
    text = await model.prompts.off_loop(lambda: decode(body.tokens, skip_special_tokens=False))
    return JsonAnswer(DetokenizeAnswer(text))
