"""/v1/messages and /v1/messages/count_tokens as Anthropic's own client meets them."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from dispec import LLM, SamplingParams
from dispec.serving.client.errors import EngineFailed, Overloaded
from dispec.serving.client.request_stream import GenerationRequest, RequestStream
from tests.anthropic_client import anthropic_client
from tests.api_server import CONTEXT
from tests.scripted_engine import ScriptedEngine, thinking_tokenizer
from tests.servers import Server, wait_for

pytest_plugins = ["tests.api_server"]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
THOUGHT = "A capital.\n\nIt is Paris."
OUTPUT = f"<think>\n{THOUGHT}\n</think>\n\nParis."


@pytest.fixture
def claude(served: Server) -> Iterator[Anthropic]:
    """A client; the engine is idle again after the test."""
    with Anthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        yield client
    wait_for(served.is_idle, "an idle engine")


def ask(claude: Anthropic, **body: Any) -> anthropic.types.Message:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "extra_body": {"temperature": 0}} | body
    return claude.messages.create(**given)


def stream(claude: Anthropic, **body: Any) -> Any:
    given = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "extra_body": {"temperature": 0}} | body
    return claude.messages.stream(**given)


# On an engine with a model


def test_a_message_equals_the_engine_output(claude: Anthropic, llm: LLM) -> None:
    answer = ask(claude, system="Be brief.")
    chat = [{"role": "system", "content": "Be brief."}, *QUESTION]
    (expected,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=24))
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
    assert answer.id.startswith("msg_")
    assert [(block.type, block.text) for block in answer.content] == [("text", expected.outputs[0].text)]
    assert answer.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[expected.outputs[0].finish_reason]
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(expected.prompt_token_ids)
    assert answer.usage.output_tokens == len(expected.outputs[0].token_ids)


def test_a_stream_is_the_message_in_pieces(claude: Anthropic) -> None:
    whole = ask(claude)
    with stream(claude) as events:
        pieces = list(events.text_stream)
        final = events.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == whole.content[0].text
    leave = {"id": True, "usage": {"input_tokens", "cache_read_input_tokens"}}  # the prompt is cached by now
    ours, theirs = (message.model_dump(exclude=leave) for message in (final, whole))
    ours["content"][0].pop("parsed_output", None)
    assert ours == theirs


def test_the_events_of_a_stream(served: Server) -> None:
    body = {"messages": QUESTION, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with served.stream("/v1/messages", body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = [event.split("\n") for event in text.split("\n\n") if event]
    names = [name.removeprefix("event: ") for name, _ in events]
    expected = ["message_start", "content_block_start", *["content_block_delta"] * names.count("content_block_delta")]
    assert names == [*expected, "content_block_stop", "message_delta", "message_stop"]
    assert all(data.startswith(f'data: {{"type":"{name}"') for name, (_, data) in zip(names, events, strict=True))
    assert "[DONE]" not in text


def test_sampling_parameters_reach_the_engine(claude: Anthropic, llm: LLM) -> None:
    for given in ({"temperature": 1.2, "seed": 2, "top_p": 0.7}, {"temperature": 1.2, "seed": 2, "top_k": 5}):
        answer = ask(claude, extra_body=given)
        assert answer.content[0].text == llm.chat(QUESTION, SamplingParams(max_tokens=24, **given))[0].outputs[0].text


def test_stop_sequences(claude: Anthropic) -> None:
    text = ask(claude).content[0].text
    stop = text[8:10]
    answer = ask(claude, stop_sequences=["never", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]
    with stream(claude, stop_sequences=["never", stop]) as events:
        final = events.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert final.content[0].text == answer.content[0].text


def test_an_answer_that_fills_the_context(claude: Anthropic) -> None:
    answer = ask(claude, max_tokens=CONTEXT, extra_body={"temperature": 0, "ignore_eos": True})
    assert answer.stop_reason == "model_context_window_exceeded"
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens == CONTEXT
    assert ask(claude, max_tokens=5, extra_body={"ignore_eos": True}).stop_reason == "max_tokens"


def test_the_last_message_of_the_assistant_is_continued(claude: Anthropic, llm: LLM) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "The capital of"}]}]
    chat = [*QUESTION, {"role": "assistant", "content": "The capital of"}]
    prompt = llm.tokenizer.apply_chat_template(chat, False, continue_final_message=True)
    expected = llm.generate(llm.tokenizer.encode(prompt, False), SamplingParams(temperature=0, max_tokens=24))
    assert ask(claude, messages=begun).content[0].text == expected[0].outputs[0].text


def test_counted_tokens_are_those_of_the_prompt(claude: Anthropic) -> None:
    body = {"model": "tiny", "system": [{"type": "text", "text": "Be brief."}], "messages": QUESTION}
    usage = ask(claude, **body, max_tokens=1).usage
    counted = claude.messages.count_tokens(**body).input_tokens
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    long = [{"role": "user", "content": "many words " * CONTEXT}]  # as many as no message may have
    assert claude.messages.count_tokens(model="tiny", messages=long).input_tokens > CONTEXT


def test_tokens_from_the_cache_are_counted_apart(claude: Anthropic) -> None:
    asked = [{"role": "user", "content": "This is said once before, and long enough for several blocks. " * 3}]
    first, second = (ask(claude, messages=asked, max_tokens=1).usage for _ in range(2))
    assert first.cache_read_input_tokens < second.cache_read_input_tokens
    assert second.cache_creation_input_tokens == 0
    totals = {usage.input_tokens + usage.cache_read_input_tokens for usage in (first, second)}
    assert len(totals) == 1


def test_a_client_that_leaves_aborts_its_request(claude: Anthropic, served: Server) -> None:
    endless = {"temperature": 0, "ignore_eos": True}
    with stream(claude, max_tokens=CONTEXT, extra_body=endless) as events:
        next(iter(events.text_stream))
        assert served.stats()["requests"]
    wait_for(served.is_idle, "an idle engine")


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ({"model": "claude-opus-4"}, anthropic.NotFoundError, "model is 'claude-opus-4', this server has 'tiny'"),
        ({"messages": []}, anthropic.BadRequestError, "messages is empty"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens is 0"),
        ({"max_tokens": CONTEXT + 1}, anthropic.BadRequestError, "max_tokens=513 cannot be greater"),
        ({"stop_sequences": list("abcde")}, anthropic.BadRequestError, "stop_sequences holds 5 texts"),
        ({"extra_body": {"top_p": 7}}, anthropic.BadRequestError, "top_p is 7"),
        ({"container": "x"}, anthropic.BadRequestError, "container is not supported here"),
        (
            {"messages": [*QUESTION, {"role": "user", "content": "x " * CONTEXT}]},
            anthropic.BadRequestError,
            "prompt is too long",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(claude: Anthropic, body: dict[str, Any], error: type[anthropic.APIStatusError], said: str) -> None:
    for streams in (False, True):
        with pytest.raises(error) as found:
            ask(claude, stream=streams, **body)
        assert said in str(found.value.api_message)
        assert found.value.type == {400: "invalid_request_error", 404: "not_found_error"}[found.value.status_code]
        assert found.value.body["type"] == "error"
        assert found.value.body["request_id"] == found.value.request_id
    if "max_tokens" not in body and "stop_sequences" not in body and "prompt is" not in said and "top_p" not in said:
        counted = {"model": "tiny", "messages": QUESTION} | body
        with pytest.raises(error):
            claude.post("/v1/messages/count_tokens", body=counted, cast_to=object)


# On an engine that answers what the test says


def test_thinking_is_a_block_of_its_own() -> None:
    engine = ScriptedEngine(thinking_tokenizer(), [OUTPUT] * 3)
    marked = engine.tokenizer.encode(OUTPUT.removesuffix("\n\nParis."))
    with anthropic_client(engine) as claude:
        answer = ask(claude, thinking={"type": "enabled", "budget_tokens": 2000}, max_tokens=2001)
        with stream(claude, max_tokens=2001) as events:
            seen = [(event.type, getattr(event, "thinking", "") or getattr(event, "text", "")) for event in events]
            final = events.get_final_message()
        hidden = ask(claude, thinking={"type": "adaptive", "display": "omitted"}, max_tokens=200)
    for message in (answer, final):
        thinking, text = message.content
        assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", THOUGHT, "")
        assert (text.type, text.text) == ("text", "Paris.")
        assert message.usage.output_tokens_details.thinking_tokens == len(marked)
    assert "".join(text for kind, text in seen if kind == "thinking") == THOUGHT
    assert "signature" in [kind for kind, _ in seen]
    assert [block.type for block in hidden.content] == ["text"]


def test_thinking_that_is_disabled() -> None:
    engine = ScriptedEngine(thinking_tokenizer(), ["Paris.", "Paris."])
    with anthropic_client(engine) as claude:
        answer = ask(claude, thinking={"type": "disabled"})
        assert engine.prompt.endswith("<think>\n\n</think>\n\n")
        assert [block.type for block in answer.content] == ["text"]
        counted = claude.messages.count_tokens(model="tiny", messages=QUESTION, thinking={"type": "disabled"})
        assert counted.input_tokens == answer.usage.input_tokens
        ask(claude, thinking={"type": "adaptive"})
        assert engine.prompt.endswith("<|im_start|>assistant\n")


class FailingEngine(ScriptedEngine):
    """Refuses requests, or ends them with an error after their first token."""

    def __init__(self, refusal: Exception | None = None) -> None:
        super().__init__(thinking_tokenizer(), ["Paris."])
        self._refusal = refusal

    def submit(self, request: GenerationRequest) -> RequestStream:
        if self._refusal is not None:
            raise self._refusal
        stream = super().submit(request)
        take = stream.take

        def take_one(*args: Any) -> None:
            take(*args)
            stream.end("error", EngineFailed("the step failed"))

        stream.take = take_one  # type: ignore[method-assign]
        return stream


def test_an_error_in_the_middle_of_a_stream() -> None:
    with anthropic_client(FailingEngine()) as claude, stream(claude) as events:
        with pytest.raises(anthropic.APIStatusError) as found:
            list(events)
        assert (found.value.type, found.value.api_message) == ("api_error", "the step failed")


def test_overload_may_be_tried_again() -> None:
    with anthropic_client(FailingEngine(Overloaded("the queue is full", 3.0))) as claude:
        with pytest.raises(anthropic.ServiceUnavailableError) as found:
            ask(claude)
        assert found.value.type == "overloaded_error"
        assert found.value.response.headers["retry-after"] == "3"


def test_keys() -> None:
    engine = ScriptedEngine(thinking_tokenizer(), ["Paris."] * 2)
    with anthropic_client(engine, "right", keys=("right",)) as claude:
        assert ask(claude).content[0].text == "Paris."
        wrong = claude.copy(api_key="wrong")
        assert ask(wrong, extra_headers={"Authorization": "Bearer right"}).content[0].text == "Paris."
        with pytest.raises(anthropic.AuthenticationError) as found:
            ask(wrong)
        assert found.value.type == "authentication_error"
        assert found.value.body["request_id"] == found.value.request_id
        assert [model.id for model in claude.models.list()] == ["tiny"]


def test_errors_outside_of_the_route() -> None:
    with anthropic_client(ScriptedEngine(thinking_tokenizer()), max_body_bytes=1024) as claude:
        with pytest.raises(anthropic.ContentTooLargeError) as found:
            ask(claude, system="x" * 2000)
        assert found.value.type == "request_too_large"
        with pytest.raises(anthropic.NotFoundError) as unknown:
            claude.post("/v1/messages/batches", body={}, cast_to=object)
        assert unknown.value.type == "not_found_error"
        with pytest.raises(anthropic.APIStatusError) as wrong:
            claude.get("/v1/messages", cast_to=object)
        assert (wrong.value.status_code, wrong.value.type) == (405, "invalid_request_error")
