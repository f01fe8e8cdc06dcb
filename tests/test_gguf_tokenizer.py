"""Tokenizers of GGUF files against what llama.cpp makes of the same files.

The ids, ends and texts were found by llama.cpp itself (node-llama-cpp 3.22.1) for files with these entries.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dispec.engine.loading.checkpoint import CheckpointError, find_checkpoint
from dispec.engine.loading.gguf_tokenizer import GgufTokenizer
from dispec.engine.loading.llama_cpp_rules import word_patterns
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import save_tiny_gguf, tiny_model, tiny_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
MARKS = {USER: CONTROL, ASSISTANT: CONTROL, "<think>": USER_DEFINED, "<tool é>": USER_DEFINED, "<|eot_id|>": NORMAL}
PADDING = {"[PAD]": UNUSED, "[UNUSED]": UNUSED}


def gpt2(**entries: Any) -> dict[str, Any]:
    """450 tokens of bytes and words, 0 to 2 ChatML's; then marks that the byte alphabet cannot spell."""
    contents = json.loads(tiny_tokenizer().to_str())["model"]
    words = sorted(contents["vocab"], key=contents["vocab"].get)
    assert len(words) == 450
    types = [CONTROL] * 3 + [NORMAL] * 447
    return {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": [*words, *MARKS, *PADDING],
        "token_type": [*types, *MARKS.values(), *PADDING.values()],
        "merges": [" ".join(pair) for pair in contents["merges"]],
        "eos_token_id": 0,
        "bos_token_id": 1,
    } | entries


def sentencepiece(**entries: Any) -> dict[str, Any]:
    """Bytes at 3 to 258, then characters and a few words, the likelier ones first."""
    words = ["▁t", "he", "▁the", "▁c", "ap", "▁cap", "it", "al", "▁capital", "▁of", "▁o", "▁Paris", "▁▁"]
    words += ["[INST]", "Paris"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecapiolfrnPsW", *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    types[tokens.index("[INST]")] = USER_DEFINED
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    common = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types, "scores": scores}
    return common | {"bos_token_id": 1, "eos_token_id": 2} | entries


def read(directory: Path, entries: dict[str, Any]) -> Tokenizer:
    GgufTokenizer({f"tokenizer.ggml.{key}": value for key, value in entries.items()}).save(directory)
    return Tokenizer.from_directory(directory)


def ends(directory: Path, **entries: Any) -> list[int]:
    read(directory, gpt2(**entries))
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (f"{USER}Hello{ASSISTANT}<think>\n", [450, 42, 71, 350, 81, 451, 452, 201]),
        (" the <tool é> dog<|eot_id|>", [276, 223, 453, 321, 454]),
        ("a[UNUSED]b<|im_end|>", [67, 61, 55, 48, 55, 53, 39, 38, 63, 68, 2]),
    ],
)
def test_marks_are_single_tokens(text, ids, tmp_path):
    tokenizer = read(tmp_path, gpt2())
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_hidden_and_user_defined_ones_are_not(tmp_path):
    tokenizer = read(tmp_path, gpt2())
    shown = [tokenizer.decode([token]) for token in range(450, 457)]
    # llama.cpp hides <|eot_id|>, which the file calls normal, and [PAD], because it knows them by their text.
    assert shown == ["", "", "<think>", "<tool é>", "", "", ""]
    spelled = [tokenizer.decode([token], skip_special_tokens=False) for token in range(450, 457)]
    assert spelled == [*MARKS, "[PAD]", ""]


def test_a_text_ends_at_tokens_that_are_known_by_their_text(tmp_path):
    assert sorted(ends(tmp_path)) == [0, 2, 454, 455]  # <|endoftext|>, <|im_end|>, <|eot_id|>, [PAD]
    assert sorted(ends(tmp_path, eos_token_id=2, eot_token_id=300)) == [0, 2, 300, 454, 455]
    # A key that names the padding of code completion stands before a text that looks like it.
    assert sorted(ends(tmp_path, fim_pad_token_id=451)) == [0, 2, 451, 454]


def test_the_end_of_a_message_does_not_end_the_answer(tmp_path):
    tokens = [*gpt2()["tokens"][:450], "<|end|>", "<|return|>", "<|call|>"]
    harmony = gpt2(tokens=tokens, token_type=[CONTROL] * 3 + [NORMAL] * 447 + [CONTROL] * 3)
    tokenizer = read(tmp_path, harmony)
    assert sorted(json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]) == [0, 2, 451, 452]
    assert tokenizer.decode([450, 451]) == "<|end|>"


