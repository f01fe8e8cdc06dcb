"""GGUF files against transformers' reading of them, and the built-in model, which is one."""

import math
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dispec.engine.loading import default_model
from dispec.engine.loading.checkpoint import CheckpointError, find_checkpoint
from dispec.engine.loading.gguf_file import GgufFile
from dispec.engine.loading.gguf_tokenizer import GgufTokenizer
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import RopeScaling, UnsupportedModelError
from tests.checkpoints import CHATML, EOS_TOKEN_ID, FAMILIES, save_tiny_gguf, tiny_model, tiny_tokenizer

Quantization = gguf.GGMLQuantizationType
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Head dims that transformers would assume: it does not read them from the file.
SIZES = {
    "qwen2": {"hidden_size": 224, "head_dim": 16},
    "qwen3": {"hidden_size": 64, "head_dim": 128},
    "llama": {"hidden_size": 288, "head_dim": 32, "rope_parameters": DEFAULT_ROPE},
}


def tiny(family: str, **overrides):
    return tiny_model(family, **(SIZES[family] | overrides))


def read_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return dict(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [Quantization.F32, Quantization.Q8_0], ids=["F32", "Q8_0"])
def test_tensors_are_those_of_transformers(family, quantization, tmp_path):
    path = tmp_path / "tiny.gguf"
    model = tiny(family)
    save_tiny_gguf(path, model, quantization)
    ours, theirs = dict(GgufFile(path).tensors()), read_by_transformers(path)
    if family == "qwen3":
        del theirs["lm_head.weight"]  # tied
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)
    if quantization == Quantization.F32:
        original = model.state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_that_of_the_model(family, tmp_path):
    path = tmp_path / "tiny.gguf"
    model = tiny(family, rms_norm_eps=1e-5)
    save_tiny_gguf(path, model)
    config, theirs = GgufFile(path).config, model.config
    assert config.architecture == type(model).__name__
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (512, theirs.hidden_size, 3)
    assert (config.num_heads, config.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (config.head_dim, config.intermediate_size) == (theirs.head_dim, theirs.intermediate_size)
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (10000.0, None, 1e-5)
    assert config.max_position_embeddings == 512
    assert config.tie_embeddings == (family == "qwen3")
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (family == "qwen2", False, family == "qwen3")


def test_biases_of_llama_are_found_and_put_in_order(tmp_path):
    model = tiny("llama", attention_bias=True)
    save_tiny_gguf(tmp_path / "tiny.gguf", model)
    file = GgufFile(tmp_path / "tiny.gguf")
    assert (file.config.qkv_bias, file.config.output_bias) == (True, True)
    original = model.state_dict()
    biases = {name: tensor for name, tensor in file.tensors() if name.endswith("bias")}
    assert len(biases) == 12
    assert all(torch.equal(tensor, original[name]) for name, tensor in biases.items())


def test_half_precision_is_kept(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    for quantization, dtype in [(Quantization.F16, torch.float16), (Quantization.BF16, torch.bfloat16)]:
        path = tmp_path / f"{quantization.name}.gguf"
        save_tiny_gguf(path, model, quantization)
        tensors = dict(GgufFile(path).tensors())
        weight = tensors["model.layers.2.self_attn.k_proj.weight"]
        assert weight.dtype == dtype
        expected = model.state_dict()["model.layers.2.self_attn.k_proj.weight"]
        assert torch.equal(weight.float(), expected.to(dtype).float())
        assert tensors["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),
        ({"rope.scale_linear": 2.0}, RopeScaling("linear", factor=2.0)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_attn_factor": 0.5,
            },
            RopeScaling(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                attention_factor=0.5 * (0.1 * math.log(4.0) + 1.0),
            ),
        ),
    ],
)
def test_rope_scaling(metadata, expected, tmp_path):
    save_tiny_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata=metadata)
    assert GgufFile(tmp_path / "tiny.gguf").config.rope_scaling == expected


def test_rope_factors_belong_to_the_config(tmp_path):
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    save_tiny_gguf(tmp_path / "tiny.gguf", tiny("llama"), extra_tensors={"rope_freqs.weight": factors})
    file = GgufFile(tmp_path / "tiny.gguf")
    assert file.config.rope_scaling == RopeScaling("frequency_factors", frequency_factors=tuple(factors.tolist()))
    assert "rope_freqs.weight" not in dict(file.tensors())


