"""The model's logits against transformers', on small random checkpoints in fp32, over every way to cut a prompt."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.config import ModelConfig
from dispec.layers.types import Weights
from dispec.layers.weights import load_weights
from tests.checkpoints import FAMILIES, save_tiny
from tests.paged_model import PagedModel

pytestmark = pytest.mark.smoke

TOLERANCE = 1e-4


@dataclass
class Case:
    config: ModelConfig
    weights: Weights
    prompts: list[list[int]]
    expected: list[Tensor]

    def assert_close(self, sequence: int, first: int, logits: Tensor) -> None:
        expected = self.expected[sequence][first : first + len(logits)]
        assert (logits - expected).abs().max().item() <= TOLERANCE


def make_case(directory, family: str, lengths=(37, 5, 16, 64), **overrides) -> Case:
    reference = save_tiny(directory, family, **overrides).eval()
    checkpoint = find_checkpoint(directory)
    weights = load_weights(checkpoint.config, checkpoint.tensors(), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    vocab = checkpoint.config.vocab_size
    prompts = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
    with torch.no_grad():
        expected = [reference(torch.tensor([prompt])).logits[0].float() for prompt in prompts]
    # Logits that hardly depend on the input would make every comparison below empty.
    assert all(logits.std(dim=0).mean() > 0.05 for logits in expected)
    return Case(checkpoint.config, weights, prompts, expected)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


def test_families_cover_the_flags(tmp_path_factory):
    configs = {family: make_case(tmp_path_factory.mktemp(family), family).config for family in FAMILIES}
    assert configs["qwen2"].qkv_bias
    assert configs["qwen2"].num_heads // configs["qwen2"].num_kv_heads == 7
    assert configs["qwen3"].qk_norm
    assert configs["qwen3"].tie_embeddings
    assert configs["llama"].num_heads // configs["llama"].num_kv_heads == 3
    assert configs["llama"].rope_scaling.kind == "llama3"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_has_the_epsilon_of_the_config(family, tmp_path):
    case = make_case(tmp_path, family, rms_norm_eps=0.3)
    paged = PagedModel(case.weights, case.config, case.prompts)
    for sequence, prompt in enumerate(case.prompts):
        (logits,) = paged.compute({sequence: len(prompt)})
        case.assert_close(sequence, 0, logits)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_prefill_at_every_position(case, block_size):
    paged = PagedModel(case.weights, case.config, case.prompts, block_size)
    for sequence, prompt in enumerate(case.prompts):
        (logits,) = paged.compute({sequence: len(prompt)})
        case.assert_close(sequence, 0, logits)


@pytest.mark.parametrize("query_len", [1, None])
def test_decode_step_by_step(case, query_len):
    paged = PagedModel(case.weights, case.config, case.prompts)
    for position in range(len(case.prompts[0])):
        (logits,) = paged.compute({0: 1}, query_len)
        case.assert_close(0, position, logits)


def test_prefill_in_two_chunks_at_every_split(case):
    prompt = case.prompts[0]
    for split in range(1, len(prompt)):
        paged = PagedModel(case.weights, case.config, case.prompts, seed=split)
        for first, count in ((0, split), (split, len(prompt) - split)):
            (logits,) = paged.compute({0: count})
            case.assert_close(0, first, logits)


def test_mixed_step_of_prefill_chunk_and_decode(case):
    paged = PagedModel(case.weights, case.config, case.prompts)
    paged.compute({0: 20, 3: 30})
    together = paged.compute({3: 1, 0: 10, 1: 5, 2: 1})
    for sequence, first, logits in zip((3, 0, 1, 2), (30, 20, 0, 0), together, strict=True):
        case.assert_close(sequence, first, logits)


@pytest.mark.parametrize("query_len", [2, 5, 16])
def test_verify_step(case, query_len):
    paged = PagedModel(case.weights, case.config, case.prompts)
    paged.compute({0: 20, 3: 33})
    for sequence, logits in zip((0, 3), paged.compute({0: query_len, 3: query_len}, query_len), strict=True):
        case.assert_close(sequence, {0: 20, 3: 33}[sequence], logits)


ROPE_SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_rope_scalings(kind, tmp_path):
    case = make_case(tmp_path, "llama", lengths=(200,), rope_parameters=ROPE_SCALINGS[kind])
    plain = make_case(tmp_path / "plain", "llama", lengths=(200,), rope_parameters={"rope_theta": 10000.0})
    assert not torch.allclose(case.expected[0], plain.expected[0], atol=0.01)
    (logits,) = PagedModel(case.weights, case.config, case.prompts).compute({0: 200})
    case.assert_close(0, 0, logits)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoint_tied_or_not(tied, tmp_path):
    case = make_case(tmp_path, "qwen2", tie_word_embeddings=tied, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (logits,) = PagedModel(case.weights, case.config, case.prompts).compute({0: 37})
    case.assert_close(0, 0, logits)


def test_attention_bias_of_llama(tmp_path):
    case = make_case(tmp_path, "llama", attention_bias=True)
    assert case.config.qkv_bias
    assert case.config.output_bias
    assert case.weights.layers.attention.output_bias.abs().max() > 0
    (logits,) = PagedModel(case.weights, case.config, case.prompts).compute({0: 37})
    case.assert_close(0, 0, logits)


def test_head_is_computed_for_selected_rows_only(case):
    """The function that the engine compiles selects rows before the head, never after."""
    from dispec.layers import model

    rows = torch.randn(3, case.config.hidden_size)
    assert model.logits(rows, case.weights, case.config).shape == (3, case.config.vocab_size)