def test_an_end_token_beside_tool_responses_is_text(tmp_path):
    tokens = [*gpt2()["tokens"][:450], "</s>", "<|tool_response>"]
    entries = {"tokens": tokens, "token_type": [*[CONTROL] * 3, *[NORMAL] * 447, CONTROL, CONTROL]}
    assert 450 not in ends(tmp_path, **entries)
    tokenizer = read(tmp_path, gpt2(**entries))
    ids = tokenizer.encode("a</s>", add_special_tokens=False)
    assert 450 not in ids
    assert tokenizer.decode(ids) == "a</s>"


@pytest.mark.parametrize(
    ("add_space_prefix", "text", "ids"),
    [
        (True, "the capital of Paris", [277, 280, 281, 282, 284, 259, 272, 264, 270, 266, 273]),
        (True, " the", [259, 277]),
        (True, "  the", [287, 277]),
        (True, "<s>the</s>the [INST] the", [1, 277, 2, 277, 259, 288, 259, 277]),
        (True, "the\nPé", [277, 13, 272, 198, 172]),
        (True, "xParis", [259, 123, 272, 264, 270, 266, 273]),
        (False, "the capital of Paris", [260, 276, 280, 281, 282, 284, 259, 272, 264, 270, 266, 273]),
        (False, " the", [277]),
        (False, "  the", [259, 277]),
        (False, "<s>the</s>the [INST] the", [1, 260, 276, 2, 260, 276, 259, 288, 277]),
        (False, "the\nPé", [260, 276, 13, 272, 198, 172]),
        (False, "xParis", [123, 272, 264, 270, 266, 273]),
    ],
)
def test_sentencepiece(add_space_prefix, text, ids, tmp_path):
    entries = sentencepiece() if add_space_prefix else sentencepiece(add_space_prefix=False)
    tokenizer = read(tmp_path, entries)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == [1, *ids]
    if "<s>" not in text:  # special tokens have a space after them that the text has not
        assert tokenizer.decode(ids) == text


def test_begin_and_end_tokens_are_added(tmp_path):
    assert read(tmp_path, gpt2()).encode("a") == [67]
    assert read(tmp_path, gpt2(add_bos_token=True, add_eos_token=True)).encode("a") == [1, 67, 0]
    assert read(tmp_path, gpt2(pre="llama-bpe")).encode("a") == [1, 67]
    assert read(tmp_path, sentencepiece(add_bos_token=False)).encode(" the") == [259, 277]
    # The ids that llama.cpp takes where a SentencePiece file names none.
    silent = {key: value for key, value in sentencepiece().items() if not key.endswith("_token_id")}
    tokenizer = read(tmp_path, silent)
    assert [tokenizer.special_tokens[f"{role}_token"] for role in ("bos", "eos")] == ["<s>", "</s>"]
    assert tokenizer.encode("the") == [1, 277]


def test_named_templates(tmp_path):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in gpt2().items()}
    shown = "{{ messages[0].content }}"
    metadata |= {"tokenizer.chat_template": f"plain {shown}", "tokenizer.chat_template.tool_use": f"tools {shown}"}
    GgufTokenizer(metadata).save(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == "plain Hi"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "tools Hi"


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (gpt2(model="bert"), "the vocabulary is 'bert', must be gpt2 or llama"),
        (gpt2(pre="viking"), "its pre-tokenizer is 'viking', must be one of default, "),
        (gpt2(tokens=[]), "it has no tokens"),
        (gpt2(tokens=["a", "b", "a"]), "two tokens are 'a'"),
        (gpt2(token_type=[1]), "it has 457 tokens but 1 token types"),
        (gpt2(merges=[]), "it has no merges"),
        (sentencepiece(scores=[0.0]), "it has 290 tokens but 1 scores"),
    ],
)
def test_unsupported_vocabularies_are_refused(entries, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        read(tmp_path, entries)


def test_a_model_with_such_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_model(
        "llama", hidden_size=288, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    save_tiny_gguf(tmp_path / "deepseek.gguf", model, tokenizer=gpt2())
    checkpoint = find_checkpoint(tmp_path / "deepseek.gguf")
    assert sorted(checkpoint.eos_token_ids) == [0, 2, 454, 455]
    assert Tokenizer.from_directory(checkpoint.directory).encode(USER) == [450]
    save_tiny_gguf(tmp_path / "other.gguf", model, tokenizer=gpt2(pre="viking"))
    with pytest.raises(CheckpointError, match=r"tokenizer of other.gguf could not be converted .*'viking'"):
        find_checkpoint(tmp_path / "other.gguf")


def test_every_rule_splits_and_loses_nothing(tmp_path):
    text = "I'm 12345 Köln's\n\n  ÀÉ x_y (日本) 你好!"
    for name in ("default", "llama-bpe", "qwen2", "smollm", "gpt-2", "falcon", "tekken", "gpt-4o", "deepseek-v3"):
        assert word_patterns(name)
        tokenizer = read(tmp_path, gpt2(pre=name))
        assert tokenizer.decode(tokenizer.encode(text)).removeprefix("<|im_start|>") == text
