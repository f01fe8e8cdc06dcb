"""The items of /v1/responses, on an engine that generates given texts."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from dispec import SamplingParams
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.errors import EngineFailed
from tests.scripted_engine import ScriptedEngine, scripted_server, thinking_tokenizer
from tests.scripted_responses import QUESTION, Scripted, types_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return thinking_tokenizer()


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Scripted]:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine) as http:
        yield Scripted(engine, http)


@pytest.fixture
def scripted(shared: Scripted) -> Scripted:
    shared.engine.outputs.clear()
    return shared


def test_items_become_messages_in_order(scripted: Scripted) -> None:
    items = [
        {"role": "developer", "content": "Use few words."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Two", "annotations": []}],
        },
        {"role": "user", "content": "Three"},
    ]
    scripted.create("Four", items, instructions="Count.")
    expected = [("system", "Count."), ("system", "Use few words."), ("user", "One"), ("assistant", "Two")]
    turns = [*expected, ("user", "Three")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert scripted.engine.prompt == f"{prompt}<|im_start|>assistant\n"


def test_previous_response_id_continues_without_instructions(scripted: Scripted) -> None:
    first = scripted.create("Paris", instructions="Be brief.")
    second = scripted.create("Rome", "And of Italy?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    scripted.create("Bern", "And of Switzerland?", previous_response_id=second.id)
    turns = [("user", QUESTION), ("assistant", "Paris"), ("user", "And of Italy?"), ("assistant", "Rome")]
    turns.append(("user", "And of Switzerland?"))
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert scripted.engine.prompt == f"{prompt}<|im_start|>assistant\n"


def test_input_items_are_listed_in_pages(scripted: Scripted) -> None:
    first = scripted.create("Paris")
    second = scripted.create("Rome", "And of Italy?", previous_response_id=first.id)
    listed = scripted.responses.input_items.list(second.id, limit=2)
    assert [item.content[0].text for item in listed.data] == ["And of Italy?", "Paris"]
    assert listed.has_more
    assert [item.content[0].text for item in listed] == ["And of Italy?", "Paris", QUESTION]
    ascending = scripted.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in ascending.data] == ["message"] * 3
    assert ascending.data[1].id == first.output[0].id


def test_an_item_reference_is_the_stored_item(scripted: Scripted) -> None:
    first = scripted.create("Paris")
    for reference in ({"type": "item_reference", "id": first.output[0].id}, {"id": first.output[0].id}):
        scripted.create("Yes", [reference, {"role": "user", "content": "Is it?"}], store=False)
        assert "assistant\nParis<|im_end|>" in scripted.engine.prompt


def test_reasoning_is_an_item_before_the_message(scripted: Scripted) -> None:
    output = "<think>France, then.</think>Paris"
    whole = scripted.create(output)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "France, then."
    assert whole.output_text == "Paris"
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    events = scripted.raw_events(output)
    assert types_of(events)[2:-1] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    deltas = [(event["type"], event["delta"]) for event in events if event["type"].endswith(".delta")]
    joined = {kind: "".join(text for other, text in deltas if other == kind) for kind, _ in deltas}
    expected = {"response.reasoning_text.delta": "France, then.", "response.output_text.delta": "Paris"}
    assert joined == expected
    without_ids = [{**item, "id": None} for item in events[-1]["response"]["output"]]
    assert without_ids == [{**item.to_dict(), "id": None} for item in whole.output]


def test_reasoning_goes_back_into_the_prompt(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content or '' }}|{{ m.content }}]{% endfor %}<think>"
    )
    engine = ScriptedEngine(thinking_tokenizer(template=template))
    with scripted_server(engine) as http:
        scripted = Scripted(engine, http)
        first = scripted.create("Hm.</think>Paris")
        items = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output)]
        scripted.create("So.</think>Yes", [*items, {"role": "user", "content": "Sure?"}], store=False)
        assert engine.prompt == f"[user||{QUESTION}][assistant|Hm.|Paris][user||Sure?]<think>"
        scripted.create("So.</think>Yes", "Sure?", previous_response_id=first.id)
        assert engine.prompt == f"[user||{QUESTION}][assistant|Hm.|Paris][user||Sure?]<think>"


def test_logprobs_are_of_the_text_alone(scripted: Scripted, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"include": ["message.output_text.logprobs"]}
    whole = scripted.create("<think>Hm</think>Paris", **body)
    expected = [tokenizer.decode([token]) for token in tokenizer.encode("Paris", add_special_tokens=False)]
    tokens = [entry.token for entry in whole.output[1].content[0].logprobs]
    assert tokens == [*expected, "<|im_end|>"]
    events = scripted.raw_events("<think>Hm</think>Paris", **body)
    streamed = [entry["token"] for event in events if "delta" in event for entry in event.get("logprobs", ())]
    assert streamed == expected
    assert events[-1]["response"]["output"][1]["content"] == whole.output[1].to_dict()["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_output_that_is_cut_is_incomplete(scripted: Scripted, stream: bool) -> None:
    if stream:
        events = scripted.raw_events("a b c d e f", max_output_tokens=4)
        assert events[-1]["type"] == "response.incomplete"
        found = Response.model_validate(events[-1]["response"])
    else:
        found = scripted.create("a b c d e f", max_output_tokens=4)
    assert (found.status, found.output[0].status) == ("incomplete", "incomplete")
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.completed_at is None


def test_an_empty_output_is_an_empty_message(scripted: Scripted) -> None:
    found = scripted.create("")
    assert (found.status, found.output_text, found.output[0].type) == ("completed", "", "message")


def test_the_request_is_repeated_in_the_response(scripted: Scripted) -> None:
    given = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "max_output_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "me",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "truncation": "auto",
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
    }
    found = scripted.create("Paris", **given, service_tier="flex")
    assert {name: getattr(found, name) for name in given} == given
    assert found.service_tier == "default"
    assert found.text.format.type == "text"


def test_truncation_drops_the_oldest_turns(scripted: Scripted) -> None:
    turns = [
        {"role": role, "content": f"{role} {index} " + "word " * 300}
        for index in range(40)
        for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Now?"}]
    with pytest.raises(openai.BadRequestError) as error:
        scripted.create("x", items)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "input")
    scripted.create("Yes", items, truncation="auto")
    prompt = scripted.engine.prompt
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nuser ")
    kept = [index for index in range(40) if f"user {index} " in prompt]
    assert kept == list(range(kept[0], 40))
    assert prompt.endswith("<|im_start|>user\nNow?<|im_end|>\n<|im_start|>assistant\n")
    # One turn more would not fit.
    num_tokens = len(scripted.engine.requests[-1].prompt_token_ids)
    info = scripted.engine.info
    dropped = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns[:2])
    assert num_tokens < info.max_model_len <= num_tokens + len(scripted.engine.tokenizer.encode(dropped))
    with pytest.raises(openai.BadRequestError):
        scripted.create("x", "word " * 20000, truncation="auto")


class _Failing(ScriptedEngine):
    """Fails after the first tokens of an output."""

    def _outputs(self, index: int, text: str, params: SamplingParams) -> Any:
        outputs = super()._outputs(index, text, params)[:3]
        yield from outputs
        next(reversed(self._streams.values())).end("error", EngineFailed("the device is lost"))


def test_a_failure_in_mid_stream_is_an_event(tokenizer: Tokenizer) -> None:
    engine = _Failing(tokenizer)
    with scripted_server(engine) as http:
        scripted = Scripted(engine, http)
        events = scripted.raw_events("a b c d e f")
        assert events[-1]["type"] == "response.failed"
        failed = events[-1]["response"]
        assert failed["status"] == "failed"
        assert failed["error"] == {"code": "server_error", "message": "the device is lost"}
        assert failed["output"][0]["status"] == "incomplete"
        assert scripted.responses.retrieve(failed["id"]).status == "failed"
        with pytest.raises(openai.InternalServerError, match="the device is lost"):
            scripted.create("a b c d e f")