def test_unknown_tensors_keep_their_name(tmp_path):
    """So that the loader, which knows what it needs, can name what is too much."""
    save_tiny_gguf(tmp_path / "tiny.gguf", tiny("llama"), extra_tensors={"blk.0.novelty": np.ones(4, np.float32)})
    assert "blk.0.novelty" in dict(GgufFile(tmp_path / "tiny.gguf").tensors())


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"expert_count": 8}, "8 experts"),
        ({"attention.sliding_window": 128}, "sliding-window"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"attention.value_length": 8}, "attention.value_length 8"),
        ({"attention.head_count_kv": [3, 3, 1]}, "attention.head_count_kv that differs between layers"),
    ],
)
def test_unsupported_models_are_refused_by_name(metadata, told, tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny("llama"), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        find_checkpoint(path)
    assert str(path) in str(caught.value)


def test_other_architectures_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba': supported are llama, qwen2, qwen3"):
        find_checkpoint(tmp_path / "other.gguf")


def test_types_without_a_dequantiser_are_refused_by_name(tmp_path):
    save_tiny_gguf(tmp_path / "tiny.gguf", tiny("llama"), extra_tensors={"odd": np.ones((2, 4), np.int32)})
    with pytest.raises(UnsupportedModelError, match=r"I32 \(tensor odd\)"):
        find_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("missing", ["block_count", "attention.head_count", "feed_forward_length", "context_length"])
def test_missing_metadata_is_named(missing, tmp_path):
    save_tiny_gguf(tmp_path / "tiny.gguf", tiny("llama"), metadata={missing: None})
    with pytest.raises(CheckpointError, match=f"llama.{missing} is missing"):
        find_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kept", [0.0, 2, 10, 30, 0.001, 0.01, 0.5, 0.999])
def test_truncated_files(kept, tmp_path):
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny("llama"))
    contents = path.read_bytes()
    path.write_bytes(contents[: kept if isinstance(kept, int) else int(len(contents) * kept)])
    with pytest.raises(CheckpointError, match="is not a whole GGUF file") as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"{}" * 100)
    with pytest.raises(CheckpointError, match="is not a whole GGUF file"):
        find_checkpoint(path)


def test_tokenizer_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny("qwen3"))
    checkpoint = find_checkpoint(path)
    assert checkpoint.name == "tiny"
    assert checkpoint.eos_token_ids == (EOS_TOKEN_ID, 0)  # <|im_end|>, and <|endoftext|> by its text
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    text = "The capital of France is König Paris 😀!\n\n<|im_end|>"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text).ids
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    monkeypatch.setattr(GgufTokenizer, "save", lambda *_: pytest.fail("converted again"))
    assert find_checkpoint(path) == checkpoint
    assert [entry.name for entry in (tmp_path / "cache" / "tokenizers").iterdir()] == [checkpoint.directory.name]


@pytest.mark.parametrize(
    ("pre_tokenizer", "starts", "digits"),
    [("llama-bpe", True, ["123", "4"]), ("qwen2", False, list("1234")), ("smollm", False, list("1234"))],
)
def test_words_are_split_as_the_vocabulary_expects(pre_tokenizer, starts, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny("llama"), pre_tokenizer=pre_tokenizer, bos_token_id=0)
    tokenizer = Tokenizer.from_directory(find_checkpoint(path).directory)
    assert tokenizer.special_tokens["bos_token"] == "<|endoftext|>"
    assert (tokenizer.encode("Paris")[0] == 0) == starts
    assert 0 not in tokenizer.encode("Paris", add_special_tokens=False)
    words = [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("1234")]
    assert words == digits


def test_tokenizer_that_cannot_be_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    save_tiny_gguf(path, tiny("qwen3"))
    # Of the same length, so that the file stays whole.
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.neither"[:21]))
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nothing"[:21]))
    with pytest.raises(CheckpointError, match=r"tokenizer of tiny.gguf could not be converted") as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


# The built-in model, through the user's real cache.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return default_model.default_model_file()


@pytest.mark.slow
def test_default_model_is_read_as_transformers_reads_it(smollm2):
    checkpoint = find_checkpoint("smollm2")
    theirs = AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    config = checkpoint.config
    assert (checkpoint.name, checkpoint.eos_token_ids) == ("smollm2", (2, 4, 0))  # as llama.cpp ends
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (theirs.num_hidden_layers, theirs.hidden_size) == (30, 576)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (9, 3)
    assert config.vocab_size == theirs.vocab_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == pytest.approx(theirs.rms_norm_eps)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.tie_embeddings
    expected = read_by_transformers(smollm2)
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected.keys() - {"lm_head.weight"}
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.q_proj.weight"):
        assert torch.equal(tensors[name], expected[name])
    for name in ("model.layers.29.self_attn.k_proj.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], expected[name])


def test_the_fast_reader_equals_the_packages_reader(smollm2):
    slow = gguf.GGUFReader(smollm2)
    quick = GgufFile(smollm2)._reader
    assert quick.fields.keys() == slow.fields.keys()
    assert quick.fields["llama.block_count"].contents() == slow.fields["llama.block_count"].contents()
    vocabulary = {name: field.contents() for name, field in slow.fields.items() if name.startswith("tokenizer.")}
    assert GgufFile(smollm2).tokenizer_metadata() == vocabulary
    assert [(t.name, t.data_offset, t.n_bytes) for t in quick.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in slow.tensors
    ]


def test_default_models_tokenizer(smollm2):
    checkpoint = find_checkpoint("smollm2")
    ours = Tokenizer.from_directory(checkpoint.directory)
    theirs = AutoTokenizer.from_pretrained(checkpoint.directory)
    for text in ["What is the capital of France?", "naïve café 😀 <|im_start|>", "def f(x):\n    return x\n"]:
        assert ours.encode(text) == theirs.encode(text)
    # SmolLM2 was trained with each digit on its own, apart from the spaces before it.
    pieces = [ours.decode([token]) for token in ours.encode("in   2024")]
    assert pieces == ["in", "   ", "2", "0", "2", "4"]
    messages = [{"role": "user", "content": "Hello"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == prompt
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert CHATML.split("%}")[0] in (checkpoint.directory / "chat_template.jinja").read_text()


def test_later_starts_load_no_transformers(smollm2):
    find_checkpoint("smollm2")
    check = (
        "import sys, dispec.engine.loading.checkpoint as c; c.find_checkpoint('smollm2'); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], cwd=Path(default_model.__file__).parents[1], check=True)
