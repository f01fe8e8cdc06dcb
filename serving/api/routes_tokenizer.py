"""POST /tokenize and /detokenize, and GET /tokenizer_info, in vLLM's shapes."""

import json
from typing import Any

from litestar import Request, get, post
from litestar.types import ASGIApp

from dispec.engine.errors import ContextOverflow, InvalidField
from dispec.engine.process.messages import EngineInfo
from dispec.engine.request_checks import check_token_ids
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.chat_request import chat_prompt
from dispec.serving.api.context import ServedModel, context_of
from dispec.serving.api.http_responses import JsonResponse
from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest
from dispec.serving.api.response_bodies import DetokenizeResponse, TokenizeResponse

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")  # of files on this machine


@post("/tokenize", status_code=200, **describe(TokenizeRequest, TokenizeResponse, tag="Tokenizer"))
async def tokenize(request: Request) -> ASGIApp:
    """The token ids of a text, or of messages in the model's chat template."""
    context = context_of(request)
    model = context.model()
    body = await context.body(request, TokenizeRequest)
    model.check_name(body.model)
    token_ids = await _token_ids(model, body)
    token_of = model.prompts.tokenizer.id_to_token
    strings = [token_of(token) or "" for token in token_ids] if body.return_token_strs else None
    return JsonResponse(TokenizeResponse(len(token_ids), model.info.max_model_len, token_ids, strings))


async def _token_ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        said = "prompt is missing" if body.prompt is None else "prompt and messages exclude each other"
        raise InvalidField("prompt", said)
    if body.prompt is None:
        shared = set(TokenizeRequest.__struct_fields__) & set(ChatRequest.__struct_fields__)
        chat = ChatRequest(**{name: getattr(body, name) for name in shared})
        return (await chat_prompt(model, chat)).token_ids
    if body.tools:
        raise InvalidField("tools", f"tools holds {len(body.tools)} tools, must come with messages")
    return await model.prompts.token_ids(body.prompt, body.add_special_tokens is not False)


@post("/detokenize", status_code=200, **describe(DetokenizeRequest, DetokenizeResponse, tag="Tokenizer"))
async def detokenize(request: Request) -> ASGIApp:
    """The text of token ids, with special tokens."""
    context = context_of(request)
    model = context.model()
    body = await context.body(request, DetokenizeRequest)
    model.check_name(body.model)
    check_token_ids(body.tokens, model.info.vocab_size, "tokens")
    if len(body.tokens) > model.info.max_model_len:
        raise ContextOverflow("tokens", f"tokens holds {len(body.tokens)}", model.info.max_model_len)
    decode = model.prompts.tokenizer.decode
    text = await model.prompts.in_thread(lambda: decode(body.tokens, skip_special_tokens=False))
    return JsonResponse(DetokenizeResponse(text))


@get("/tokenizer_info", **describe(None, None, tag="Tokenizer"))
async def tokenizer_info(request: Request) -> ASGIApp:
    """The tokenizer_config.json with the chat template, from which evaluation harnesses make a tokenizer, and sizes."""
    served = context_of(request).model()
    return JsonResponse(json.dumps(tokenizer_configuration(served.prompts.tokenizer, served.info)).encode())


def tokenizer_configuration(tokenizer: Tokenizer, info: EngineInfo) -> dict[str, Any]:
    """Return the checkpoint's tokenizer_config.json with tokens as texts, as vLLM does, and the engine's sizes and ids.

    The chat template may come from another file.
    """
    config = {name: _plain(value) for name, value in tokenizer.config.items() if name not in _PATHS}
    added = tokenizer.backend.get_added_tokens_decoder()
    config["added_tokens_decoder"] = {str(token_id): token.content for token_id, token in sorted(added.items())}
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    config["chat_template"] = tokenizer.chat_template
    tokens = dict.fromkeys(_ROLES) | tokenizer.special_tokens
    eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None and info.eos_token_ids:  # only config.json names it
        eos_token_id = info.eos_token_ids[0]
        tokens["eos_token"] = tokenizer.id_to_token(eos_token_id)
    return {
        **config,
        **tokens,
        "vocab_size": tokenizer.vocab_size,
        "model_vocab_size": info.vocab_size,
        "model_max_length": info.max_model_len,
        "has_chat_template": tokenizer.has_chat_template,
        "is_byte_level": tokenizer.is_byte_level,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos_token_id,
        "eos_token_ids": info.eos_token_ids,
    }


def _plain(value: Any) -> Any:
    """Return a value of the file with each token, an object with its `content`, as its text."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
