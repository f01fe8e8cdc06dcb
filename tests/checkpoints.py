"""Small random checkpoints in the forms that real ones have, made with transformers and the gguf package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

_Type = gguf.GGMLQuantizationType

FAMILIES = ("qwen2", "qwen3", "llama")
VOCAB_SIZE = 512

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = SPECIAL_TOKENS.index("<|im_end|>")

_CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris, as everyone knows.",
    "An engine that can be read: paged caches, continuous batching, compiled steps and kernels.",
    "Es war einmal ein König, der hatte drei Töchter; la reine aimait les fraises à la crème.",
    "def add(a, b):\n    return a + b  # 1234567890\n\nprint(add(2, 3))\n",
    "人工智能的引擎 😀😃😄 здравствуй мир — “quotes”, dashes… and 100% of the rest.",
)

_SHAPES: dict[str, dict[str, Any]] = {
    # 7 query heads a KV head, and a projection wider than the hidden size
    "qwen2": {"hidden_size": 128, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
    "qwen3": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "llama": {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CONFIGS: dict[str, type] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config of three layers; Qwen 3 ties its embeddings, Llama stretches its positions."""
    settings = _SHAPES[family] | {
        "vocab_size": VOCAB_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family == "qwen3",
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
    }
    if family == "llama":
        settings |= {"rope_parameters": dict(_LLAMA3_ROPE), "rms_norm_eps": 1e-5}
    return _CONFIGS[family](**(settings | overrides))


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model whose every weight, bias and norm is random and large enough to change its logits."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.5 * noise
            else:
                noise = noise * (2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(noise)
    return model.to(dtype).eval().requires_grad_(False)


def save_tiny(
    directory: Path,
    family: str,
    seed: int = 0,
    max_shard_size: str | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """Save a random model with its tokenizer as a Hugging Face directory; returns the model, in `dtype`.

    `max_shard_size`, such as `"200KB"`, splits the weights over files with an index.
    """
    model = tiny_model(family, seed, dtype, **overrides)
    model.save_pretrained(directory, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    save_tokenizer(directory)
    if family == "qwen2":  # transformers reads every tokenizer of this family as Qwen's
        qwen_tokenizer().save(str(directory / "tokenizer.json"))
    return model


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of some 450 tokens that covers every byte; ids 0, 1, 2 are the ChatML tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 62,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 2, trainer)
    return tokenizer


def qwen_tokenizer() -> tokenizers.Tokenizer:
    """The same vocabulary with words split as Qwen 2 splits them."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    tokenizer = tiny_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """As files of the time of Llama 2 spell it: the space is prepended by the normalizer, before each text."""
    words = ["▁", *"thecapiolfrnFsx", "▁t", "he", "▁the", "▁c", "ap", "▁cap", "▁▁", "▁F", "▁x"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "c"),
        ("a", "p"),
        ("▁c", "ap"),
        ("▁", "▁"),
        ("▁", "F"),
        ("▁", "x"),
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def save_tokenizer(directory: Path, **config: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json, with a ChatML template; `config` adds to or replaces entries."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(entries | config), encoding="utf-8")


def save_tiny_gguf(
    path: Path,
    model: PreTrainedModel,
    quantization: gguf.GGMLQuantizationType | Callable[[str], gguf.GGMLQuantizationType] = _Type.F32,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    pre_tokenizer: str = "smollm",
    bos_token_id: int | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Write a model as llama.cpp's converter does: its names, its row order of Llama's rotated projections.

    `quantization` is of the matrices whose rows it can hold, or gives the type of each by its name in the file; vectors
    stay F32. Types that the gguf package cannot write get random blocks. `metadata` adds keys after the
    architecture's name (`rope.scaling.type`); a value of None takes one out. `pre_tokenizer` is llama.cpp's name for
    how text is split into words. `tokenizer` replaces the tokenizer's entries, by their names after `tokenizer.ggml.`.
    """
    config = model.config
    family = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entries: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": head_dim,
    }
    writer = gguf.GGUFWriter(path, family)
    for key, value in (entries | (metadata or {})).items():
        if value is not None:
            _add_value(writer, f"{family}.{key}", value)
    if tokenizer is None:
        _add_tokenizer(writer, pre_tokenizer, bos_token_id)
    for key, value in (tokenizer or {}).items():
        _add_value(writer, f"tokenizer.ggml.{key}", value)
    names = gguf.get_tensor_name_map(_GGUF_ARCHITECTURES[family], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        array = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        kind = quantization if isinstance(quantization, _Type) else quantization(gguf_name)
        if array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = _Type.F32
        writer.add_tensor(gguf_name, _quantized(array, kind), raw_dtype=kind)
    for name, array in (extra_tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(
    shape: tuple[int, int], kind: gguf.GGMLQuantizationType, seed: int = 0, deviation: float = 1.0
) -> np.ndarray:
    """Blocks of a quantised type with every bit in use: rows of bytes for a matrix of about this standard deviation."""
    random = np.random.default_rng(seed)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (shape[0] * shape[1] // block_size, block_bytes), dtype=np.uint8)

    def scale(factors: np.ndarray) -> None:
        for at, factor in zip(_FLOAT16_AT[kind], factors, strict=True):
            blocks[:, at : at + 2] = factor.astype(np.float16).reshape(-1, 1).view(np.uint8)

    factors = random.uniform(0.5, 1.5, (len(_FLOAT16_AT[kind]), len(blocks)))
    factors[1:] *= -8 if kind in (_Type.Q4_1, _Type.Q5_1) else 8  # of the minimum, so that numbers are around 0
    scale(factors)
    scale(factors * deviation / gguf.dequantize(blocks, kind).std())
    return blocks.reshape(shape[0], -1)


# Where a block has float16 numbers: its scale, and that of its minima.
_FLOAT16_AT = {
    _Type.Q4_0: (0,),
    _Type.Q4_1: (0, 2),
    _Type.Q5_0: (0,),
    _Type.Q5_1: (0, 2),
    _Type.Q8_0: (0,),
    _Type.Q2_K: (80, 82),
    _Type.Q4_K: (0, 2),
    _Type.Q5_K: (0, 2),
    _Type.Q6_K: (208,),
}


def _quantized(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        return random_blocks(array.shape, kind, seed=array.size, deviation=float(array.std()))


_GGUF_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str, bos_token_id: int | None) -> None:
    contents = json.loads(tiny_tokenizer().to_str())
    tokens = sorted(contents["model"]["vocab"], key=contents["model"]["vocab"].get)
    padding = [f"[PAD{index}]" for index in range(len(tokens), VOCAB_SIZE)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    kinds = [control if token in SPECIAL_TOKENS else normal for token in tokens] + [unused] * len(padding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens + padding)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in contents["model"]["merges"]])
    writer.add_eos_token_id(EOS_TOKEN_ID)
    writer.add_pad_token_id(0)
    if bos_token_id is not None:
        writer.add_bos_token_id(bos_token_id)
    writer.add_chat_template(CHATML)
