"""Tokenizer files of a directory against `AutoTokenizer`, on small files and on published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.loading.tokenizer_files import directory_tokenizer
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import qwen_tokenizer, save_tiny, save_tokenizer, sentencepiece_tokenizer, tiny_tokenizer
from tests.vocabularies import PUBLISHED, published_tokenizer

TEXTS = (
    *("Hello", " leading", "  two", "", "The capital\nof France", "<|im_end|>after", "a<|im_start|> b", "I'M 123 KÖLN"),
    *("x<tool>y", "x <turn> y", "<s>[INST] hi [/INST]</s>", "e\u0301 naïve"),
)
TOOL = {"content": "<tool>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(directory: Path, model_type: str, config: dict[str, Any], **more: Any) -> Path:
    """Tokenizer files without a model; `more` are other JSON files by their name."""
    save_tokenizer(directory, **config)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, contents in more.items():
        (directory / f"{name}.json").write_text(json.dumps(contents))
    return directory


def assert_same(directory: Path, texts=TEXTS) -> Path:
    """Check that both readers have the same ids, texts and special tokens; return where ours read them from."""
    found = directory_tokenizer(directory)
    ours, theirs = Tokenizer.from_directory(found), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        for adds in (True, False):
            ids = theirs.encode(text, add_special_tokens=adds)
            assert ours.encode(text, add_special_tokens=adds) == ids, text
        for skips in (True, False):
            assert ours.decode(ids, skips) == theirs.decode(ids, skip_special_tokens=skips), text
    added = theirs.added_tokens_decoder
    assert ours.special_ids == {token for token, kind in added.items() if kind.special}
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    return found


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"added_tokens_decoder": {"450": TOOL | {"special": True}}}, {}),
        ({"added_tokens_decoder": {"450": TOOL | {"special": False}}}, {}),
        ({"additional_special_tokens": ["<tool>", "<turn>"]}, {}),
        ({"extra_special_tokens": ["<tool>"]}, {}),
        ({"extra_special_tokens": {"tool_token": "<tool>"}}, {}),
        ({"image_token": "<tool>"}, {}),
        ({"eos_token": "<turn>"}, {}),
        ({"eos_token": {"content": "<turn>", "__type": "AddedToken", "lstrip": True}}, {}),
        ({}, {"added_tokens": {"<tool>": 450}}),
        ({}, {"special_tokens_map": {"eos_token": "<turn>"}}),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {}),
    ],
)
def test_config_files_beside_tokenizer_json_are_read(config, more, tmp_path):
    directory = files(tmp_path / "model", "llama", config, **more)
    assert assert_same(directory) != directory


@pytest.mark.parametrize(
    ("model_type", "config", "is_qwen"),
    [
        ("llama", {}, False),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast"}, False),
        ("llama", {"tokenizer_class": None, "add_bos_token": False}, False),
        ("llama", {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, False),
        ("qwen3", {}, False),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "unk_token": None}, True),
        ("qwen3", {"tokenizer_class": "Qwen2TokenizerFast"}, True),
        ("qwen2", {}, True),
    ],
)
def test_self_contained_files_are_read_in_place(model_type, config, is_qwen, tmp_path, cache):
    directory = files(tmp_path / "model", model_type, config)
    if is_qwen:
        qwen_tokenizer().save(str(directory / "tokenizer.json"))
    assert assert_same(directory) == directory
    assert not cache.exists()


@pytest.mark.parametrize(("model_type", "name"), [("qwen2", "PreTrainedTokenizerFast"), ("qwen3", "Qwen2Tokenizer")])
def test_a_class_with_its_own_word_pattern_causes_a_conversion(model_type, name, tmp_path):
    directory = files(tmp_path / "model", model_type, {"tokenizer_class": name})
    assert assert_same(directory) != directory


@pytest.mark.parametrize("legacy", [None, True, False])
def test_sentencepiece(legacy, tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    config |= {} if legacy is None else {"legacy": legacy}
    directory = files(tmp_path / "model", "llama", config)
    sentencepiece_tokenizer().save(str(directory / "tokenizer.json"))
    texts = ["the cap", " the", "  the", "the</s>the", "</s> the", "the\nFé", "<s> the"]
    assert assert_same(directory, texts) != directory


def test_an_end_token_of_the_tokenizer_config_alone(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<turn>"}))
    checkpoint = find_checkpoint(tmp_path / "model")
    assert checkpoint.eos_token_ids == (450, 2)
    assert Tokenizer.from_directory(checkpoint.directory).decode([70, 450]) == tiny_tokenizer().decode([70])


def test_tokenizer_with_custom_code_is_refused(tmp_path):
    config = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    directory = files(tmp_path / "model", "llama", config)
    with pytest.raises(CheckpointError, match="tokenizer of model could not be converted"):
        directory_tokenizer(directory)


# Published ones.


@pytest.mark.slow
@pytest.mark.parametrize("package", PUBLISHED)
def test_published_tokenizers(package, tmp_path):
    published = published_tokenizer(package, tmp_path)
    found = assert_same(published, [*TEXTS, "The capital of", "日本語 👍 x == y", "</think>\n", "<|endoftext|>  a"])
    configuration = json.loads((published / "tokenizer_config.json").read_text())
    is_self_contained = configuration["tokenizer_class"] == "Qwen2Tokenizer"
    assert (found == published) == is_self_contained
