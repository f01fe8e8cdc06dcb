"""The OpenAPI document against the server: a validator of JSON Schema and the routes agree on what is a request."""

import json
from typing import Any

import jsonschema_rs
import pytest

from dispec.engine.text.chat_template import ChatTemplate
from dispec.serving.api.prompts import RESERVED_TEMPLATE_NAMES
from tests.servers import Server

pytest_plugins = ["tests.api_server"]

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
QUESTION = [{"role": "user", "content": "hello"}]
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "max_tokens": 1},
    COMPLETION: {"prompt": "hello", "max_tokens": 1},
    RESPONSES: {"input": "hello", "max_output_tokens": 1},
    "/generate": {"prompt": "hello", "max_new_tokens": 1},
    MESSAGES: {"messages": QUESTION, "max_tokens": 1},
    COUNT: {"messages": QUESTION},
    "/tokenize": {"messages": QUESTION},
    "/detokenize": {"tokens": [40]},
}
ITEM = {"role": "user", "content": "hello"}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
THOUGHT = {"type": "thinking", "thinking": "a", "signature": ""}
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "a"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    *((CHAT, {"messages": [{"role": role, "content": "hello"}]}) for role in ("system", "user", "assistant", "tool")),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": ["a", {"text": "b"}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": "hello", "name": "Ann"}]}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"logprobs": None, "top_logprobs": 0, "stop": None, "stream_options": None, "logit_bias": None}),
    (CHAT, {"stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"prompt_logprobs": 0}),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": False}),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False, "x": 1, "y": None, "Z9": "text", "w": 1.5}}),
    (CHAT, {"something_else": [1]}),
    (COMPLETION, {"prompt": ["a", "b"]}),
    (COMPLETION, {"prompt": [40, 41]}),
    (COMPLETION, {"prompt": [40.0, 41]}),
    (COMPLETION, {"prompt": [[40], [41, 42.0]]}),
    (COMPLETION, {"max_tokens": 0, "echo": True}),
    (COMPLETION, {"stop": "a"}),
    (COMPLETION, {"stop": ["a", "b", "c", "d"]}),
    (COMPLETION, {"stop": []}),
    (COMPLETION, {"logit_bias": {"5": 100, "0": -100.0}}),
    (COMPLETION, {"allowed_token_ids": [5.0], "stop_token_ids": [], "bad_words": ["a"]}),
    (COMPLETION, {"slo": None, "model": None, "request_id": "a-1"}),
    (COMPLETION, {"model": "tiny", "n": 2.0, "seed": 312.0, "max_tokens": 3e0}),
    (RESPONSES, {"input": [{"role": "user", "content": "hello"}], "instructions": "Be brief."}),
    (RESPONSES, {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}]}),
    (RESPONSES, {"input": [ITEM, {"type": "reasoning", "id": "rs_1", "summary": []}, ITEM]}),
    (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    (RESPONSES, {"top_logprobs": 0, "metadata": {"a": "b"}, "store": False, "truncation": "auto"}),
    (RESPONSES, {"background": True, "metadata": None, "text": None, "reasoning": {"effort": None}}),
    (RESPONSES, {"stream": True, "stream_options": {"include_obfuscation": False}}),
    ("/generate", {"prompt": [40]}),
    (MESSAGES, {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "max_tokens": 2.0}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stream": True}),
    (MESSAGES, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}]}),
    (MESSAGES, {"messages": [*QUESTION, {"role": "assistant", "content": [THOUGHT]}, *QUESTION]}),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "none"}}),
    (MESSAGES, {"tool_choice": {"type": "none"}, "tools": None, "thinking": None, "output_config": {"effort": "high"}}),
    (MESSAGES, {"thinking": {"type": "disabled"}, "stop_sequences": ["a"], "metadata": {"user_id": "x"}}),
    (COUNT, {"tools": [TOOL | {"allowed_callers": ["direct"], "defer_loading": False}]}),
    (COUNT, {"max_tokens": "unread", "temperature": 0.5}),
    ("/tokenize", {"messages": None, "prompt": "hello"}),
    ("/tokenize", {"prompt": None}),
    ("/detokenize", {"tokens": []}),
    ("/detokenize", {"tokens": [40.0]}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": []}),
    (CHAT, {"messages": None}),
    (CHAT, {"messages": "hello"}),
    (CHAT, {"messages": ["hello"]}),
    (CHAT, {"messages": [{"content": "hello"}]}),
    (CHAT, {"messages": [{"role": 1, "content": "hello"}]}),
    (CHAT, {"messages": [{"role": "user"}]}),
    (CHAT, {"messages": [{"role": "user", "content": None}]}),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [1]}]}),
    (CHAT, {"messages": [*QUESTION, {"role": "assistant"}]}),
    (CHAT, {"top_logprobs": 1}),
    (CHAT, {"logprobs": 1}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"stream": True, "prompt_logprobs": 1}),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}),
    (CHAT, {"chat_template_kwargs": {"x": [1]}}),
    (CHAT, {"chat_template_kwargs": {"_x": 1}}),
    (CHAT, {"chat_template_kwargs": {"a b": 1}}),
    (CHAT, {"chat_template_kwargs": {"x" * 65: 1}}),
    (CHAT, {"chat_template_kwargs": {f"x{index}": 1 for index in range(33)}}),
    *((CHAT, {"chat_template_kwargs": {name: 1}}) for name in sorted(RESERVED_TEMPLATE_NAMES)),
    (COMPLETION, {"prompt": ""}),
    (COMPLETION, {"prompt": []}),
    (COMPLETION, {"prompt": [[]]}),
    (COMPLETION, {"prompt": None}),
    (COMPLETION, {"prompt": [1, "a"]}),
    (COMPLETION, {"prompt": [1.5]}),
    (COMPLETION, {"prompt": [-1]}),
    (COMPLETION, {"prompt": [[1]] * 1025}),
    (COMPLETION, {"max_tokens": 0}),
    (COMPLETION, {"stop": ""}),
    (COMPLETION, {"stop": ["a", "b", "c", "d", "e"]}),
    (COMPLETION, {"stop": [""]}),
    (COMPLETION, {"stop": "x" * 1025}),
    (COMPLETION, {"stop": 1}),
    (COMPLETION, {"logit_bias": {"x": 1}}),
    (COMPLETION, {"logit_bias": {"5": 101}}),
    (COMPLETION, {"logit_bias": {"-5": 1}}),
    (COMPLETION, {"allowed_token_ids": []}),
    (COMPLETION, {"stop_token_ids": [-1]}),
    (COMPLETION, {"bad_words": [""]}),
    (COMPLETION, {"truncate_prompt_tokens": 0}),
    (COMPLETION, {"slo": "fast"}),
    (COMPLETION, {"request_id": "a b"}),
    (COMPLETION, {"request_id": "x" * 129}),
    (COMPLETION, {"model": "gpt-9"}),
    (COMPLETION, {"model": 1}),
    (COMPLETION, {"stream": "yes"}),
    (RESPONSES, {"input": ""}),
    (RESPONSES, {"input": []}),
    (RESPONSES, {"input": None}),
    (RESPONSES, {"input": [{"role": "robot", "content": "hello"}]}),
    (RESPONSES, {"input": [{"role": "user"}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "text": "x"}]}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
    (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1"}]}),
    (RESPONSES, {"input": [{"type": "computer_call"}]}),
    (RESPONSES, {"include": ["x"]}),
    (RESPONSES, {"top_logprobs": 1}),
    (RESPONSES, {"background": True, "store": False}),
    (RESPONSES, {"stream_options": {}}),
    (RESPONSES, {"truncation": "some"}),
    (RESPONSES, {"metadata": {"a": 1}}),
    (RESPONSES, {"metadata": {"a": "x" * 513}}),
    (RESPONSES, {"metadata": {"x" * 65: "a"}}),
    (RESPONSES, {"metadata": {str(index): "a" for index in range(17)}}),
    (RESPONSES, {"tools": [{"type": "web_search"}]}),
    (RESPONSES, {"tools": [{"type": "function"}]}),
    (RESPONSES, {"tools": [{"type": "function", "name": ""}]}),
    *((MESSAGES, {"max_tokens": value}) for value in (None, 0, -1, "1", 1.5)),
    (MESSAGES, {"messages": [{"role": "tool", "content": "a"}]}),
    (MESSAGES, {"messages": [{"role": "user"}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": None}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": ["a"]}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
    (MESSAGES, {"messages": [{"role": "user", "content": [USE]}]}),
    (MESSAGES, {"messages": [{"role": "assistant", "content": [USE | {"id": None}]}, *QUESTION]}),
    (MESSAGES, {"messages": [{"role": "assistant", "content": [RESULT]}, *QUESTION]}),
    (MESSAGES, {"system": [THOUGHT]}),
    (MESSAGES, {"tools": [TOOL | {"type": "web_search_20250305"}]}),
    (MESSAGES, {"tools": [{"name": "f"}]}),
    (MESSAGES, {"tools": [TOOL | {"defer_loading": True}]}),
    (MESSAGES, {"tools": [TOOL | {"allowed_callers": ["code"]}]}),
    (MESSAGES, {"tool_choice": {"type": "any"}}),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "tool"}}),
    (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "all"}}),
    (MESSAGES, {"thinking": {"type": "often"}}),
    (MESSAGES, {"thinking": {"type": "adaptive", "display": "all"}}),
    (MESSAGES, {"output_config": {"effort": "huge"}}),
    (MESSAGES, {"output_config": {"task_budget": {"total": 1}}}),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema"}}}),
    (MESSAGES, {"stop_sequences": [""]}),
    (MESSAGES, {"stop_sequences": ["a", "b", "c", "d", "e"]}),
    (MESSAGES, {"stop_sequences": "a"}),
    (MESSAGES, {"model": "claude"}),
    (COUNT, {"messages": []}),
    (COUNT, {"tools": [{"name": "f"}]}),
    ("/generate", {"prompt": ["a"]}),
    ("/generate", {"prompt": ""}),
    ("/tokenize", {"messages": None}),
    ("/tokenize", {"prompt": "hello"}),
    ("/tokenize", {"messages": []}),
    ("/detokenize", {"tokens": "hello"}),
    ("/detokenize", {"tokens": [-1]}),
    ("/detokenize", {"tokens": [1.5]}),
]
# Limits that depend on the model or the load, and not on the request alone.
ELSEWHERE = {
    "max_output_tokens",
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "truncate_prompt_tokens",
    "min_tokens",
}


