"""All layers of a uniform step in one call give the bits of `layers.model.decoder_layer` for each layer."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dispec import ops
from dispec.layers import model
from dispec.layers.config import ModelConfig, Shard
from dispec.layers.decoding import build_decoder
from dispec.layers.steps import Vocabulary
from dispec.layers.types import Batch, KVCache, Weights
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import dummy_weights
from dispec.ops.cpu.library import has_packed_linear
from dispec.ops.kv_cache import LARGEST_CODE, codes_and_scales, scale_rows

BLOCK_SIZE = 16
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=144,
    intermediate_size=96,
    num_layers=3,
    num_heads=9,
    num_kv_heads=3,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
CONFIGS = {
    "llama": CONFIG,
    "query biases": replace(CONFIG, hidden_size=128, num_heads=14, num_kv_heads=2, head_dim=64, qkv_bias=True),
    "head norms": replace(CONFIG, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True),
    "all biases": replace(CONFIG, num_heads=3, head_dim=48, qkv_bias=True, output_bias=True),
}
CONTEXTS = (700, 16, 17, 43, 1100, 513, 32)  # around the ends of pages, and of the spans that attention divides
needs_kernels = pytest.mark.skipif(not has_packed_linear(), reason="needs AVX512-BF16 or AVX2")


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_weights(
    config: ModelConfig, quantization: ops.Quantization | None = None, dtype: torch.dtype = torch.bfloat16
) -> Weights:
    """Dummy weights with norms and biases that change the result."""
    weights = dummy_weights(config, dtype, torch.device("cpu"), packing=Packing(quantization))
    torch.manual_seed(1)
    blocks, attention = weights.layers, weights.layers.attention
    for norm in (blocks.attention_norm, blocks.mlp_norm, attention.query_norm, attention.key_norm):
        if norm is not None:
            norm.uniform_(0.5, 1.5)
    for bias in (attention.qkv_bias, attention.output_bias):
        if bias is not None:
            bias.normal_()
    return weights


def with_offsets(matrix: torch.Tensor, quantization: ops.Quantization) -> ops.Matrix:
    """A matrix quantised with random offsets."""
    quantized = ops.quantize(matrix, quantization)
    return ops.pack(replace(quantized, offsets=torch.randn_like(quantized.scales) * 0.01))


def quantized_weights(config: ModelConfig) -> Weights:
    """Weights whose kinds differ between matrices, and in one matrix between layers."""
    weights = random_weights(config, ops.Quantization("int4", 32))
    layers, num_layers = weights.layers, config.num_layers
    query_size = config.num_heads * config.head_dim
    down = torch.randn(num_layers, config.hidden_size, config.intermediate_size).bfloat16() * 0.05
    output = torch.randn(num_layers, config.hidden_size, query_size).bfloat16() * 0.05
    down_layers = (
        ops.pack(down[0]),
        ops.pack(down[1], ops.Quantization("int4", 16)),
        with_offsets(down[2], ops.Quantization("int8", 48)),
    )
    output_layers = tuple(with_offsets(matrix, ops.Quantization("int8")) for matrix in output)
    attention, mlp = layers.attention._replace(output=output_layers), layers.mlp._replace(down=down_layers)
    return weights._replace(layers=layers._replace(attention=attention, mlp=mlp))


def empty_cache(config: ModelConfig, num_blocks: int = 2, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    shape = (config.num_layers, num_blocks, config.num_kv_heads)
    rows = config.head_dim + scale_rows(dtype)
    return KVCache(
        torch.zeros(*shape, rows, BLOCK_SIZE, dtype=dtype),
        torch.zeros(*shape, BLOCK_SIZE, rows, dtype=dtype),
    )


def fill(cache: KVCache, written: torch.Tensor) -> None:
    """Fill the slots `written` with random numbers and all others with NaN."""
    at = written // BLOCK_SIZE, written % BLOCK_SIZE
    parts = [(cache.keys, (1, 4, 0, 2, 3)), (cache.values, (1, 3, 0, 2, 4))]
    if cache.keys.dtype in LARGEST_CODE:
        parts = []
        for keys, values in zip(*cache, strict=True):
            for codes, scales in codes_and_scales(keys, values):
                codes.view(torch.uint8).random_(0, 127)
                parts.append((scales, (0, 2, 1)))
    for pages_of, order in parts:
        there = pages_of.normal_().permute(order)
        kept = there[at]
        pages_of.fill_(torch.nan)
        there[at] = kept / 60 if cache.keys.dtype in LARGEST_CODE else kept


def uniform_step(
    config: ModelConfig, size: int, query_len: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Batch, KVCache]:
    """The last `query_len` tokens of `size` sequences in shuffled pages, which are NaN where nothing is written yet."""
    contexts = torch.tensor([CONTEXTS[row % len(CONTEXTS)] for row in range(size)])
    pages = -(-contexts // BLOCK_SIZE)
    numbers = 1 + torch.randperm(int(pages.sum()))
    tables = torch.nn.utils.rnn.pad_sequence(numbers.split(pages.tolist()), batch_first=True)
    every = torch.arange(tables.shape[1] * BLOCK_SIZE).expand(size, -1)
    slots = tables.gather(1, every // BLOCK_SIZE) * BLOCK_SIZE + every % BLOCK_SIZE
    own = (every >= contexts[:, None] - query_len) & (every < contexts[:, None])
    cache = empty_cache(config, len(numbers) + 1, dtype)
    fill(cache, slots[every < contexts[:, None] - query_len])
    batch = Batch(
        token_ids=torch.randint(config.vocab_size, (size * query_len,)),
        positions=every[own],
        slot_mapping=slots[own].int(),
        block_tables=tables.int(),
        query_start=torch.arange(size + 1, dtype=torch.int32) * query_len,
        context_lens=contexts.int(),
        logits_indices=None,
        query_len=query_len,
    )
    return batch, cache


@needs_kernels
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.usefixtures("threads")
def test_bits_are_those_of_each_layer_in_turn(kind: str, is_quantized: bool) -> None:
    config = CONFIGS[kind]
    weights = quantized_weights(config) if is_quantized else random_weights(config)
    steps = [(size, query_len) for size in (1, 2, 3) for query_len in range(1, 17)]
    steps += [(size, query_len) for size in (7, 33) for query_len in (1, 2, 5, 16)]
    for size, query_len in steps:
        compare_with_each_layer(config, weights, size, query_len)


@needs_kernels
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", LARGEST_CODE)
def test_bits_are_those_of_each_layer_in_turn_with_a_quantised_cache(kind: str, dtype: torch.dtype) -> None:
    for size, query_len in ((1, 1), (3, 1), (2, 5), (7, 2), (3, 16)):
        compare_with_each_layer(CONFIGS[kind], random_weights(CONFIGS[kind]), size, query_len, dtype)


def compare_with_each_layer(
    config: ModelConfig, weights: Weights, size: int, query_len: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    batch, cache = uniform_step(config, size, query_len, dtype)
    other = KVCache(cache.keys.clone(), cache.values.clone())
    gathered = build_decoder(weights, config, Vocabulary(config.vocab_size), cache)
    assert gathered is not None
    with torch.inference_mode():
        whole = model.hidden_states(weights, config, batch, cache, gathered)
        parts = model.hidden_states(weights, config, batch, other)
    assert whole.isfinite().all()
    for one, two in ((whole, parts), (cache.keys, other.keys), (cache.values, other.values)):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), (size, query_len)


@needs_kernels
@pytest.mark.parametrize(("size", "query_len", "is_one_call"), [(3, 3, True), (3, 16, True), (1, 19, False)])
def test_ragged_steps_with_few_tokens_of_each_sequence_are_one_call(
    monkeypatch: pytest.MonkeyPatch, size: int, query_len: int, is_one_call: bool
) -> None:
    """The bits are those of each layer in turn for sequences of different lengths, too."""
    weights, calls = random_weights(CONFIG), []
    layers, layer = ops.decoder_layers, model.decoder_layer
    monkeypatch.setattr(ops, "decoder_layers", lambda *given: calls.append("layers") or layers(*given))
    monkeypatch.setattr(model, "decoder_layer", lambda *given: calls.append("layer") or layer(*given))
    batch, cache = uniform_step(CONFIG, size, query_len)
    gathered = build_decoder(weights, CONFIG, Vocabulary(CONFIG.vocab_size), cache)
    assert gathered is not None
    ragged = batch._replace(
        token_ids=batch.token_ids[2:],
        positions=batch.positions[2:],
        slot_mapping=batch.slot_mapping[2:],
        query_start=(batch.query_start - 2).clamp(min=0),
        query_len=None,
    )
    with torch.inference_mode():
        model.hidden_states(weights, CONFIG, batch._replace(query_len=None), cache)  # writes all keys and values
        other = KVCache(cache.keys.clone(), cache.values.clone())
        calls.clear()
        whole = model.hidden_states(weights, CONFIG, ragged, cache, gathered)
        assert calls == (["layers"] if is_one_call else ["layer"] * CONFIG.num_layers)
        parts = model.hidden_states(weights, CONFIG, ragged, other)
    assert whole.isfinite().all()
    for one, two in ((whole, parts), (cache.keys, other.keys), (cache.values, other.values)):
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@needs_kernels
def test_inputs_may_be_wider_integers_and_parts_of_larger_tensors() -> None:
    weights = random_weights(CONFIG)
    batch, cache = uniform_step(CONFIG, 3, 2)
    other = KVCache(cache.keys.clone(), cache.values.clone())
    expected = model.hidden_states(weights, CONFIG, batch, other)
    wide = batch._replace(
        slot_mapping=batch.slot_mapping.long(),
        block_tables=torch.nn.functional.pad(batch.block_tables, (0, 5))[:, :-5],
        query_start=batch.query_start.long(),
        context_lens=batch.context_lens.repeat_interleave(2)[::2],
    )
    gathered = build_decoder(weights, CONFIG, Vocabulary(CONFIG.vocab_size), cache)
    assert torch.equal(model.hidden_states(weights, CONFIG, wide, cache, gathered), expected)


@pytest.mark.parametrize(
    "kind", ["float32", "plain weights", "oneDNN's layout", "head size", "MLP size", "a shard", "reordered columns"]
)
def test_models_without_a_kernel_have_no_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, dtype = CONFIG, torch.bfloat16
    if kind == "float32":
        dtype = torch.float32
    elif kind == "plain weights":
        monkeypatch.setenv("DISPEC_PACKED_WEIGHTS", "off")
    elif kind == "oneDNN's layout":
        monkeypatch.setattr(sys.modules["dispec.ops.linear"], "has_packed_linear", lambda: False)
    elif kind == "head size":
        config = replace(CONFIG, head_dim=24)
    elif kind == "MLP size":
        config = replace(CONFIG, intermediate_size=80)
    weights = random_weights(config, dtype=dtype)
    if kind == "reordered columns":
        reordered = ops.pack(torch.randn(config.hidden_size, config.intermediate_size), ops.Quantization("int4"))
        assert isinstance(reordered, ops.QuantizedWeight)
        reordered = reordered._replace(column_order=torch.randperm(config.intermediate_size).int())
        down = (*(ops.layer_of(weights.layers.mlp.down, layer) for layer in range(config.num_layers - 1)), reordered)
        weights = weights._replace(layers=weights.layers._replace(mlp=weights.layers.mlp._replace(down=down)))
    if kind == "a shard":
        config = replace(config, shard=Shard(0, 2, "ranks"))
    assert build_decoder(weights, config, Vocabulary(config.vocab_size), empty_cache(config, dtype=dtype)) is None
