"""The fields of a request that ask for a structure, as they reach the engine."""

import json
from typing import Any

import pytest

from dispec.engine.errors import InvalidField
from dispec.serving.api.protocol import ChatRequest, CompletionRequest
from dispec.serving.api.request_body import decode_body
from dispec.serving.api.sampling import sampling_params
from dispec.serving.api.structure import requested_structure

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
OF_OPENAI = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


def chat(**fields: Any) -> ChatRequest:
    return decode_body(json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode(), ChatRequest)


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": OF_OPENAI}, "json", SCHEMA),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
            "json",
            SCHEMA,
        ),
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json", SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ("a", "b")),
        ({"guided_json": SCHEMA}, "json", SCHEMA),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", ("a",)),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"guided_json_object": True}, "json_object", True),
    ],
)
def test_every_name_of_a_structure_reaches_the_engine(fields: dict[str, Any], kind: str, value: Any) -> None:
    structure = requested_structure(chat(**fields))
    assert structure is not None
    assert structure.kind == kind
    found = getattr(structure, kind)
    assert (json.loads(found) if kind == "json" else found) == value
    assert structure.error("x").field == next(iter(fields))


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"guided_json_object": False}])
def test_free_text_has_no_structure(fields: dict[str, Any]) -> None:
    assert requested_structure(chat(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, 'response_format.type is "xml", must be one of text, json_object'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is null, must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "json_schema.schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": 1}}},
            "response_format.json_schema.strict is 1, must be a boolean",
        ),
        ({"structured_outputs": {"json": "{}", "regex": "a"}}, "sets json and regex, must set exactly one"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs has 'backend', must have one of json"),
        ({"structured_outputs": {"reasoning_end_token_ids": [1]}}, "structured_outputs has 'reasoning_end_token_ids'"),
        ({"guided_json": SCHEMA, "response_format": OF_OPENAI}, "guided_json and response_format exclude each other"),
        (
            {"structured_outputs": {"grammar": 'start: %json {"x-guidance": {"lenient": true}}'}},
            "structured_outputs.grammar holds 'x-guidance', an option of the grammar engine, must not",
        ),
        ({"guided_regex": "a", "stop": ["b"]}, "stop could end an output before it follows guided_regex"),
        ({"guided_regex": "a", "stop_token_ids": [1]}, "stop_token_ids could end an output"),
    ],
)
def test_wrong_forms_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidField, match="^.*" + message.replace("[", r"\[").replace(".", r"\.")) as error:
        sampling_params(chat(**fields), {}, 1, 100)
    assert error.value.field in fields


def test_plain_completions_have_the_same_fields() -> None:
    body = json.dumps({"prompt": "x", "response_format": OF_OPENAI}).encode()
    params = sampling_params(decode_body(body, CompletionRequest), {}, 1, 100)
    assert params.structured_outputs is not None
    assert params.structured_outputs.kind == "json"
