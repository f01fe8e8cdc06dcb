"""The perplexity benchmark: transformers' numbers on the same tokens."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dispec.bench.perplexity import aim, engine_perplexity, main, reference_text, windows
from dispec.engine.api.llm import LLM
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import save_tiny


def test_the_text_is_long_enough_and_prose():
    text = reference_text(200_000)
    assert len(text.encode()) == 200_000
    words = text.split()
    assert words.count("the") / len(words) > 0.04
    assert reference_text(1000) == text[:1000]


def test_windows_hold_each_token_once(tmp_path):
    save_tiny(tmp_path, "llama")
    tokenizer = Tokenizer.from_directory(find_checkpoint(tmp_path).directory)
    text = reference_text(1000)
    cut = windows(tokenizer, text, 50)
    assert {len(window) for window in cut[:-1]} == {50}
    assert [token for window in cut for token in window] == tokenizer.encode(text)
    with pytest.raises(ValueError, match="0 tokens"):
        windows(tokenizer, "", 50)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_perplexity_is_that_of_transformers(kv_cache_dtype, tmp_path):
    save_tiny(tmp_path, "llama")
    checkpoint = find_checkpoint(tmp_path)
    prompts = windows(Tokenizer.from_directory(checkpoint.directory), reference_text(600), 64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            losses += [model(ids, labels=ids).loss.item()] * (len(prompt) - 1)
    expected = math.exp(sum(losses) / len(losses))
    options = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "kv_cache_memory": "4MiB", "device": "cpu"}
    with LLM(tmp_path, enforce_eager=True, **options) as llm:
        found = engine_perplexity(llm, prompts)
    if kv_cache_dtype == "auto":
        assert found == pytest.approx(expected, rel=1e-5)
    else:  # its tokens attend to rounded keys and values
        assert found != pytest.approx(expected, rel=1e-5)
        assert found == pytest.approx(expected, rel=0.02)


def test_the_table_has_formats_and_transformers(tmp_path, capsys):
    save_tiny(tmp_path / "tiny", "llama")
    output = tmp_path / "results.jsonl"
    main(
        str(tmp_path / "tiny"),
        formats="float32,int8",
        text=None,
        text_bytes=300,
        window=64,
        transformers="float32",
        device="cpu",
        output=output,
    )
    ours, int8, theirs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["case"]["format"] for row in (ours, int8, theirs)] == ["float32", "int8", "transformers float32"]
    assert theirs["figures"]["perplexity"] == pytest.approx(ours["figures"]["perplexity"], rel=1e-5)
    assert int8["figures"]["ratio"] == int8["figures"]["perplexity"] / ours["figures"]["perplexity"]
    assert int8["figures"]["ratio"] == pytest.approx(1, rel=0.1)
    assert "met: 1.005" in capsys.readouterr().out or int8["figures"]["ratio"] > 1.005
    with pytest.raises(ValueError, match="'int3'"):
        main(str(tmp_path / "tiny"), formats="bfloat16,int3", text=None, device="cpu", output=None)


def test_aims():
    assert [aim(name) for name in ("bfloat16", "native", "fp8", "float32")] == [None] * 4
    assert [aim(name) for name in ("int8", "bfloat16+kv-fp8", "bfloat16+kv-int8")] == [0.005] * 3
    assert (aim("int4"), aim("int4-128+kv-int8")) == (0.06, 0.065)
