"""Tools, calls and results in prompts: as transformers renders them, or in plain messages for other templates."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from dispec.engine.text.chat_template import ChatTemplate
from dispec.serving.chat_output.tool_formats import choose_tool_format
from dispec.serving.chat_output.tools import Tool, ToolFormat, ToolRequest
from tests.real_tokenizers import real_tokenizer

TOOLS = (
    Tool("get_weather", "The weather in a city — now", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("get_time"),
)
REQUEST = ToolRequest(TOOLS)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(content: str | None, calls: int = 2) -> list[dict[str, Any]]:
    made = [call("call_1", "get_weather", '{"city": "Köln"}'), call("call_2", "get_time", "{}")][:calls]
    results = [
        {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 3}'},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
    ][:calls]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather and time?"},
        {"role": "assistant", "content": content, "tool_calls": made},
        *results,
        {"role": "assistant", "content": "3 degrees, noon."},
        {"role": "user", "content": "Thanks"},
    ]


def reference(source: str, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> str:
    """Render as transformers does, with messages in the template's own form."""
    template = _compile_jinja_template(source)
    return template.render(messages=messages, tools=tools, add_generation_prompt=True, **variables)


def expected_messages(messages: list[dict[str, Any]], content: Any, as_objects: bool) -> list[dict[str, Any]]:
    expected = json.loads(json.dumps(messages))
    for message in expected:
        if isinstance(message["content"], list):
            message["content"] = message["content"][0]["text"]
        if "tool_calls" in message:
            message["content"] = message["content"] or content
            for made in message["tool_calls"] if as_objects else ():
                made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    return expected


@pytest.mark.parametrize("content", [None, "", "Let me see."])
@pytest.mark.parametrize(("name", "nothing", "as_objects"), [("qwen3", "", True), ("deepseek_v3", None, False)])
def test_tool_turns_agree_with_transformers(name: str, nothing: Any, as_objects: bool, content: str | None) -> None:
    tokenizer = real_tokenizer(name)
    source, messages = str(tokenizer.tool_chat_template), conversation(content)
    tools = [tool.as_template_value() for tool in TOOLS]
    named = {role: token for role, token in tokenizer.special_tokens.items() if isinstance(token, str)}
    expected = reference(source, expected_messages(messages, nothing, as_objects), tools, **named)
    assert tokenizer.apply_chat_template(messages, tools=tools) == expected
    if not content:
        assert "Köln" in expected
        assert expected.index("get_weather") < expected.index("Köln") < expected.index("degrees")


# Shapes of published templates

LLAMA = (  # Llama 3.1's: results as JSON, in a role of their own
    "{% for m in messages %}{% if m.role == 'tool' %}<|ipython|>{{ m.content | tojson }}"
    "{% elif 'tool_calls' in m %}<|assistant|>{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", ' }}"
    "{{ '\"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
)
CALLS_AS_JSON = (  # Mistral's: functions as JSON
    "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ {'content': m.content, 'id': m.tool_call_id} | tojson }}"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}{{ tools }}"
)
PRINTS = (  # writes content and arguments as they are
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endfor %}{{ tools }}"
)


@pytest.mark.parametrize(
    ("source", "nothing", "as_objects"), [(LLAMA, "", True), (CALLS_AS_JSON, None, True), (PRINTS, "", False)]
)
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_templates_get_the_form_that_they_expect(source: str, nothing: Any, as_objects: bool, content: Any) -> None:
    messages = conversation(content, calls=1)
    expected = reference(source, expected_messages(messages, nothing, as_objects))
    assert ChatTemplate({"default": source}, {}).render(messages) == expected
    assert "Köln" in expected
    assert "None" not in expected.removesuffix("None")


# Templates without tools

