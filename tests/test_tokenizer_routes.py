"""/tokenize and /tokenizer_info against transformers, and as evaluation harnesses use them."""

import json
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest
import tokenizers
from transformers import AutoTokenizer

from dispec.engine.process.messages import EngineInfo
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.routes_tokenizer import tokenizer_configuration
from tests.api_server import CONTEXT, MESSAGES
from tests.servers import Server

pytest_plugins = ["tests.api_server"]


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def test_token_strings_are_those_of_the_vocabulary(served: Server, reference: Any) -> None:
    for text in ("The quick brown fox", "人工智能 is “fun” 😀\n\n", "<|im_start|>user\nhello<|im_end|>"):
        found = served.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
        assert found["tokens"] == reference(text)["input_ids"]
        assert found["token_strs"] == reference.convert_ids_to_tokens(found["tokens"])
    assert "Ġ" in "".join(served.post("/tokenize", {"prompt": "a b", "return_token_strs": True}).json()["token_strs"])
    assert served.post("/tokenize", {"prompt": "a b"}).json()["token_strs"] is None
    found = served.post("/tokenize", {"messages": MESSAGES, "return_token_strs": True}).json()
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert found["tokens"] == expected
    assert found["token_strs"] == reference.convert_ids_to_tokens(expected)


@pytest.mark.parametrize(("name", "value"), [("chat_template", "{{ messages }}")])
def test_fields_that_would_change_the_tokens_are_refused(served: Server, name: str, value: Any) -> None:
    for body in ({"messages": MESSAGES}, {"prompt": "hello"}):
        answer = served.post("/tokenize", body | {name: value})
        assert answer.status_code == 400
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (name, "not_supported")
        assert served.post("/tokenize", body | {name: None}).status_code == 200


class RemoteTokenizer:
    """As evaluation harnesses make one of a server: its template is rendered and its texts are encoded from there."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.info = http.get("/tokenizer_info").raise_for_status().json()

    def encode(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self._http.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(self.info["chat_template"]).render(messages=messages, add_generation_prompt=True)


def test_a_harness_can_do_without_the_checkpoint(served: Server, reference: Any) -> None:
    remote = RemoteTokenizer(served.http)
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert remote.info[role] == getattr(reference, role), role
    assert remote.encode(remote.info["eos_token"]) == [reference.eos_token_id] == [remote.info["eos_token_id"]]
    prompt = remote.apply_chat_template(MESSAGES)
    assert prompt == reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert remote.encode(prompt) == served.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    expected = {str(token): added.content for token, added in reference.added_tokens_decoder.items()}
    assert remote.info["added_tokens_decoder"] == expected
    assert remote.info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert remote.info["vocab_size"] == len(reference)
    assert remote.info["model_max_length"] == CONTEXT


def test_the_template_and_tokens_are_found_wherever_they_are(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((model / name).read_text())
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"], config["tokenizer_class"]
    config |= {
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False},
        "extra_special_tokens": [{"content": "<|im_start|>"}],
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        "vocab_file": str(tmp_path),
    }
    path.write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = tokenizer_configuration(Tokenizer.from_directory(tmp_path), _info(eos_token_ids=[2]))
    assert found["chat_template"] == "{{ messages[0].content }}"
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (found["eos_token"], found["eos_token_id"], found["pad_token"]) == ("<|im_end|>", 2, "<|endoftext|>")
    assert found["extra_special_tokens"] == ["<|im_start|>"]
    assert found["added_tokens_decoder"]["0"] == "<|endoftext|>"
    assert str(tmp_path) not in json.dumps(found)  # nothing of the server's own files


def test_a_tokenizer_without_a_template_says_so() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    found = tokenizer_configuration(tokenizer, _info(eos_token_ids=[]))
    assert found["chat_template"] is None
    assert found["has_chat_template"] is False
    assert found["eos_token"] is None


def _info(eos_token_ids: list[int]) -> EngineInfo:
    class Info:
        vocab_size = 512
        max_model_len = CONTEXT

    info: Any = Info()
    info.eos_token_ids = eos_token_ids
    return info
