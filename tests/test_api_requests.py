"""Requests of every kind, good and bad, and clients that leave, against a real server process."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from dispec import LLM, RequestOutput, SamplingParams
from tests.api_server import CONTEXT, MESSAGES, PARAMETERS, chat, complete
from tests.checkpoints import EOS_TOKEN_ID
from tests.servers import Server, server, wait_for
from tests.small_engine import random_tokens

pytest_plugins = ["tests.api_server"]


# Prompts


def test_chat_template_arguments(client: OpenAI, llm: LLM) -> None:
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
def test_reserved_chat_template_arguments_are_refused(served: Server, arguments: dict[str, Any]) -> None:
    answer = served.post("/v1/chat/completions", {"messages": MESSAGES, "chat_template_kwargs": arguments})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_truncation_side(client: OpenAI, llm: LLM) -> None:
    ids = random_tokens(CONTEXT + 100)
    body = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
    answer = complete(client, ids, truncate_prompt_tokens=20, **body)
    assert answer.choices[0].prompt_token_ids == ids[-20:]
    answer = complete(client, ids, truncate_prompt_tokens=-1, **body)
    assert answer.choices[0].prompt_token_ids == ids[-(CONTEXT - 1) :]
    whole = chat(client, **body).prompt_token_ids
    for keep in (20, -1):
        size = CONTEXT - 1 if keep == -1 else keep
        answer = complete(client, ids, truncate_prompt_tokens=keep, truncation_side="right", **body)
        assert answer.choices[0].prompt_token_ids == ids[:size]
        answer = chat(client, truncate_prompt_tokens=keep, truncation_side="right", **body)
        assert answer.prompt_token_ids == whole[:size]
    assert chat(client, truncate_prompt_tokens=20, truncation_side="left", **body).prompt_token_ids == whole[-20:]
    assert chat(client, truncation_side="right", **body).prompt_token_ids == whole


def test_repeated_prompt_is_cached(client: OpenAI) -> None:
    ids = random_tokens(100, 77)
    counts = [
        complete(client, ids, max_tokens=1, cache_salt=salt).usage.prompt_tokens_details.cached_tokens
        for salt in ("a", "a", "b")
    ]
    assert counts == [0, 96, 0]
    usage = complete(client, [ids, ids], max_tokens=1, cache_salt="a").usage
    assert usage.prompt_tokens_details.cached_tokens == 2 * 96


def test_tokenize_and_detokenize(served: Server, llm: LLM) -> None:
    text = "人工智能 is “fun” 😀"
    found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == CONTEXT
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    assert served.post("/tokenize", {"messages": MESSAGES}).json()["tokens"] == llm.chat_prompt(MESSAGES)
    assert served.post("/detokenize", {"tokens": [512]}).status_code == 400


def test_generate_route(served: Server, llm: LLM) -> None:
    body = {"prompt": "The quick", "max_new_tokens": 9, "temperature": 0, "priority": -1}
    expected = llm.generate("The quick", SamplingParams(temperature=0, max_tokens=9))[0]
    assert served.post("/generate", body).json() == {
        "text": expected.outputs[0].text,
        "num_tokens": len(expected.outputs[0].token_ids),
    }


# What is served


def test_model_routes(client: OpenAI, served: Server) -> None:
    (found,) = client.models.list().data
    assert found.id == "tiny"
    assert found.max_model_len == CONTEXT
    assert client.models.retrieve("tiny").id == "tiny"
    assert served.get("/health").json() == {"status": "ready"}
    assert served.get("/ping").status_code == served.get("/live").status_code == 200
    assert served.get("/version").json()["version"]
    assert served.get("/load").json() == {"server_load": 0, "running": 0, "waiting": 0}
    assert served.get("/server_info").json()["max_model_len"] == CONTEXT
    assert served.get("/server_info").json()["weights_format"] == "float32"
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
    assert {"messages", "temperature", "top_k", "stream", "tools", "response_format"} <= fields.keys()
    assert not {"functions", "chat_template", "echo"} & fields.keys()
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
        ({"n": 129}, "n is 129, must be between 1 and 128"),
        ({"max_tokens": 0}, "max_tokens is 0, must be between 1 and 512"),
        ({"max_tokens": 513}, "max_tokens=513 cannot be greater than max_model_len=512"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens=1000000000 cannot be greater than max_model_len=512"),
        ({"min_tokens": 10**9, "max_tokens": None}, "min_tokens is 1000000000, must be at most max_tokens (512)"),
        ({"max_completion_tokens": -3}, "max_completion_tokens is -3, must be between 1 and"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21, must be between 0 and 20"),
        ({"top_logprobs": 2}, "top_logprobs is 2, must come with logprobs true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop holds 5 texts, must be at most 4"),
        ({"stop": "x" * 2000}, "stop holds"),
        ({"stop_token_ids": [7] * 262_145}, "stop_token_ids holds 262145 token ids, must be at most 262144"),
        ({"allowed_token_ids": [7] * 262_145}, "allowed_token_ids holds 262145 token ids, must be at most 262144"),
        ({"bad_words": [f"{index}" + "é" * 900 for index in range(64)]}, "tokens, must be at most 65536"),
        ({"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101"),
        ({"logit_bias": {"x": 1}}, 'logit_bias has the key "x", must be an integer'),
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
        ({"truncation_side": "middle"}, "truncation_side is 'middle', must be left or right"),
        ({"thinking_token_budget": 5}, "thinking_token_budget is 5, must be left out"),
        ({"thinking_token_budget": -2}, "thinking_token_budget is -2, must be -1"),
        ({"messages": [*MESSAGES, {"role": "assistant", "function_call": {}}]}, "messages[2].function_call: is not"),
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(client: OpenAI, served: Server, stream: bool) -> None:
    # LiteLLM looks for the part after the comma, LangChain for the one before it, as its client does not show the code.
    phrase = f"prompt is too long, this model's maximum context length is {CONTEXT} tokens"
    texts = ("hello " * CONTEXT, "x" * 10_000_000)
    for prompt in (random_tokens(CONTEXT), [[1], random_tokens(CONTEXT)], *texts):
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, prompt, stream=stream)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
        assert phrase in error.value.body["message"]
    for text in texts:
        with pytest.raises(openai.BadRequestError) as error:
            chat(client, [{"role": "user", "content": text}], stream=stream)
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
        assert phrase in error.value.body["message"]
    for path, body, field in (
        ("/generate", {"prompt": texts[0]}, "prompt"),
        ("/tokenize", {"prompt": texts[1]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": texts[1]}]}, "messages"),
        ("/detokenize", {"tokens": [1] * (CONTEXT + 1)}, "tokens"),
    ):
        found = served.post(path, body).json()["error"]
        assert (found["code"], found["param"]) == ("context_length_exceeded", field)
        assert phrase in found["message"]


def test_max_tokens_beyond_the_context_is_refused(served: Server) -> None:
    for path, field, body in (
        ("/v1/completions", "max_tokens", {"prompt": "x"}),
        ("/v1/chat/completions", "max_tokens", {"messages": MESSAGES}),
        ("/v1/chat/completions", "max_completion_tokens", {"messages": MESSAGES}),
        ("/generate", "max_new_tokens", {"prompt": "x"}),
    ):
        answer = served.post(path, body | {field: CONTEXT + 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert "cannot be greater than max_model_len" in answer.json()["error"]["message"]
        if path != "/generate":
            usage = served.post(path, body | {field: CONTEXT, "ignore_eos": True}).json()["usage"]
            assert usage["total_tokens"] == CONTEXT


def test_the_param_of_an_error_is_null_for_a_whole_body(served: Server) -> None:
    for body in (b"[]", b"7", b"{"):
        error = served.post("/v1/chat/completions", content=body).json()["error"]
        assert error["param"] is None
    bias = served.post("/v1/completions", {"prompt": "x", "logit_bias": {"999": 1}}).json()["error"]
    assert bias["param"] == "logit_bias"  # which the engine finds


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([[]], "prompt[0] is empty"),
        ([1, "a"], "prompt mixes"),
        ([1, 512], "prompt holds token id 512, must be between 0 and 511"),
        ([[1, 2], [3, -1]], "prompt[1] holds token id -1"),
        ([[1]] * 1025, "prompt holds 1025 prompts, must be at most 1024"),
        ({"a": 1}, "must be a text or a list"),
        (None, "prompt is null, must be a text or a list"),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_invalid_prompts(served: Server, prompt: Any, said: str) -> None:
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
    made = [served.get("/version", headers={"X-Request-ID": "a b"}).headers["x-request-id"] for _ in range(2)]
    assert len({*made, "a b"}) == 3


@pytest.mark.slow
def test_the_default_model(tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    with server(tmp_path, "smollm2", args=["--port", "0", "--enforce-eager", "--dtype", "float32"]) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            name = client.models.list().data[0].id
            weights = "float32, dequantised from GGUF Q4_1 and Q8_0"
            assert running.get("/model_info").json()["weights_format"] == weights
            chunks = client.chat.completions.create(model=name, messages=question, temperature=0, stream=True)
            assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        wait_for(running.is_idle, "an idle engine")


# Many at once, and those that leave


def test_64_concurrent_requests(served: Server, llm: LLM) -> None:
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
    expected: list[RequestOutput] = llm.generate(prompts, [params(body) for body in bodies])
    for texts, completion in zip(found, expected, strict=True):
        assert texts == [choice.text for choice in completion.outputs]
    wait_for(served.is_idle, "an idle engine")


LONG = {"temperature": 1, "ignore_eos": True, "max_tokens": 400, "n": 4}


def test_disconnect_aborts_a_stream(served: Server, client: OpenAI) -> None:
    stream = chat(client, stream=True, **LONG)
    next(iter(stream))
    assert served.stats()["engine"]["running"] == 4
    stream.close()
    wait_for(served.is_idle, "an idle engine")
    line = next(line for line in reversed(served.log_lines()) if line.get("path") == "/v1/chat/completions")
    assert line["status"] == 499
    assert line["completion_tokens"] < 4 * 400


def test_disconnect_aborts_a_request(served: Server) -> None:
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


def test_access_log_fields(served: Server) -> None:
    served.post("/v1/completions", {"prompt": "hello", "max_tokens": 3}, headers={"X-Request-ID": "in-the-log"})

    def logged() -> dict[str, Any] | None:
        return next((line for line in served.log_lines() if line.get("request_id") == "in-the-log"), None)

    line = wait_for(logged, "a log line")
    assert line["status"] == 200
    assert line["path"] == "/v1/completions"
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] <= 3
    assert line["seconds"] > 0
