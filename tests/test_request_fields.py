"""No field that clients know is dropped in silence: each is honoured, refused by name, or ignored on purpose."""

import json
from collections.abc import Set
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from dispec.engine.errors import InvalidField
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.api.messages.protocol import CountTokensRequest, MessagesRequest
from dispec.serving.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from dispec.serving.api.request_body import decode_body
from dispec.serving.api.request_fields import ROUTES
from dispec.serving.api.responses.protocol import ResponsesRequest
from dispec.serving.api.sampling import sampling_params
from dispec.serving.http.errors import ApiError
from tests import vllm_fields

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
LEAST: dict[type, dict[str, Any]] = {
    ChatRequest: CHAT,
    CompletionRequest: {"prompt": "Hi"},
    ResponsesRequest: {"input": "Hi"},
    GenerateRequest: {"prompt": "Hi"},
    TokenizeRequest: {"prompt": "Hi"},
    DetokenizeRequest: {"tokens": [1]},
    MessagesRequest: CHAT | {"max_tokens": 1},
    CountTokensRequest: CHAT,
}


def decode(form: type, body: dict[str, Any]) -> Any:
    return decode_body(json.dumps(LEAST[form] | body).encode(), form)


def names(*forms: type) -> set[str]:
    """The fields of typed dictionaries, those that a base declares included."""
    return {name for form in forms for name in form.__annotations__}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("form", "documented"),
    [
        (
            ChatRequest,
            vllm_fields.CHAT
            | names(chat_create_params.CompletionCreateParamsBase)
            | names(chat_create_params.CompletionCreateParamsStreaming),
        ),
        (
            CompletionRequest,
            vllm_fields.COMPLETION
            | names(completion_create_params.CompletionCreateParamsBase)
            | names(completion_create_params.CompletionCreateParamsStreaming),
        ),
        (
            ResponsesRequest,
            vllm_fields.RESPONSES
            | names(response_create_params.ResponseCreateParamsBase)
            | names(response_create_params.ResponseCreateParamsStreaming),
        ),
        (TokenizeRequest, vllm_fields.TOKENIZE),
        (DetokenizeRequest, vllm_fields.DETOKENIZE),
        (
            MessagesRequest,
            vllm_fields.MESSAGES
            | names(message_create_params.MessageCreateParamsBase, message_create_params.MessageCreateParamsStreaming)
            | names(beta_message_create_params.MessageCreateParamsBase),
        ),
        (
            CountTokensRequest,
            names(message_count_tokens_params.MessageCountTokensParams)
            | names(beta_count_tokens_params.MessageCountTokensParams),
        ),
        (GenerateRequest, set(CompletionRequest.__struct_fields__) | vllm_fields.COMPLETION),
    ],
)
def test_every_documented_field_is_in_one_list(form: type, documented: Set[str]) -> None:
    honoured, (refused, ignored) = set(form.__struct_fields__), ROUTES[form]  # type: ignore[attr-defined]
    assert documented - honoured - refused.keys() - ignored == set()
    assert honoured & refused.keys() == honoured & ignored == refused.keys() & ignored == set()


@pytest.mark.smoke
@pytest.mark.parametrize("form", ROUTES, ids=lambda form: form.__name__)
def test_fields_of_missing_features_are_refused_by_name(form: type) -> None:
    for name, harmless in ROUTES[form].refused.items():
        for value in ("x", 7, {"a": 1}, [1]):
            with pytest.raises(ApiError) as error:
                decode(form, {name: value})
            assert (error.value.status, error.value.detail.param) == (400, name)
            assert error.value.detail.code == "not_supported"
        for value in (None, [], {}, "", *harmless):
            decode(form, {name: value})
    for name in ROUTES[form].ignored:
        decode(form, {name: "x"})