@pytest.fixture(scope="module")
def document(served: Server) -> dict[str, Any]:
    return served.get("/schema/openapi.json").json()


def request_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    return jsonschema_rs.Draft202012Validator(schema | {"components": document["components"]})


def is_accepted(served: Server, path: str, body: dict[str, Any]) -> bool:
    answer = served.post(path, body)
    assert answer.status_code in (200, 400, 404), answer.text
    return answer.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [*((*case, True) for case in ACCEPTED), *((*case, False) for case in REFUSED)],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else str(value),
)
def test_document_and_server_agree(
    served: Server, document: dict[str, Any], path: str, body: dict[str, Any], expected: bool
) -> None:
    body = LEAST[path] | body
    assert validator(document, request_schema(document, path)).is_valid(body) == expected
    assert is_accepted(served, path, body) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "tool_calls": [CALL]}, True),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, True),
        ({"role": "assistant", "content": "a", "tool_calls": [CALL]}, True),
        ({"role": "ipython", "content": "1", "name": "x"}, True),
        ({"role": "function", "content": "1", "name": "f"}, True),
        ({"role": "assistant", "tool_calls": []}, False),
        ({"role": "assistant", "content": "a", "tool_calls": "f"}, False),
        ({"role": "assistant", "content": "a", "tool_calls": ["f"]}, False),
        ({"role": "tool", "content": {"x": 1}}, False),
    ],
    ids=str,
)
def test_messages_that_some_templates_know(document: dict[str, Any], message: dict[str, Any], expected: bool) -> None:
    shown = "{{ m.role }}{{ m.content }}{{ (m.tool_calls or []) | tojson }}"
    template = ChatTemplate({"default": "{% for m in messages %}" + shown + "{% endfor %}"}, {})
    try:
        template.render([*QUESTION, message])
        is_rendered = True
    except ValueError:
        is_rendered = False
    body = {"messages": [*QUESTION, message]}
    assert validator(document, request_schema(document, CHAT)).is_valid(body) == is_rendered == expected


