"""What becomes of a request to /v1/messages: the chat in OpenAI's form, and the errors with Anthropic's names."""

import json
from typing import Any

import pytest

from dispec.engine.errors import InvalidField
from dispec.serving.api.messages.events import tool_input
from dispec.serving.api.messages.protocol import MessagesRequest
from dispec.serving.api.messages.requests import TranslatedRequest
from dispec.serving.api.protocol import ChatRequest
from dispec.serving.api.request_body import decode_body
from dispec.serving.http.errors import ApiError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris, «é»"}}
CALLED = {
    "id": "toolu_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Paris, «é»"}'},
}


def translated(*variables: str, **body: Any) -> TranslatedRequest:
    given = {"messages": [QUESTION], "max_tokens": 9} | body
    return TranslatedRequest(decode_body(json.dumps(given).encode(), MessagesRequest), variables)


def chat(*variables: str, **body: Any) -> ChatRequest:
    return translated(*variables, **body).chat


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": item} for item in texts]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": text("a", "b")}], [{"role": "user", "content": text("a", "b")}]),
        (
            [{"role": "user", "content": "a"}, {"role": "ctx", "content": "b"}, {"role": "assistant", "content": []}],
            [{"role": "user", "content": text("a", "b")}, {"role": "assistant", "content": []}],
        ),
        (
            [
                QUESTION,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                        {"type": "redacted_thinking", "data": "x"},
                        *text("I look."),
                        CALL,
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": text("sunny", "warm")},
                        *text("And now?"),
                    ],
                },
            ],
            [
                {"role": "user", "content": text(QUESTION["content"])},
                {"role": "assistant", "content": text("I look."), "reasoning_content": "Hm.", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "toolu_1", "name": "get_weather", "content": "sunny\nwarm"},
                {"role": "user", "content": text("And now?")},
            ],
        ),
        (
            [
                {"role": "assistant", "content": [CALL, CALL | {"id": "toolu_2", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_2"}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no", "is_error": True},
                    ],
                },
            ],
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        CALLED,
                        CALLED | {"id": "toolu_2", "function": {"name": "get_weather", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "toolu_2", "name": "get_weather", "content": ""},
                {"role": "tool", "tool_call_id": "toolu_1", "name": "get_weather", "content": "Error: no"},
            ],
        ),
    ],
    ids=["texts", "turns of one role", "a tool's result", "several calls and an error"],
)
def test_messages(messages: list[Any], expected: list[Any]) -> None:
    assert chat(messages=messages).messages == expected


@pytest.mark.parametrize(
    "system",
    [
        "Be brief.",
        text("Be brief."),
        [*text("x-anthropic-billing-header: cc_version=2.1; cch=1f;"), *text("Be brief.")],
        "x-anthropic-billing-header: cch=2a;\nBe brief.",
    ],
)
def test_the_system_text_has_no_line_of_the_client(system: Any) -> None:
    assert chat(system=system).messages[0] == {"role": "system", "content": text("Be brief.")}
    later = chat(system=system, messages=[{"role": "system", "content": "In French."}, QUESTION])
    assert later.messages[0] == {"role": "system", "content": text("Be brief.", "In French.")}


def test_the_last_message_decides_between_answer_and_continuation() -> None:
    assert not chat().continue_final_message
    assert chat(messages=[QUESTION, {"role": "assistant", "content": "It is"}]).continue_final_message


def test_tools() -> None:
    examples = [{"city": "Rome"}]
    given = [WEATHER, WEATHER | {"name": "b", "type": "custom", "strict": True, "input_examples": examples}]
    found = chat(tools=given, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    function = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
    others = {"name": "b", "strict": True, "parameters": SCHEMA | {"examples": examples}}
    assert found.tools == [
        {"type": "function", "function": function},
        {"type": "function", "function": function | others},
    ]
    assert (found.tool_choice, found.parallel_tool_calls) == ("required", False)
    for given_choice, expected in (
        (None, None),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "b"}, {"type": "function", "function": {"name": "b"}}),
    ):
        assert chat(tools=given, tool_choice=given_choice).tool_choice == expected
    assert chat(tool_choice={"type": "none"}).tool_choice is None


def test_thinking_and_effort() -> None:
    assert chat(thinking={"type": "disabled"}).reasoning_effort == "none"
    for kind in ("enabled", "adaptive"):
        found = chat("enable_thinking", thinking={"type": kind}, chat_template_kwargs={"x": 1})
        assert (found.chat_template_kwargs, found.reasoning_effort) == ({"enable_thinking": True, "x": 1}, None)
    assert chat(thinking={"type": "adaptive"}).chat_template_kwargs is None
    assert chat(thinking={"type": "adaptive", "display": "omitted"}).include_reasoning is False
    assert chat("reasoning_effort", output_config={"effort": "max"}).reasoning_effort == "xhigh"
    assert chat("reasoning_effort", output_config={"effort": "high"}).reasoning_effort == "high"
    assert chat(output_config={"effort": "high"}).reasoning_effort is None  # the default of Anthropic's API
    assert chat(output_config={"effort": "low"}).reasoning_effort == "low"  # for the template to refuse


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_output_format(where: str) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    found = chat(**{where: {"format": form} if where == "output_config" else form}).response_format
    assert found is not None
    assert (found["type"], found["json_schema"]["schema"], found["json_schema"]["strict"]) == (
        "json_schema",
        SCHEMA,
        True,
    )


