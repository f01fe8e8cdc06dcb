"""/v1/responses as OpenAI's client meets it on a real server."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from dispec import LLM, SamplingParams
from tests.api_server import CONTEXT, MESSAGES, chat
from tests.scripted_responses import PATH, QUESTION, events_of, types_of
from tests.servers import Server, server, wait_for

pytest_plugins = ["tests.api_server"]


def test_a_response_equals_the_engine_output(client: OpenAI, llm: LLM) -> None:
    found = client.responses.create(
        model="tiny", instructions=MESSAGES[0]["content"], input=QUESTION, temperature=0, max_output_tokens=24
    )
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))
    Response.model_validate(found.to_dict())
    assert found.output_text == expected.outputs[0].text
    (message,) = found.output
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    assert message.content[0].annotations == []
    assert found.usage is not None
    assert found.usage.input_tokens == len(expected.prompt_token_ids)
    assert found.usage.output_tokens == len(expected.outputs[0].token_ids)
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert (found.model, found.temperature, found.max_output_tokens) == ("tiny", 0, 24)
    is_cut = expected.outputs[0].finish_reason == "length"
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
