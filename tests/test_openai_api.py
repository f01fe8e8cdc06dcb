"""The API as OpenAI's own client meets it, against a real server process: answers equal `LLM`'s own."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from dispec import LLM, SamplingParams
from dispec.serving.api.context import generation_defaults
from dispec.serving.api.logprobs import finite
from tests.api_server import CONTEXT, MESSAGES, PARAMETERS, chat, complete
from tests.servers import Server
from tests.small_engine import prompt_logprobs, random_tokens, sampled_logprobs

pytestmark = pytest.mark.smoke

pytest_plugins = ["tests.api_server"]


# Answers


def test_chat_completion_equals_the_engine_output(client: OpenAI, llm: LLM) -> None:
    answer = chat(client, temperature=0, max_tokens=24)
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.usage.total_tokens == len(expected.prompt_token_ids) + len(expected.outputs[0].token_ids)


def test_stream_concatenates_to_the_response(client: OpenAI) -> None:
    body = {"temperature": 1.0, "seed": 3, "max_tokens": 30, "n": 3}
    whole = chat(client, **body)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **body))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)
    for index in range(3):
        own = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[index].message.content
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == whole.choices[index].finish_reason


def test_stream_has_no_usage_by_default(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True, max_tokens=3, temperature=0))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_continuous_usage_stats(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options, max_tokens=8, temperature=0, ignore_eos=True))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_stream_bytes(served: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    with served.stream("/v1/completions", body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_a_prompt_in_its_four_forms(client: OpenAI, llm: LLM, form: str) -> None:
    texts = ["The quick brown fox", "Es war einmal"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    prompt = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": ids}[form]
    answer = complete(client, prompt, temperature=0, max_tokens=12)
    expected = llm.generate(texts[: len(answer.choices)], SamplingParams(temperature=0, max_tokens=12))
    assert [choice.text for choice in answer.choices] == [completion.outputs[0].text for completion in expected]
    assert len(answer.choices) == (1 if form in ("text", "ids") else 2)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_numbered_through(client: OpenAI, llm: LLM, stream: bool) -> None:
    prompts = ["The quick brown fox", "Es war einmal", "def add(a, b):"]
    answer = complete(client, prompts, n=2, seed=5, max_tokens=10, temperature=0.8, stream=stream)
    params = SamplingParams(n=2, seed=5, max_tokens=10, temperature=0.8)
    expected = [choice.text for completion in llm.generate(prompts, params) for choice in completion.outputs]
    found = [""] * 6
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == expected


# Parameters


@pytest.mark.parametrize("body", PARAMETERS, ids="-".join)
def test_parameters_reach_the_engine(client: OpenAI, llm: LLM, body: dict[str, Any]) -> None:
    answer = complete(client, "The quick brown fox", max_tokens=20, **body)
    given = dict(body)
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    expected = llm.generate("The quick brown fox", SamplingParams(max_tokens=20, **given))[0]
    for found, choice in zip(answer.choices, expected.outputs, strict=True):
        assert found.text == choice.text
        assert found.finish_reason == choice.finish_reason
        assert found.stop_reason == choice.stop_reason


def test_max_completion_tokens_is_max_tokens(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, temperature=0, ignore_eos=True, **{name: 7})
        assert answer.usage.completion_tokens == 7
        assert answer.choices[0].finish_reason == "length"


def test_default_max_tokens(client: OpenAI) -> None:
    assert complete(client, "hello", temperature=0, ignore_eos=True).usage.completion_tokens == 16
    assert chat(client, temperature=0, ignore_eos=True).usage.total_tokens == CONTEXT


def test_nulls_and_unknown_fields_mean_nothing(served: Server) -> None:
    names = ["temperature", "top_p", "n", "stop", "seed", "logprobs", "top_logprobs", "response_format", "tools"]
    names += ["max_tokens", "stream", "stream_options", "logit_bias", "user", "top_k", "cache_salt", "request_id"]
    body = {"messages": MESSAGES, "max_completion_tokens": 3} | dict.fromkeys(names)
    plain = {"messages": MESSAGES, "max_tokens": 3, "seed": 1}
    assert served.post("/v1/chat/completions", body).status_code == 200
    more = {"user": "me", "metadata": {"a": "b"}, "no_such_field": [1], "parallel_tool_calls": True}
    more |= {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1, "suffix": ""}
    answers = [served.post("/v1/chat/completions", plain | extra).json() for extra in ({}, more)]
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("best_of", 3),
        ("suffix", "end"),
        ("logits_processors", ["x"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("chat_template", "{{ 1 }}"),
        ("echo", True),
    ],
)
def test_unsupported_fields_are_refused_by_name(client: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **{field: value})
    assert error.value.param == field
    assert error.value.code == "not_supported"
    assert field in error.value.body["message"]


def test_sampling_defaults_of_the_checkpoint(tmp_path: Path, model: Path) -> None:
    stated = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "repetition_penalty": "high"}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert generation_defaults(str(tmp_path)) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert generation_defaults(str(tmp_path / "none")) == {}


# Log-probabilities


def test_logprobs_of_a_chat(client: OpenAI, llm: LLM) -> None:
    answer = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    (expected,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=8, logprobs=3))
    content = answer.choices[0].logprobs.content
    assert len(content) == len(expected.outputs[0].token_ids)
    for found, token, entry in zip(
        content, expected.outputs[0].token_ids, expected.outputs[0].logprobs or [], strict=True
    ):
        assert found.logprob == pytest.approx(entry[token].logprob, abs=1e-4)
        assert bytes(found.bytes) == llm.tokenizer.token_bytes(token)
        top = [one.logprob for one in entry.values()]  # greedy: the token is the likeliest one
        assert [one.logprob for one in found.top_logprobs] == pytest.approx(top, abs=1e-4)
        assert found.token == found.top_logprobs[0].token
    chunks = chat(client, temperature=0, max_tokens=8, logprobs=True, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for piece in pieces if piece is not None for entry in piece.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert all(entry.top_logprobs == [] for entry in streamed)


def test_loglikelihood_requests_of_evaluation_harnesses(client: OpenAI, llm: LLM) -> None:
    prompts = [random_tokens(20, 1), random_tokens(33, 2), llm.tokenizer.encode("What is the capital of France?")]
    answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    for choice, prompt, expected in zip(answer.choices, prompts, llm.generate(prompts, params), strict=True):
        logprobs = choice.logprobs
        values, tops = logprobs.token_logprobs, logprobs.top_logprobs
        assert len(values) == len(tops) == len(logprobs.tokens) == len(logprobs.text_offset) == len(prompt) + 1
        assert values[0] is None
        assert tops[0] is None
        entries = prompt_logprobs(expected) + sampled_logprobs(expected.outputs[0])
        assert values[1:] == pytest.approx([entry.logprob for entry in entries], abs=1e-4)
        for value, top, entry in zip(values[1:], tops[1:], entries, strict=True):
            assert (value == max(top.values())) == (entry.rank == 1)  # exactly
        assert choice.text.startswith(llm.tokenizer.decode(prompt, skip_special_tokens=False))


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: OpenAI, stream: bool) -> None:
    prompt = "The quick brown fox"
    body = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 2, "logprobs": 0}
    plain = complete(client, prompt, **body)
    found: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    answer = complete(client, prompt, echo=True, stream=stream, **body)
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    for index in range(2):
        assert found[index] == prompt + plain.choices[index].text
        assert "".join(tokens[index]).startswith(prompt)
        assert len(offsets[index]) == len(tokens[index])
        assert offsets[index][-5] == len(prompt)


def test_prompt_without_output(client: OpenAI) -> None:
    answer = complete(client, "The quick brown fox", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "The quick brown fox"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_prompt_logprobs_in_the_shape_of_vllm(served: Server, llm: LLM) -> None:
    ids = random_tokens(12)
    body = {"prompt": ids, "prompt_logprobs": 2, "max_tokens": 1}
    found = served.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    expected = llm.generate([ids], SamplingParams(prompt_logprobs=2, max_tokens=1))[0].prompt_logprobs or []
    assert found[0] is expected[0] is None
    for path, given in (("/v1/completions", {"prompt": ids}), ("/v1/chat/completions", {"messages": MESSAGES})):
        answer = served.post(path, given | {"max_tokens": 1}).json()
        where = answer["choices"][0] if path == "/v1/completions" else answer
        assert where["prompt_logprobs"] is None  # and not left out
    for shown, entry in zip(found[1:], expected[1:], strict=True):
        assert entry is not None
        assert shown.keys() == {str(token) for token in entry}
        for token, one in entry.items():
            assert shown[str(token)]["rank"] == one.rank
            assert shown[str(token)]["logprob"] == pytest.approx(one.logprob, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_as_their_ids(client: OpenAI, llm: LLM, stream: bool) -> None:
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_tokens_as_token_ids": True, "stream": stream}
    expected = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2))[0]
    ids = [f"token_id:{token}" for token in expected.outputs[0].token_ids]
    answer = complete(client, "The quick", logprobs=2, **body)
    found = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    assert [token for logprobs in found for token in logprobs.tokens] == ids
    tops = [top for logprobs in found for top in logprobs.top_logprobs]
    assert tops[0].keys() == {f"token_id:{token}" for token in (expected.outputs[0].logprobs or [])[0]}
    answer = chat(client, logprobs=True, top_logprobs=2, **body)
    pieces = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    entries = [entry for piece in pieces if piece is not None for entry in piece.content]
    (told,) = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2))
    assert [entry.token for entry in entries] == [f"token_id:{token}" for token in told.outputs[0].token_ids]
    assert [bytes(entry.bytes) for entry in entries] == [
        llm.tokenizer.token_bytes(token) for token in told.outputs[0].token_ids
    ]
    assert all(top.token.startswith("token_id:") for entry in entries for top in entry.top_logprobs)


def test_impossible_logprobs_are_finite(served: Server) -> None:
    assert [finite(value) for value in (float("nan"), float("-inf"), -1e6, -2.5)] == [-9999.0] * 3 + [-2.5]
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 5, "allowed_token_ids": [50]}
    answer = served.post("/v1/completions", body)
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"]
