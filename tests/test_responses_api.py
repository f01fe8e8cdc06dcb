"""/v1/responses as OpenAI's client meets it: on a real server, and on an engine that generates given texts."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from dispec import LLM, SamplingParams
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.errors import EngineFailed
from tests.api_server import CONTEXT, MESSAGES, chat
from tests.scripted_engine import ScriptedEngine, scripted_server, thinking_tokenizer
from tests.servers import Server, server, wait_for

pytest_plugins = ["tests.api_server"]

QUESTION = "What is the capital of France?"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PATH = "/v1/responses"


class Scripted:
    """OpenAI's client of a server whose engine generates the next of `outputs` for each request."""

    def __init__(self, engine: ScriptedEngine, http: httpx.Client) -> None:
        self.engine = engine
        self.http = http
        self.client = OpenAI(base_url="http://testserver/v1", api_key="any", http_client=http, max_retries=0)
        self.responses = self.client.responses

    def create(self, output: str, input: Any = QUESTION, **body: Any) -> Any:
        self.engine.outputs.append(output)
        return self.responses.create(model="tiny", input=input, **body)

    def raw_events(self, output: str, **body: Any) -> list[dict[str, Any]]:
        self.engine.outputs.append(output)
        text = self.http.post(PATH, json={"input": QUESTION, "stream": True} | body).text
        return events_of(text)


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


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is one that the client knows, in order, with its own name."""
    found = []
    *blocks, end = text.split("\n\n")
    assert end == ""
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        EVENTS.validate_python(found[-1])
        assert name == f"event: {found[-1]['type']}"
    first = found[0]["sequence_number"]
    assert [event["sequence_number"] for event in found] == list(range(first, first + len(found)))
    return found


def types_of(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, without those of pieces."""
    return [event["type"] for event in events if not event["type"].endswith(".delta")]


# On a real server


def test_a_response_equals_the_engine_output(client: OpenAI, llm: LLM) -> None:
    found = client.responses.create(
        model="tiny", instructions=MESSAGES[0]["content"], input=QUESTION, temperature=0, max_output_tokens=24
    )
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))
    Response.model_validate(found.to_dict())
    assert found.output_text == expected.text
    (message,) = found.output
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    assert message.content[0].annotations == []
    assert found.usage is not None
    assert found.usage.input_tokens == len(expected.prompt_token_ids)
    assert found.usage.output_tokens == len(expected.token_ids)
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert (found.model, found.temperature, found.max_output_tokens) == ("tiny", 0, 24)
    is_cut = expected.finish_reason == "length"
    assert found.status == message.status == ("incomplete" if is_cut else "completed")
    assert (found.incomplete_details is not None) == is_cut


def test_a_stream_has_the_whole_response_in_typed_events(client: OpenAI, served: Server) -> None:
    body: dict[str, Any] = {"input": QUESTION, "temperature": 1.0, "max_output_tokens": 30}
    whole = client.responses.create(model="tiny", extra_body={"seed": 3}, **body)
    with served.stream(PATH, body | {"seed": 3}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.read().decode())
    assert types_of(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert "".join(event.get("delta", "") for event in events) == whole.output_text
    assert events[-1]["response"]["output"][0]["content"] == whole.output[0].to_dict()["content"]
    assert events[-1]["response"]["usage"]["output_tokens"] == whole.usage.output_tokens
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]
    assert events[0]["response"]["output"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.2, "seed": 2, "top_p": 0.7},
        {"temperature": 1.2, "seed": 2, "top_k": 5, "min_p": 0.02},
        {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0, "logit_bias": {"70": 50, "71": -100}},
        {"temperature": 0, "allowed_token_ids": [40, 41, 42], "ignore_eos": True},
        {"temperature": 0, "bad_words": ["a", "the"], "skip_special_tokens": False},
        {"temperature": 0, "stop_token_ids": list(range(40, 200)), "min_tokens": 3},
        {"temperature": 1.0, "seed": -5, "stop": [" ", "e"], "include_stop_str_in_output": True},
    ],
    ids="-".join,
)
def test_parameters_reach_the_engine(served: Server, client: OpenAI, body: dict[str, Any]) -> None:
    found = served.post(PATH, {"input": QUESTION, "max_output_tokens": 20} | body).json()
    expected = chat(client, [{"role": "user", "content": QUESTION}], max_completion_tokens=20, **body)
    assert found["output"][0]["content"][0]["text"] == expected.choices[0].message.content
    assert found["usage"]["output_tokens"] == expected.usage.completion_tokens