@pytest.mark.parametrize("path", LEAST)
def test_required_fields(served: Server, document: dict[str, Any], path: str) -> None:
    judge = validator(document, request_schema(document, path))
    for body in ({}, [], None, "hello", 1):
        assert not judge.is_valid(body)
        assert served.post(path, content=json.dumps(body)).status_code == 400


def numbers_around(field: dict[str, Any]) -> set[float | None]:
    """Values at each limit of a field and just beyond it."""
    is_integer = {"type": "integer"} in field["anyOf"]
    step: float = 1 if is_integer else 1e-6
    found: set[float | None] = {None, 0, 0.5, 1, -1}
    for name in ("minimum", "maximum", "exclusiveMinimum"):
        if name in field:
            found |= {field[name] - step, field[name], field[name] + step}
    return found


@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSES, MESSAGES, "/generate"])
def test_limits_of_numbers_are_those_of_the_server(served: Server, document: dict[str, Any], path: str) -> None:
    schema = request_schema(document, path)
    fields = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]["properties"]
    judge = validator(document, schema)
    checked = 0
    for name, field in fields.items():
        kinds = [kind.get("type") for kind in field.get("anyOf", [])]
        if not {"integer", "number"} & set(kinds) or name == "prompt":
            continue
        assert {"minimum", "exclusiveMinimum"} & field.keys(), f"{name} has no lower limit"
        values: list[Any] = [*numbers_around(field), 1.0, "1", True, [1], {}]
        for value in values:
            if name in ELSEWHERE and isinstance(value, int) and not -1 <= value <= 1:
                continue
            body = LEAST[path] | {name: value}
            if name == "top_logprobs":
                body |= {"include": ["message.output_text.logprobs"]} if path == RESPONSES else {"logprobs": True}
            assert judge.is_valid(body) == is_accepted(served, path, body), f"{name}: {value!r}"
            checked += 1
    assert checked > 20