PLAIN = (  # Gemma's and Llama 2's demand that roles alternate
    "{% set ns = namespace(last='assistant') %}{% for m in messages %}{% if m.role == 'system' %}[S]{{ m.content }}"
    "{% else %}{% if m.role == ns.last or m.role not in ('user', 'assistant') %}{{ raise_exception('roles') }}"
    "{% endif %}"
    "{% set ns.last = m.role %}[{{ m.role[0] }}]{{ m.content }}{% endif %}\n{% endfor %}"
)


def generic() -> ToolFormat:
    found = choose_tool_format("auto", PLAIN, {})
    assert found is not None
    return found


def test_tools_calls_and_results_are_plain_messages() -> None:
    messages, tools = generic().with_tools(conversation("Let me see."), REQUEST)
    assert tools is None
    system, user, assistant, results, answer, thanks = messages
    assert system["content"].startswith("Be brief.\n\n")
    lines = system["content"].splitlines()
    for tool in TOOLS:
        described = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        assert {key: value for key, value in described.items() if value} in [
            json.loads(line) for line in lines if line.startswith('{"name": "get')
        ]
    assert '{"name": "<name>", "arguments": {"<argument>": <value>}}' in lines
    assert assistant["content"] == (
        'Let me see.\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n{"name": "get_time", "arguments": {}}'
    )
    assert results["content"] == 'Result of get_weather:\n{"degrees": 3}\n\nResult of get_time:\nnoon'
    assert [message["role"] for message in (user, results, answer, thanks)] == ["user", "user", "assistant", "user"]
    assert "[u]Result of get_weather" in ChatTemplate({"default": PLAIN}, {}).render(messages)


def test_written_calls_are_read_again() -> None:
    messages, _ = generic().with_tools(conversation(None), REQUEST)
    parser = generic().parser(REQUEST)
    names = [delta.name for delta in parser.add(messages[2]["content"]) if hasattr(delta, "name")]
    assert names == ["get_weather", "get_time"]


def test_without_tools_earlier_calls_stay_and_nothing_is_described() -> None:
    messages, tools = generic().with_tools(conversation(None), ToolRequest(TOOLS, "none"))
    assert tools is None
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[2]["content"].startswith('{"name": "get_weather"')
    user = [{"role": "user", "content": "Hello"}]
    assert generic().with_tools(user, ToolRequest(choice="none")) == (user, None)


def test_descriptions_say_what_is_demanded() -> None:
    user = [{"role": "user", "content": "Hello"}]

    def described(request: ToolRequest) -> str:
        messages, _ = generic().with_tools(user, request)
        assert [message["role"] for message in messages] == ["system", "user"]
        return str(messages[0]["content"])

    named = described(ToolRequest(TOOLS, "required", named="get_time"))
    assert "get_weather" not in named
    assert "Now call the function get_time." in named
    assert "several calls" in described(REQUEST)
    assert "several calls" not in described(ToolRequest(TOOLS, is_parallel=False))
    assert "Now call a function." in described(ToolRequest(TOOLS, "required"))


def test_a_question_behind_results_joins_them() -> None:
    messages = [*conversation(None)[:-2], {"role": "user", "content": "And?"}]
    *_, last = generic().with_tools(messages, REQUEST)[0]
    assert last["content"].endswith("Result of get_time:\nnoon\n\nAnd?")


# Turns that templates refuse

SINGLE = LLAMA.replace(
    "<|assistant|>",
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('supports single tool-calls') }}{% endif %}<|assistant|>",
)
SHORT_IDS = CALLS_AS_JSON.replace(
    "[TOOL_RESULTS]",
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}[TOOL_RESULTS]",
)