def test_logprobs_are_those_of_chats(client: OpenAI) -> None:
    found = client.responses.create(
        model="tiny",
        input=QUESTION,
        temperature=0,
        max_output_tokens=12,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    expected = chat(
        client,
        [{"role": "user", "content": QUESTION}],
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    content = found.output[0].to_dict()["content"][0]
    assert content["logprobs"] == expected.choices[0].logprobs.to_dict()["content"]


def test_background_work_goes_on_without_its_client(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": QUESTION, "temperature": 0, "max_output_tokens": 40}
    started = client.responses.create(background=True, **body)
    Response.model_validate(started.to_dict())
    assert (started.status, started.output, started.background) == ("queued", [], True)
    ended = wait_for(lambda: _ended(client, started.id), "the end")
    assert ended.output_text == client.responses.create(**body).output_text
    assert ended.created_at == started.created_at
    again = client.responses.cancel(started.id)
    assert again.status == ended.status


def _ended(client: OpenAI, response_id: str) -> Any:
    found = client.responses.retrieve(response_id)
    return None if found.status in ("queued", "in_progress") else found


def test_cancelling_ends_the_work_of_the_engine(client: OpenAI, served: Server) -> None:
    started = client.responses.create(
        model="tiny", input=QUESTION, background=True, extra_body={"ignore_eos": True}, max_output_tokens=CONTEXT - 100
    )
    cancelled = client.responses.cancel(started.id)
    assert cancelled.status == client.responses.retrieve(started.id).status == "cancelled"
    wait_for(served.is_idle, "an idle engine")
    with pytest.raises(openai.BadRequestError, match="whose status is cancelled"):
        client.responses.create(model="tiny", input="And?", previous_response_id=started.id)


def test_deleting_ends_the_work_of_the_engine(client: OpenAI, served: Server) -> None:
    started = client.responses.create(
        model="tiny", input=QUESTION, background=True, extra_body={"ignore_eos": True}, max_output_tokens=CONTEXT - 100
    )
    client.responses.delete(started.id)
    wait_for(served.is_idle, "an idle engine")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(started.id)


def test_a_background_stream_is_read_again_from_any_event(client: OpenAI, served: Server) -> None:
    body = {"input": QUESTION, "background": True, "temperature": 0, "max_output_tokens": 60}
    with served.stream(PATH, body) as answer:  # leaves after the first bytes
        first = next(answer.iter_text())
    created = json.loads(first.split("\n\n")[0].split("\ndata: ")[1])["response"]
    assert created["status"] == "queued"
    events = events_of(served.get(f"{PATH}/{created['id']}", params={"stream": "true"}).text)
    assert types_of(events)[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert events[-1]["response"]["status"] in ("completed", "incomplete")
    later = client.responses.retrieve(created["id"], stream=True, starting_after=4)
    assert [event.sequence_number for event in later] == list(range(5, len(events)))
    with client.responses.stream(response_id=created["id"]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == client.responses.retrieve(created["id"]).output_text


def test_work_ends_when_its_client_leaves(client: OpenAI, served: Server) -> None:
    body = {"input": QUESTION, "ignore_eos": True, "max_output_tokens": CONTEXT - 100}
    with served.stream(PATH, body) as answer:
        next(answer.iter_text())
    wait_for(served.is_idle, "an idle engine")
    for timeout in (0.2, 0.1, 0.05, 0.02):
        try:
            served.post(PATH, body, timeout=timeout)
        except httpx.ReadTimeout:
            break
    else:
        pytest.fail("the whole answer always came before the client left")
    wait_for(served.is_idle, "an idle engine")
    lines = wait_for(
        lambda: [line for line in served.log_lines() if line.get("path") == PATH and line["status"] == 499]
    )
    assert all(line["prompt_tokens"] > 0 for line in lines)


def test_draining_finishes_background_work(model: Any, tmp_path: Any) -> None:
    with server(tmp_path, model) as running:
        body = {"input": QUESTION, "background": True, "ignore_eos": True, "max_output_tokens": 200}
        id = running.post(PATH, body).json()["id"]
        running.process.terminate()
        assert running.process.wait(60) == 0
        finished = [line for line in running.log_lines() if line.get("response_id") == id]
        assert [line["path"] for line in finished] == [PATH]
        assert "aborted" not in running.log.read_text()


# Items, on an engine with given outputs


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


# The store


def test_store_false_keeps_nothing(scripted: Scripted) -> None:
    found = scripted.create("Paris", store=False)
    for call in (scripted.responses.retrieve, scripted.responses.delete, scripted.responses.cancel):
        with pytest.raises(openai.NotFoundError) as error:
            call(found.id)
        assert error.value.param == "response_id"
    with pytest.raises(openai.NotFoundError) as error:
        scripted.create("x", previous_response_id=found.id)
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_stored_response_is_retrieved_and_deleted(scripted: Scripted) -> None:
    found = scripted.create("Paris", metadata={"a": "b"})
    assert scripted.responses.retrieve(found.id).to_dict() == found.to_dict()
    with pytest.raises(openai.BadRequestError, match="not created with background"):
        scripted.responses.cancel(found.id)
    scripted.responses.delete(found.id)
    with pytest.raises(openai.NotFoundError):
        scripted.responses.retrieve(found.id)
    with pytest.raises(openai.BadRequestError, match="which no stored response has"):
        scripted.create("x", [{"type": "item_reference", "id": found.output[0].id}])


def test_the_oldest_responses_go_first(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_responses=2) as http:
        scripted = Scripted(engine, http)
        first, *others = [scripted.create(text) for text in ("one", "two", "three")]
        with pytest.raises(openai.NotFoundError):
            scripted.responses.retrieve(first.id)
        assert [scripted.responses.retrieve(other.id).output_text for other in others] == ["two", "three"]
        # A conversation stays whole as long as its last response.
        second = scripted.create("four", "And?", previous_response_id=others[1].id)
        scripted.create("five")
        scripted.create("six", "And?", previous_response_id=second.id)
        assert "assistant\nthree<|im_end|>" in engine.prompt
        assert "assistant\nfour<|im_end|>" in engine.prompt


def test_the_bytes_of_stored_responses_are_bounded(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_response_bytes=20_000) as http:
        scripted = Scripted(engine, http)
        found = [scripted.create("Paris", f"{index} " + "x" * 5000) for index in range(5)]
        stored = [scripted.http.get(f"{PATH}/{response.id}").status_code == 200 for response in found]
        assert stored == [False, False, True, True, True]
    with scripted_server(engine, max_stored_response_bytes=1000) as http:
        scripted = Scripted(engine, http)
        assert scripted.http.get(f"{PATH}/{scripted.create('Paris', 'x' * 1000).id}").status_code == 404


def test_a_server_that_stores_nothing(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer)
    with scripted_server(engine, max_stored_responses=0) as http:
        scripted = Scripted(engine, http)
        assert scripted.create("Paris").to_dict()["store"] is False
        with pytest.raises(openai.BadRequestError, match="this server stores no responses"):
            scripted.create("x", background=True)


# Refusals


def _message(**fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "Hi"} | fields]}


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": None}, "input", "input is null, must be a text or a list"),
        ({"input": []}, "input", "input is empty"),
        ({"input": ["Hi"]}, "input", 'input[0] is "Hi", must be an object'),
        (_message(role="robot"), "input", 'input[0].role is "robot", must be one of user, assistant'),
        (_message(role=None), "input", "input[0].role is missing"),
        (_message(content=None), "input", "input[0].content is missing"),
        (_message(content=7), "input", "input[0].content is 7, must be a text or a list of parts"),
        (
            _message(content=[{"type": "input_image", "image_url": "x"}]),
            "input",
            'input[0].content[0].type is "input_image", must be input_text',
        ),
        (_message(content=[{"type": "input_text"}]), "input", "input[0].content[0].text is missing"),
        ({"input": [{"type": "computer_call"}]}, "input", 'input[0].type is "computer_call", must be one of message'),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "input[0].call_id is missing"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
            "input",
            'input[0].call_id is "c", which no function call before it has',
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", 'input[0].id is "x", which no stored response'),
        (
            {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]},
            "input",
            "input[0].encrypted_content is not supported",
        ),
        ({"model": "gpt-9"}, "model", "model is 'gpt-9'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0, must be between 1 and"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens=1000000 cannot be greater than"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"truncation": "some"}, "truncation", "truncation is 'some', must be auto or disabled"),
        ({"include": ["x"]}, "include", "include has 'x', must be of"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3, must come with include"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs is 21, must be between 0 and 20"),
        ({"stream_options": {}}, "stream_options", "stream_options is only for requests with stream true"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            "stream_options.include_obfuscation is not supported",
        ),
        ({"background": True, "store": False}, "background", "background is true and store is false"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata", "metadata holds 17 pairs, must be at most"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "metadata.a has 513 characters, must be at most 512"),
        ({"metadata": {"a" * 65: "x"}}, "metadata", "metadata has a key of 65 characters, must be at most 64"),
        ({"metadata": {"a": 1}}, "metadata", "metadata"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity is not supported"),
        ({"text": {"format": {}}}, "text", "text.format.type is missing"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text", "text.format.name is missing"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "text.format.schema is missing"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "reasoning.summary is not supported"),
        ({"reasoning": {"effort": "much"}}, "reasoning", "reasoning.effort is 'much'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type is 'web_search', must be function: this server"),
        ({"tools": [{"name": "f"}]}, "tools", "tools[0].type is null, must be function"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].name is None, must be 1 to 64 letters"),
        ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools", "tools[0].parameters.type is 'array'"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools", "tools[0].defer_loading is not supported"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice", "tool_choice is 'some', must be none, auto"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice is only for requests with tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice.type is 'mcp', must be"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "tool_choice.name is None, must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}},
            "tool_choice",
            "tool_choice.tools[0].name is 'g', must be the name of one of the tools",
        ),
        ({"prompt": {"id": "x"}}, "prompt", "prompt is not supported here"),
        ({"conversation": "c"}, "conversation", "conversation is not supported here"),
        ({"messages": [{}]}, "messages", "messages is not supported here"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options", "prompt_cache_options.prewarm is not"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_refusals_name_the_field(scripted: Scripted, body: dict[str, Any], param: str, said: str) -> None:
    answer = scripted.http.post(PATH, json={"input": "Hi"} | body)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(said)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=true", "stream"),
        ("?stream=maybe", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=false&starting_after=1", "starting_after"),
        ("?include=message.output_text.logprobs", "include"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=x", "after"),
    ],
)
def test_refusals_of_queries(scripted: Scripted, path: str, param: str) -> None:
    found = scripted.create("Paris")
    answer = scripted.http.get(f"{PATH}/{found.id}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