def test_examples_are_requests(served: Server, document: dict[str, Any]) -> None:
    for path in LEAST:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        for example in content["examples"].values():
            assert validator(document, content["schema"]).is_valid(example["value"])
            assert served.post(path, example["value"]).status_code == 200


def test_answers_are_as_described(served: Server, document: dict[str, Any]) -> None:
    operations = [(path, *item) for path, known in document["paths"].items() for item in known.items()]
    for path, method, operation in operations:
        if "{response_id}" in path:
            created = served.post(RESPONSES, LEAST[RESPONSES] | {"background": True}).json()
            path = path.replace("{response_id}", created["id"])
        path = path.replace("{model_id}", "tiny")
        answer = served.request(method.upper(), path, json=LEAST.get(path))
        content = operation["responses"]["200"]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in content
        if kind == "application/json":
            assert validator(document, content[kind]["schema"]).is_valid(answer.json()), path
    for path in LEAST:
        error = served.post(path, {}).json()
        schema = document["paths"][path]["post"]["responses"]["default"]["content"]["application/json"]["schema"]
        assert validator(document, schema).is_valid(error)


def test_every_route_has_a_tag(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    used = {path: op["tags"] for path, known in document["paths"].items() for op in known.values()}
    assert all(len(found) == 1 and found[0] in tags for found in used.values())
    assert {found[0] for found in used.values()} == tags
    assert used["/metrics"] == ["Monitoring"]
    assert used["/tokenize"] == used["/tokenizer_info"] == ["Tokenizer"]