@pytest.mark.smoke
@pytest.mark.parametrize("form", [CompletionRequest, ChatRequest])
def test_sampling_fields_reach_the_engine(form: type) -> None:
    given = {
        **{"temperature": 0.3, "top_p": 0.7, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.4, "seed": 9, "n": 2},
        **{"presence_penalty": 0.6, "repetition_penalty": 1.2, "stop_token_ids": (4,), "stop": ("end",)},
        **{"include_stop_str_in_output": True, "min_tokens": 2, "ignore_eos": True, "skip_special_tokens": False},
        **{"bad_words": ("x",), "allowed_token_ids": (1, 2), "prompt_logprobs": 1, "max_tokens": 7},
    }
    params = sampling_params(decode(form, given | {"logit_bias": {"3": 1.5}}), {}, 1, 100)
    assert {name: getattr(params, name) for name in given} == given
    assert params.logit_bias == {3: 1.5}


@pytest.mark.parametrize(
    ("body", "is_harmless"),
    [
        ({"length_penalty": 1.0}, True),
        ({"length_penalty": True}, False),
        ({"use_beam_search": 0}, False),
        ({"best_of": 3, "n": 3}, True),
        ({"best_of": 3}, False),
        ({"verbosity": "low"}, False),
    ],
)
def test_default_values_of_refused_fields_are_accepted(body: dict[str, Any], is_harmless: bool) -> None:
    if is_harmless:
        decode(ChatRequest, body)
    else:
        with pytest.raises(ApiError, match=next(iter(body))):
            decode(ChatRequest, body)


@pytest.mark.parametrize(
    ("form", "body", "param", "said"),
    [
        (CompletionRequest, b"[]", None, "the body is [], must be an object"),
        (CompletionRequest, b"7", None, "the body is 7, must be an object"),
        (CompletionRequest, b"{", None, "the body is not JSON"),
        (CompletionRequest, b"{}", "prompt", "prompt is missing"),
        (ChatRequest, b"{}", "messages", "messages is missing"),
        (ChatRequest, b'{"messages": [1]}', "messages", "messages[0] is 1, must be an object"),
        (CompletionRequest, {"logit_bias": {"1": "x"}}, "logit_bias", 'logit_bias.1 is "x", must be a number'),
        (CompletionRequest, {"logit_bias": {"1": 1, "2": None}}, "logit_bias", "logit_bias.2 is null, must be a num"),
        (CompletionRequest, {"logit_bias": {"5": 1, "x": 1}}, "logit_bias", 'logit_bias has the key "x", must be an i'),
        (CompletionRequest, {"logit_bias": {"1.5": 1}}, "logit_bias", 'logit_bias has the key "1.5", must be an integ'),
        (CompletionRequest, {"logit_bias": [1]}, "logit_bias", "logit_bias is [1], must be an object"),
        (CompletionRequest, {"stop": ["a", 1]}, "stop", "stop[1] is 1, must be a text"),
        (CompletionRequest, {"prompt": [[1], ["a", []]]}, "prompt", "prompt[1][0]"),
        (CompletionRequest, {"stream_options": {"include_usage": 1}}, "stream_options", "stream_options.include_usage"),
        (CompletionRequest, {"seed": 1e300}, "seed", "seed is"),
    ],
)
def test_the_param_of_an_error_is_a_field_or_null(form: type, body: Any, param: str | None, said: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(LEAST[form] | body).encode()
    with pytest.raises(ApiError) as error:
        decode_body(data, form)
    assert error.value.detail.param == param
    assert error.value.detail.message.startswith(said)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0},
        {"presence_penalty": 3}, {"logit_bias": {1: 200}}, {"logit_bias": {-1: 0}}, {"allowed_token_ids": ()},
        {"bad_words": "x"}, {"bad_words": ("",)}, {"stop": 3}, {"stop": ("x" * 2000,)}, {"stop": ("x",) * 17},
        {"min_tokens": 300}, {"max_tokens": 0}, {"seed": 2**63}, {"logprobs": 21}, {"stop_token_ids": (-1,)},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_parameters_name_the_field(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidField) as error:
        SamplingParams(**given)
    assert [error.value.field] == list(given)
    assert str(error.value).startswith(error.value.field)
