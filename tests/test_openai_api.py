"""The API as OpenAI's own client meets it, against a real server process: answers equal `LLM`'s own."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from engine import LLM, Completion, SamplingParams
from serving.logprobs import finite
from serving.service import generation_defaults
from tests.checkpoints import EOS_TOKEN_ID, save_tiny
from tests.servers import Server, server, wait_for
from tests.small_engine import make, random_tokens

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3", max_position_embeddings=CONTEXT)
    return directory


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), model) as running:
        yield running


@pytest.fixture
def client(served: Server) -> Iterator[OpenAI]:
    """Whatever a test did, nothing of it is left in the engine."""
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client
    wait_for(served.is_idle, "an idle engine")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return make(model)


def complete(client: OpenAI, prompt: Any, **body: Any) -> openai.types.Completion:
    names = set(openai.types.completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    extra = {name: body.pop(name) for name in list(body) if name not in names}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **body)


def chat(client: OpenAI, messages: list[Any] | None = None, **body: Any) -> Any:
    names = set(openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    extra = {name: body.pop(name) for name in list(body) if name not in names}
    return client.chat.completions.create(model="tiny", messages=messages or MESSAGES, extra_body=extra, **body)


# Answers


def test_a_chat_answers_as_the_engine_does(client: OpenAI, llm: LLM) -> None:
    answer = chat(client, temperature=0, max_tokens=24)
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24))
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == len(expected.prompt_token_ids) + len(expected.token_ids)


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
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


def test_without_being_asked_a_stream_tells_no_usage(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True, max_tokens=3, temperature=0))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_usage_with_every_chunk(client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options, max_tokens=8, temperature=0, ignore_eos=True))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_the_bytes_of_a_stream(served: Server) -> None:
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
    assert [choice.text for choice in answer.choices] == [completion.text for completion in expected]
    assert len(answer.choices) == (1 if form in ("text", "ids") else 2)
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_numbered_through(client: OpenAI, llm: LLM, stream: bool) -> None:
    prompts = ["The quick brown fox", "Es war einmal", "def add(a, b):"]
    answer = complete(client, prompts, n=2, seed=5, max_tokens=10, temperature=0.8, stream=stream)
    params = SamplingParams(n=2, seed=5, max_tokens=10, temperature=0.8)
    expected = [choice.text for completion in llm.generate(prompts, params) for choice in completion.choices]
    found = [""] * 6
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == expected


# Parameters


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_p": 0.7},
    {"temperature": 1.2, "seed": 2, "top_k": 5, "min_p": 0.02},
    {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0, "logit_bias": {"70": 50, "71": -100}},
    {"temperature": 0, "allowed_token_ids": [40, 41, 42]},
    {"temperature": 0, "bad_words": ["a", "the"]},
    {"temperature": 0, "stop_token_ids": list(range(40, 200)), "min_tokens": 3},
    {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False},
    {"temperature": 1.0, "seed": -5, "stop": [" ", "e", "\n", "a"], "include_stop_str_in_output": True},
    {"temperature": 1.0, "seed": 9, "n": 4},
]


@pytest.mark.parametrize("body", PARAMETERS, ids="-".join)
def test_parameters_reach_the_engine(client: OpenAI, llm: LLM, body: dict[str, Any]) -> None:
    answer = complete(client, "The quick brown fox", max_tokens=20, **body)
    given = dict(body)
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    expected = llm.generate("The quick brown fox", SamplingParams(max_tokens=20, **given))[0]
    for found, choice in zip(answer.choices, expected.choices, strict=True):
        assert found.text == choice.text
        assert found.finish_reason == choice.finish_reason
        assert found.stop_reason == choice.stop_reason


def test_max_completion_tokens_is_max_tokens(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, temperature=0, ignore_eos=True, **{name: 7})
        assert answer.usage.completion_tokens == 7
        assert answer.choices[0].finish_reason == "length"


def test_how_long_an_answer_gets_by_itself(client: OpenAI) -> None:
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
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("best_of", 3),
        ("suffix", "end"),
        ("logits_processors", ["x"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("chat_template", "{{ 1 }}"),
        ("structured_outputs", {"regex": "a+"}),
        ("echo", True),
        ("reasoning_effort", "low"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **{field: value})
    assert error.value.param == field
    assert error.value.code == "not_supported"
    assert field in error.value.body["message"]


def test_sampling_that_the_checkpoint_suggests(tmp_path: Path, model: Path) -> None:
    stated = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "repetition_penalty": "high"}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert generation_defaults(str(tmp_path)) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert generation_defaults(str(tmp_path / "none")) == {}


# Log-probabilities


def test_logprobs_of_a_chat(client: OpenAI, llm: LLM) -> None:
    answer = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=8, logprobs=3))
    content = answer.choices[0].logprobs.content
    assert len(content) == len(expected.token_ids)
    for found, entry in zip(content, expected.logprobs or [], strict=True):
        assert found.logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert bytes(found.bytes) == llm.tokenizer.token_bytes(entry.token_id)
        assert [top.logprob for top in found.top_logprobs] == pytest.approx([value for _, value in entry.top], abs=1e-4)
        assert found.token == found.top_logprobs[0].token
    chunks = chat(client, temperature=0, max_tokens=8, logprobs=True, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for piece in pieces if piece is not None for entry in piece.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert all(entry.top_logprobs == [] for entry in streamed)


def test_loglikelihoods_as_evaluation_harnesses_ask_for_them(client: OpenAI, llm: LLM) -> None:
    prompts = [random_tokens(20, 1), random_tokens(33, 2), llm.tokenizer.encode("What is the capital of France?")]
    answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    for choice, prompt, expected in zip(answer.choices, prompts, llm.generate(prompts, params), strict=True):
        logprobs = choice.logprobs
        values, tops = logprobs.token_logprobs, logprobs.top_logprobs
        assert len(values) == len(tops) == len(logprobs.tokens) == len(logprobs.text_offset) == len(prompt) + 1
        assert values[0] is None
        assert tops[0] is None
        entries = [*(expected.prompt_logprobs or [])[1:], *(expected.logprobs or [])]
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


def test_the_prompt_alone(client: OpenAI) -> None:
    answer = complete(client, "The quick brown fox", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "The quick brown fox"
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_prompt_logprobs_in_the_shape_of_vllm(served: Server, llm: LLM) -> None:
    ids = random_tokens(12)
    body = {"prompt": ids, "prompt_logprobs": 2, "max_tokens": 1}
    found = served.post("/v1/completions", body).json()["choices"][0]["prompt_logprobs"]
    expected = llm.generate([ids], SamplingParams(prompt_logprobs=2, max_tokens=1))[0].prompt_logprobs or []
    assert found[0] is None
    for shown, entry in zip(found[1:], expected[1:], strict=True):
        assert entry is not None
        assert shown[str(entry.token_id)]["rank"] == entry.rank
        assert shown[str(entry.token_id)]["logprob"] == pytest.approx(entry.logprob, abs=1e-4)
        assert {str(token) for token, _ in entry.top} <= shown.keys()


def test_nothing_impossible_is_written_as_infinity(served: Server) -> None:
    assert [finite(value) for value in (float("nan"), float("-inf"), -1e6, -2.5)] == [-9999.0] * 3 + [-2.5]
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 5, "allowed_token_ids": [50]}
    answer = served.post("/v1/completions", body)
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"]


# Prompts


def test_templates_can_be_told_things(client: OpenAI, llm: LLM) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "The capital of"}]
    body = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    answer = chat(client, begun, continue_final_message=True, add_generation_prompt=False, **body)
    expected = llm.chat_prompt(begun, continue_final_message=True, add_generation_prompt=False)
    assert answer.prompt_token_ids == expected
    assert chat(client, begun, continue_final_message=True, **body).prompt_token_ids == expected
    answer = chat(client, add_generation_prompt=False, chat_template_kwargs={"enable_thinking": False}, **body)
    assert answer.prompt_token_ids == llm.chat_prompt(MESSAGES, add_generation_prompt=False)
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


@pytest.mark.parametrize(
    "arguments", [{"messages": []}, {"tools": 1}, {"x": [1]}, {"x": {"y": 1}}, {"__class__": 1}, {"a b": 1}]
)
def test_templates_can_not_be_told_everything(served: Server, arguments: dict[str, Any]) -> None:
    answer = served.post("/v1/chat/completions", {"messages": MESSAGES, "chat_template_kwargs": arguments})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_a_prompt_is_cut_from_the_front(client: OpenAI, llm: LLM) -> None:
    ids = random_tokens(CONTEXT + 100)
    body = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
    answer = complete(client, ids, truncate_prompt_tokens=20, **body)
    assert answer.choices[0].prompt_token_ids == ids[-20:]
    answer = complete(client, ids, truncate_prompt_tokens=-1, **body)
    assert answer.choices[0].prompt_token_ids == ids[-(CONTEXT - 1) :]


def test_a_prompt_that_was_seen_before_is_cached(client: OpenAI) -> None:
    ids = random_tokens(100, 77)
    counts = [
        complete(client, ids, max_tokens=1, cache_salt=salt).usage.prompt_tokens_details.cached_tokens
        for salt in ("a", "a", "b")
    ]
    assert counts == [0, 96, 0]


def test_tokens_and_back(served: Server, llm: LLM) -> None:
    text = "人工智能 is “fun” 😀"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == CONTEXT
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    assert served.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == llm.chat_prompt(MESSAGES)
    assert served.post("/detokenize", {"tokens": [512]}).status_code == 400


def test_the_short_form(served: Server, llm: LLM) -> None:
    body = {"prompt": "The quick", "max_new_tokens": 9, "temperature": 0, "priority": -1}
    expected = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=9))[0]
    assert served.post("/generate", body).json() == {"text": expected.text, "num_tokens": len(expected.token_ids)}


# What is served


def test_what_is_served(client: OpenAI, served: Server) -> None:
    (found,) = client.models.list().data
    assert found.id == "tiny"
    assert found.max_model_len == CONTEXT
    assert client.models.retrieve("tiny").id == "tiny"
    assert served.get("/health").json() == {"status": "ready"}
    assert served.get("/ping").status_code == served.get("/live").status_code == 200
    assert served.get("/version").json()["version"]
    assert served.get("/load").json() == {"server_load": 0, "running": 0, "waiting": 0}
    assert served.get("/server_info").json()["max_model_len"] == CONTEXT
    assert served.get("/model_info").json()["is_generation"] is True
    assert served.get("/tokenizer_info").json()["eos_token_id"] == EOS_TOKEN_ID
    assert served.get("/stats").json()["engine"]["problem"] is None
    page = served.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert "vllm:generation_tokens_total" in page.text
    head = served.request("HEAD", "/metrics")
    assert head.status_code == 200
    assert head.content == b""


def test_the_openapi_document_and_its_page(served: Server) -> None:
    document = served.get("/schema/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[-1]]["properties"]
    assert {"messages", "temperature", "top_k", "stream"} <= fields.keys()
    assert not {"tools", "response_format", "chat_template", "echo"} & fields.keys()
    page = served.get("/docs", follow_redirects=True).text
    assert "https://" not in page.split("SwaggerUIBundle")[0]  # it loads nothing from elsewhere
    assert served.get("/schema/assets/swagger-ui-bundle.js").status_code == 200
    assert served.get("/schema/assets/../core.py").status_code == 404


# Errors


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temperature": -1}, "temperature is -1.0, must be between 0 and 100"),
        ({"temperature": "hot"}, 'temperature is "hot", must be a number'),
        ({"n": 129}, "n is 129, must be at most 128"),
        ({"max_tokens": 0}, "max_tokens is 0, must be between 1 and"),
        ({"max_completion_tokens": -3}, "max_completion_tokens is -3, must be between 1 and"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21, must be between 0 and 20"),
        ({"top_logprobs": 2}, "top_logprobs is 2, must come with logprobs true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop holds 5 texts, must be at most 4"),
        ({"stop": "x" * 2000}, "stop holds"),
        ({"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101"),
        ({"logit_bias": {"x": 1}}, "logit_bias has a key that is not an integer"),
        ({"allowed_token_ids": [10_000_000]}, "allowed_token_ids"),
        ({"messages": "hello"}, 'messages is "hello", must be a list'),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"priority": 2**40}, "priority is"),
        ({"seed": 2**70}, "seed is"),
        ({"stream_options": {"include_usage": True}}, "stream_options is only for"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs is not available"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
        ({"request_id": "a b"}, "request_id is"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_field_its_value_and_the_limit(
    served: Server, body: dict[str, Any], said: str, stream: bool
) -> None:
    given = {"messages": MESSAGES, "max_tokens": 2} | ({"stream": True} if stream else {}) | body
    if stream and "stream_options" in body:
        return
    answer = served.post("/v1/chat/completions", given)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == next(reversed(body)) or error["param"] in body


def test_a_prompt_beyond_the_context(client: OpenAI) -> None:
    for prompt in (random_tokens(CONTEXT), "hello " * CONTEXT, "x" * 10_000_000):
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, prompt)
        assert error.value.code == "context_length_exceeded"
        assert str(CONTEXT) in error.value.body["message"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([[]], "prompt[0] is empty"),
        ([1, "a"], "prompt mixes"),
        ([1, 512], "prompt[1] is 512, must be between 0 and 511"),
        ([[1, 2], [3, -1]], "prompt[1][1] is -1"),
        ([[1]] * 1025, "prompt holds 1025 prompts, must be at most 1024"),
        ({"a": 1}, "must be a text or a list"),
        (None, "prompt is null, must be a text or a list"),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_prompts_that_are_none(served: Server, prompt: Any, said: str) -> None:
    answer = served.post("/v1/completions", {"prompt": prompt})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "prompt"


def test_errors_have_one_shape_and_the_right_class(served: Server, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    for method, path, body, status in (
        ("GET", "/no/such/route", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"[]", 400),
    ):
        answer = served.request(method, path, content=body)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_request_ids_are_echoed(served: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 1}
    answer = served.post("/v1/completions", body, headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert "mine-1" in answer.json()["id"]
    answer = served.post("/v1/completions", body | {"request_id": "mine-2"})
    assert answer.headers["x-request-id"] == "mine-2"
    assert served.get("/nowhere", headers={"X-Request-ID": "mine-3"}).headers["x-request-id"] == "mine-3"
    made = [served.get("/version", headers={"X-Request-ID": "a b\x7f"}).headers["x-request-id"] for _ in range(2)]
    assert len({*made, "a b\x7f"}) == 3


@pytest.mark.slow
def test_the_default_model(tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    with server(tmp_path, "smollm2", args=["--port", "0", "--enforce-eager", "--dtype", "float32"]) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            name = client.models.list().data[0].id
            chunks = client.chat.completions.create(model=name, messages=question, temperature=0, stream=True)
            assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        wait_for(running.is_idle, "an idle engine")


# Many at once, and those that leave


def test_64_at_once(served: Server, llm: LLM) -> None:
    count = 64
    bodies: list[dict[str, Any]] = []
    for index in range(count):
        kind = PARAMETERS[index % len(PARAMETERS)]
        bodies.append({"max_tokens": 5 + index % 20, "stream": index % 3 == 0} | kind)
    prompts = [random_tokens(5 + 3 * index, index) for index in range(count)]

    async def ask(client: AsyncOpenAI, index: int) -> list[str]:
        body = dict(bodies[index])
        names = set(openai.types.completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
        extra = {name: body.pop(name) for name in list(body) if name not in names}
        answer = await client.completions.create(model="tiny", prompt=prompts[index], extra_body=extra, **body)
        found = [""] * body.get("n", 1)
        if body["stream"]:
            async for chunk in answer:
                found[chunk.choices[0].index] += chunk.choices[0].text
        else:
            found = [choice.text for choice in answer.choices]
        return found

    async def ask_all() -> list[list[str]]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(count)))

    def params(body: dict[str, Any]) -> SamplingParams:
        given = {name: value for name, value in body.items() if name != "stream"}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return SamplingParams(**given)

    found = asyncio.run(ask_all())
    expected: list[Completion] = llm.generate(prompts, [params(body) for body in bodies])
    for texts, completion in zip(found, expected, strict=True):
        assert texts == [choice.text for choice in completion.choices]
    wait_for(served.is_idle, "an idle engine")


LONG = {"temperature": 1, "ignore_eos": True, "max_tokens": 400, "n": 4}


def test_a_client_that_leaves_a_stream(served: Server, client: OpenAI) -> None:
    stream = chat(client, stream=True, **LONG)
    next(iter(stream))
    assert served.stats()["engine"]["running"] == 4
    stream.close()
    wait_for(served.is_idle, "an idle engine")
    line = next(line for line in reversed(served.log_lines()) if line.get("path") == "/v1/chat/completions")
    assert line["status"] == 499
    assert line["completion_tokens"] < 4 * 400


def test_a_client_that_does_not_wait_for_its_answer(served: Server) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=None) as client:
            task = asyncio.create_task(client.post("/v1/chat/completions", json={"messages": MESSAGES, **LONG}))
            while (await client.get("/stats")).json()["running"] != 4:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))

    asyncio.run(leave())
    wait_for(served.is_idle, "an idle engine")
    line = next(line for line in reversed(served.log_lines()) if line.get("path") == "/v1/chat/completions")
    assert line["status"] == 499
    assert line["completion_tokens"] < 4 * 400


def test_the_log_tells_what_each_request_was(served: Server) -> None:
    served.post("/v1/completions", {"prompt": "hello", "max_tokens": 3}, headers={"X-Request-ID": "in-the-log"})

    def logged() -> dict[str, Any] | None:
        return next((line for line in served.log_lines() if line.get("request_id") == "in-the-log"), None)

    line = wait_for(logged, "a log line")
    assert line["status"] == 200
    assert line["path"] == "/v1/completions"
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] <= 3
    assert line["seconds"] > 0
