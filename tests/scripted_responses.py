"""OpenAI's client of /v1/responses on an engine that generates given texts."""

import json
from typing import Any

import httpx
from openai import OpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.scripted_engine import ScriptedEngine

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
