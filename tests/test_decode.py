"""Tokens decoded in one call are those of single steps, and leave the same keys and values, to the last bit."""

import pytest
import torch

from dispec import ops
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.decoding import build_decoder
from dispec.layers.sampling import greedy, sample
from dispec.layers.steps import Vocabulary
from dispec.layers.types import Sampling
from dispec.layers.weight_stacks import Packing
from dispec.layers.weights import load_weights
from tests.checkpoints import VOCAB_SIZE, save_tiny
from tests.paged_model import PagedModel

FITTING = {"head_dim": 32, "intermediate_size": 96}
COUNTS = [6, 4, 4, 1]
PROMPTS = [[(7 * row + 3 * place) % 500 for place in range(40)] for row in range(len(COUNTS))]
LENGTHS = [30, 17, 16, 2]  # at and around the end of a page, and as short as can be


def single_steps(
    model: PagedModel,
    query_len: int,
    columns: int,
    head_tokens: torch.Tensor | None,
    drawing: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[list[int]]:
    """The tokens of each sequence, computed one by one. drawing: temperatures and seeds."""
    expected: list[list[int]] = [[] for _ in COUNTS]
    for place in range(COUNTS[0]):
        rows = [row for row, count in enumerate(COUNTS) if count > place]
        count = 1 if place else query_len
        logits = torch.stack([found[-1] for found in model.compute(dict.fromkeys(rows, count), count)])[:, :columns]
        position = torch.tensor([LENGTHS[row] + place for row in rows])
        if drawing is None:
            chosen = greedy(logits)
        else:
            temperature, seed = drawing
            chosen = sample(logits, Sampling(temperature[rows], seed[rows], position), head_tokens)
        for row, column in zip(rows, chosen.tolist(), strict=True):
            token = column if head_tokens is None else int(head_tokens[column])
            expected[row].append(token)
            model.prompts[row][LENGTHS[row] + place] = token
    return expected


INT4 = ops.Quantization("int4", 32)
# Each pair of values of two columns is in one of the rows.
CASES = [
    ("qwen2", None, 1, "greedy"),
    ("qwen2", INT4, 2, "drawn"),
    ("qwen2", None, 2, "some tokens"),
    ("qwen2", INT4, 1, "small vocabulary"),
    ("qwen3", INT4, 2, "greedy"),
    ("qwen3", None, 1, "drawn"),
    ("qwen3", INT4, 1, "some tokens"),
    ("qwen3", None, 2, "small vocabulary"),
    ("llama", None, 2, "greedy"),
    ("llama", INT4, 1, "drawn"),
    ("llama", INT4, 2, "some tokens"),
    ("llama", None, 1, "small vocabulary"),
]


@pytest.mark.parametrize(("family", "quantization", "query_len", "kind"), CASES)
def test_tokens_and_pages_are_those_of_single_steps(tmp_path, family, quantization, query_len, kind):
    compare_with_single_steps(tmp_path, family, quantization, query_len, kind)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("family", "query_len", "cache_dtype"),
    [
        ("llama", 1, torch.int8),
        ("llama", 2, torch.float8_e4m3fn),
        ("qwen3", 1, torch.float8_e4m3fn),
        ("qwen3", 2, torch.int8),
    ],
)
def test_tokens_and_pages_of_a_quantised_cache(tmp_path, family, query_len, cache_dtype):
    compare_with_single_steps(tmp_path, family, None, query_len, "drawn", cache_dtype)


def compare_with_single_steps(tmp_path, family, quantization, query_len, kind, cache_dtype=None):
    save_tiny(tmp_path, family, **FITTING)
    checkpoint = find_checkpoint(tmp_path)
    config = checkpoint.config
    weights = load_weights(
        config,
        checkpoint.tensors(),
        torch.bfloat16,
        torch.device("cpu"),
        packing=Packing(quantization),
    )
    head_tokens = None
    columns = VOCAB_SIZE - 100 if kind == "small vocabulary" else VOCAB_SIZE
    if kind == "some tokens":
        torch.manual_seed(0)
        head_tokens = torch.randperm(VOCAB_SIZE)[:70]
        columns = len(head_tokens)
        head = torch.randn(columns, config.hidden_size).bfloat16()
        weights = weights._replace(lm_head=ops.pack(head, quantization))
    temperature = torch.tensor([0.0, 1.0, 2.0, 0.5])
    seed = torch.tensor([3, -(2**62), 2**40, 0])
    models = [
        PagedModel(weights, config, [list(prompt) for prompt in PROMPTS], cache_dtype=cache_dtype) for _ in range(2)
    ]
    one_call = build_decoder(weights, config, Vocabulary(columns, head_tokens), models[0].kv_cache, 40)
    if one_call is None:
        pytest.skip("this CPU has neither AVX512-BF16 nor AVX2")
    for model in models:
        model.compute({row: length - query_len for row, length in enumerate(LENGTHS) if length > query_len})
        model.computed = [length - query_len for length in LENGTHS]
    prompts = [list(prompt) for prompt in PROMPTS]
    if kind == "small vocabulary":  # a token that the model does not know is taken for its last
        prompts[0][LENGTHS[0] - 1], models[1].prompts[0][LENGTHS[0] - 1] = VOCAB_SIZE + 8, VOCAB_SIZE - 1
    drawing = None if kind == "greedy" else (temperature, seed)
    expected = single_steps(models[1], query_len, columns, head_tokens, drawing)
    found = ops.decode_tokens(
        one_call,
        torch.tensor(COUNTS),
        torch.tensor([prompt[length - query_len : length] for prompt, length in zip(prompts, LENGTHS, strict=True)]),
        torch.tensor([table + [0] * (3 - len(table)) for table in models[0].tables]),
        torch.tensor(LENGTHS),
        *(drawing or (None, None)),
    )
    assert [tokens[:count] for tokens, count in zip(found.tolist(), COUNTS, strict=True)] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for one, other in zip(models[0].kv_cache, models[1].kv_cache, strict=True):
        assert torch.equal(one[:, 1:].view(torch.uint8), other[:, 1:].view(torch.uint8))