def test_several_calls_become_messages_with_one() -> None:
    found = choose_tool_format("auto", SINGLE + "ipython", {})
    assert found is not None
    assert found.name == "llama3_json"
    given = conversation("Let me see.")
    given[3:5] = given[4:2:-1]  # results in another order than the calls
    messages, tools = found.with_tools(given, REQUEST)
    turns = [(message["role"], message.get("tool_call_id"), message["content"]) for message in messages[2:6]]
    assert turns == [
        ("assistant", None, "Let me see."),
        ("tool", "call_1", '{"degrees": 3}'),
        ("assistant", None, None),
        ("tool", "call_2", "noon"),
    ]
    assert [message["tool_calls"][0]["id"] for message in (messages[2], messages[4])] == ["call_1", "call_2"]
    prompt = ChatTemplate({"default": SINGLE}, {}).render(messages, tools=tools)
    assert prompt.index("Köln") < prompt.index("degrees") < prompt.index("get_time") < prompt.index("noon")


def test_results_without_ids_follow_the_last_call() -> None:
    found = choose_tool_format("llama3_json", SINGLE, {})
    assert found is not None
    given = conversation(None)
    for message in given:
        message.pop("tool_call_id", None)
    messages, _ = found.with_tools(given, REQUEST)
    assert [message["role"] for message in messages[2:6]] == ["assistant", "assistant", "tool", "tool"]


def test_ids_get_the_length_that_mistral_demands() -> None:
    found = choose_tool_format("auto", SHORT_IDS, {})
    assert found is not None
    given = conversation(None)
    given[2]["tool_calls"][1]["id"] = given[4]["tool_call_id"] = "abcDEF123"
    messages, tools = found.with_tools(given, REQUEST)
    first, second = (made["id"] for made in messages[2]["tool_calls"])
    assert [message["tool_call_id"] for message in messages[3:5]] == [first, second]
    assert (len(first), first.isalnum(), second) == (9, True, "abcDEF123")
    assert "noon" in ChatTemplate({"default": SHORT_IDS}, {}).render(messages, tools=tools)


# Choice of the format


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ tools }}<tool_call>", "hermes"),
        ("{{ tools }}<tool_call><function=x>", "json"),  # Qwen3-Coder's
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}<|eot_id|>ipython {{ '\"parameters\": ' }}", "llama3_json"),
        ("{{ tools }} [func(param=value, other=value)] ipython", "pythonic"),
        ("{{ tools }} in a form of its own", "json"),
        ("{{ messages }}<tool_call>", "json"),
    ],
)
def test_auto_reads_the_template(template: str, expected: str) -> None:
    found = choose_tool_format("auto", template, {})
    assert found is not None
    assert found.name == expected
    _, tools = found.with_tools([{"role": "user", "content": "x"}], REQUEST)
    assert (tools is None) == (expected == "json")


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen3", "hermes"), ("llama3_1", "json"), ("deepseek_v3", "json"), ("gemma3", "json")]
)
def test_auto_for_real_templates(name: str, expected: str) -> None:
    tokenizer = real_tokenizer(name)
    found = choose_tool_format("auto", tokenizer.tool_chat_template, tokenizer.vocabulary)
    assert found is not None
    assert found.name == expected
    messages, tools = found.with_tools(conversation(None), REQUEST)
    prompt = tokenizer.apply_chat_template(messages, tools=tools)
    for text in ("get_time", "Köln", "degrees", "noon", "Thanks", "The weather in a city — now"):
        assert text in prompt


def test_named_formats() -> None:
    assert choose_tool_format("none", PLAIN, {}) is None
    assert choose_tool_format("auto", None, {}) is None
    with pytest.raises(ValueError, match="'x' is no tool call parser, must be one of auto, none, hermes"):
        choose_tool_format("x", PLAIN, {})  # type: ignore[arg-type]
    hermes = choose_tool_format("hermes", PLAIN, {})
    assert hermes is not None
    messages, tools = hermes.with_tools(conversation(None), REQUEST)  # the template knows no tools
    assert tools is None
    assert '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>' in messages[2]["content"]


def test_the_template_with_tools() -> None:
    assert ChatTemplate({"default": "a", "tool_use": "b"}, {}).tool_source == "b"
    assert ChatTemplate({"default": "a"}, {}).tool_source == "a"