def test_fields_of_all_routes_are_passed_on() -> None:
    given = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 7, "slo": "chat", "cache_salt": "s", "priority": 2}
    found = chat(**given, stop_sequences=["a", "b"])
    assert {name: getattr(found, name) for name in given} == given
    assert (found.max_tokens, found.stop) == (9, ["a", "b"])
    assert chat(stop="c", stop_sequences=["a"]).stop == ["a", "c"]
    assert chat(stop_sequences=[]).stop is None


def test_a_budget_limits_the_reasoning_where_there_is_some() -> None:
    def budget(tokens: int, has_reasoning: bool = True, kind: str = "enabled") -> int | None:
        body = {"messages": [QUESTION], "max_tokens": 20, "thinking": {"type": kind, "budget_tokens": tokens}}
        request = TranslatedRequest(decode_body(json.dumps(body).encode(), MessagesRequest), (), has_reasoning)
        return request.chat.thinking_token_budget

    assert budget(5) == 5
    assert budget(18) == 18
    assert budget(19) is None  # the output ends first
    assert budget(5, has_reasoning=False) is None
    assert budget(5, kind="adaptive") is None


FORMAT = {"type": "json_schema", "schema": SCHEMA}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1"}


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages[0].role is 'tool', must be"),
        (
            {"messages": [QUESTION, {"role": "user", "content": [*text("a"), {"type": "image", "source": {}}]}]},
            "messages",
            "messages[1].content[1].type is 'image', must be text or tool_result here",
        ),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "messages",
            "messages[0].content[0].type is 'tool_use', must be text or tool_result here",
        ),
        (
            {"messages": [{"role": "assistant", "content": [CALL | {"id": None}]}]},
            "messages",
            "messages[0].content[0].id is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages",
            "messages[0].content[0].text is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [RESULT]}]},
            "messages",
            "messages[0].content[0].tool_use_id is 'toolu_1', must be the id of a tool_use block before it",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [CALL]},
                    {"role": "user", "content": [RESULT | {"content": [{"type": "document"}]}]},
                ]
            },
            "messages",
            "messages[1].content[0].content[0].type is 'document', must be text here",
        ),
        ({"messages": [QUESTION, {"role": "assistant", "content": [CALL]}]}, "messages", "messages[1] ends with tool"),
        ({"system": [{"type": "image"}]}, "system", "system[0].type is 'image', must be text here"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools", "tools[0].type is 'web_search"),
        ({"tools": [{"name": "a"}]}, "tools", "tools[0].input_schema is missing"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools", "tools[0].defer_loading is true"),
        ({"tools": [WEATHER | {"allowed_callers": ["code_execution_20250825"]}]}, "tools", "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "tool_choice is 'any', must come with tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice", "tool_choice.name is missing"),
        ({"tools": [WEATHER], "tool_choice": {"type": "all"}}, "tool_choice", "tool_choice.type is 'all', must be"),
        ({"thinking": {"type": "between_tools"}}, "thinking", "thinking.type is 'between_tools', must be one of"),
        ({"thinking": {"type": "adaptive", "display": "all"}}, "thinking", "thinking.display is 'all', must be"),
        ({"output_config": {"effort": "huge"}}, "output_config", "output_config.effort is 'huge', must be one of low"),
        ({"output_config": {"task_budget": {"total": 1}}}, "output_config", "output_config.task_budget is not supp"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "output_config", "output_config.format.type"),
        ({"output_format": {"type": "xml", "schema": {}}}, "output_format", "output_format.type is 'xml'"),
        (
            {"output_format": FORMAT, "output_config": {"format": FORMAT}},
            "output_format",
            "output_format and output_co",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking", "thinking.budget_tokens is -1, must be"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_errors_have_the_place(body: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidField) as error:
        chat(**body)
    assert error.value.field == field
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("messages[2]: refused", "messages[1].content[0]: refused"),
        ("the template refuses messages[0]", "the template refuses system"),
        ("messages[9]: refused", "messages[9]: refused"),
        ("stop holds 5 texts", "stop_sequences holds 5 texts"),
        ("tools[1].function.parameters.type is 'x'", "tools[1].input_schema.type is 'x'"),
        ("tools[1].function.name is ''", "tools[1].name is ''"),
        ("tool_choice.function.name is 'x'", "tool_choice.name is 'x'"),
        ("response_format.json_schema.schema is {}", "output_config.format.schema is {}"),
        ("response_format and tools", "output_config.format and tools"),
        ("reasoning_effort is 'none', must", "thinking.type is 'disabled', must"),
        ("reasoning_effort is 'low', must", "output_config.effort is 'low', must"),
    ],
)
def test_errors_about_the_chat_have_the_names_of_the_request(said: str, expected: str) -> None:
    conversation = [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}]
    request = translated(system="Be brief.", messages=conversation)
    with pytest.raises(ApiError) as error, request.own_names():
        raise InvalidField("x", said)
    assert (error.value.status, error.value.detail.message) == (400, expected)


def test_errors_about_the_older_field_of_a_format_name_it() -> None:
    request = translated(messages=[QUESTION], output_format=FORMAT)
    with pytest.raises(ApiError) as error, request.own_names():
        raise InvalidField("response_format", "response_format.json_schema.schema/properties/a is wrong")
    assert error.value.detail.message == "output_format.schema/properties/a is wrong"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, {"b": "é"}]}', {"a": [1, {"b": "é"}]}),
        ("", {}),
        ('{"a": ', {"INVALID_JSON": '{"a": '}),
        ("[1]", {"INVALID_JSON": "[1]"}),
    ],
)
def test_inputs_are_objects(arguments: str, expected: dict[str, Any]) -> None:
    assert tool_input(arguments) == expected
