"""Texts of a model with a SentencePiece vocabulary, over HTTP and in Python, against transformers' decoding."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dispec.engine.sampling_params import SamplingParams
from tests.checkpoints import save_tiny, sentencepiece_tokenizer
from tests.servers import Server, server
from tests.small_engine import make

TEMPLATE = "{{ bos_token }}{% for message in messages %}the {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "llama")
    sentencepiece_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server"), model) as running:
        yield running


@pytest.fixture(scope="module")
def theirs(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def body(theirs: PreTrainedTokenizerBase, **fields: Any) -> dict[str, Any]:
    """Nothing but this one word is said."""
    (word,) = theirs.convert_tokens_to_ids(["▁F"])
    return {"max_tokens": 2, "temperature": 0, "allowed_token_ids": [word]} | fields


@pytest.mark.parametrize("stream", [False, True])
def test_completions_go_on_after_their_prompt(stream, served, theirs):
    for prompt, expected in [("the cap", " F F"), ("the cap ", " F F"), ("</s>", "F F"), ("the\n", " F F")]:
        ids = theirs.encode(prompt)
        word = theirs.convert_tokens_to_ids("▁F")
        before, whole = (theirs.decode(part, skip_special_tokens=True) for part in (ids, [*ids, word, word]))
        assert whole[len(before) :] == expected
        answer = served.post("/v1/completions", body(theirs, prompt=prompt, stream=stream))
        if stream:
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
            text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == expected, prompt


def test_chats_go_on_after_their_prompt(served, theirs):
    messages = [{"role": "user", "content": "cap"}]
    answer = served.post("/v1/chat/completions", body(theirs, messages=messages, logprobs=True, top_logprobs=1)).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == " F F"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [" F", " F"]
    assert [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]] == [b" F", b" F"]


def test_python_goes_on_after_a_prompt(model, theirs):
    llm = make(model)
    params = SamplingParams(max_tokens=2, allowed_token_ids=body(theirs)["allowed_token_ids"])
    assert llm.generate(["the cap"], params)[0].outputs[0].text == " F F"
    assert "".join(piece.outputs[0].text for piece in llm.stream("the cap", params)) == " F F"


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "offsets"),
    [
        ("the cap", "the cap F F", ["<s>", " the", " cap", " F", " F"], [0, 0, 3, 7, 9]),
        (" the cap", " the cap F F", ["<s>", " the", " cap", " F", " F"], [0, 0, 4, 8, 10]),
        ("</s>", "</s>F F", ["<s>", "</s>", " F", " F"], [0, 0, 4, 5]),
        ("xé", "xé F F", ["<s>", " x", "bytes:\\xc3", "bytes:\\xa9", " F", " F"], [0, 0, 1, 2, 2, 4]),
        ([1, 277], "<s> the F F", ["<s>", " the", " F", " F"], [0, 3, 7, 9]),
    ],
)
def test_offsets_are_positions_in_the_text(prompt, text, tokens, offsets, served, theirs):
    answer = served.post("/v1/completions", body(theirs, prompt=prompt, echo=True, logprobs=1)).json()
    (choice,) = answer["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == offsets
    without = served.post("/v1/completions", body(theirs, prompt=prompt, logprobs=1)).json()["choices"][0]
    start = offsets[-2]
    assert without["logprobs"]["text_offset"] == [offset - start for offset in offsets[-2:]]


def test_bad_words_hold_within_words(served, theirs):
    ids = theirs.convert_tokens_to_ids(["he", "t", "▁the", "x"])
    fields = {"allowed_token_ids": ids, "logit_bias": {str(ids[0]): 100, str(ids[1]): 50}, "max_tokens": 6}
    free = served.post("/v1/completions", body(theirs, prompt="the", **fields)).json()["choices"][0]["text"]
    assert free == "he" * 6
    banned = served.post("/v1/completions", body(theirs, prompt="the", bad_words=["he"], **fields)).json()["choices"][0]
    assert banned["text"] == "t" * 6
