"""The steps, run eagerly, against `layers.model.forward` and transformers."""

import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.layers.config import ModelConfig
from dispec.layers.logit_processing import apply_top_k_top_p
from dispec.layers.sampling import sample
from dispec.layers.speculation import DraftState, draft_step
from dispec.layers.steps import PreviousTokens, Vocabulary, decode_step, prefill_step
from dispec.layers.types import Batch, KVCache, Sampling, SamplingFilters, Weights
from dispec.layers.weights import load_weights
from tests.checkpoints import VOCAB_SIZE, save_tiny
from tests.paged_model import PagedModel

Model = tuple[PreTrainedModel, ModelConfig, Weights]

LENGTHS = (37, 18, 33)
PROMPTS = [[random.Random(number).randrange(VOCAB_SIZE) for _ in range(size)] for number, size in enumerate(LENGTHS)]
NUM_DRAFTS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("llama")
    reference = save_tiny(directory, "llama")
    found = find_checkpoint(directory)
    return reference, found.config, load_weights(found.config, found.tensors(), torch.float32, torch.device("cpu"))


def decode(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
    found, likeliest = decode_step(weights, config, Vocabulary(config.vocab_size), batch, kv_cache, None)
    assert torch.equal(likeliest, found.argmax(-1))
    return found


def prefill(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
    states, found, likeliest = prefill_step(weights, config, Vocabulary(config.vocab_size), batch, kv_cache, None)
    assert torch.equal(likeliest, found.argmax(-1))
    assert states.shape == (len(batch.token_ids), config.hidden_size)
    return found


def test_steps_compute_what_forward_and_transformers_do(tiny: Model) -> None:
    reference, config, weights = tiny
    with torch.no_grad():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    plain, stepped = PagedModel(weights, config, PROMPTS), PagedModel(weights, config, PROMPTS)
    done = [0, 0, 0]
    for step, counts in ((prefill, (9, 1, 12)), (decode, (1, 1, 1)), (prefill, (20, 8, 13)), (decode, (3, 3, 3))):
        stepped.forward = step
        query_len = counts[0] if step is decode else None
        wanted = plain.compute(dict(enumerate(counts)), query_len)
        for number, found in enumerate(stepped.compute(dict(enumerate(counts)), query_len)):
            assert torch.equal(found, wanted[number])
            stop = done[number] + counts[number]
            torch.testing.assert_close(found, expected[number][done[number] : stop], atol=1e-4, rtol=0)
            done[number] = stop


@pytest.mark.parametrize("step", [decode_step, prefill_step])
def test_ids_are_taken_from_the_buffer_where_the_batch_has_none(tiny: Model, step) -> None:
    _, config, weights = tiny

    def hidden(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
        is_hidden = torch.arange(len(batch.token_ids)) % 3 > 0
        order = torch.randperm(len(is_hidden), generator=torch.Generator().manual_seed(0))
        buffer = torch.full((50,), -1).index_copy(0, order, batch.token_ids)
        previous = PreviousTokens(torch.where(is_hidden, order + 1, 0), buffer)
        batch = batch._replace(token_ids=torch.where(is_hidden, 7, batch.token_ids))
        return step(weights, config, Vocabulary(config.vocab_size), batch, kv_cache, previous)[-2]

    counts = dict.fromkeys(range(3), 5)
    query_len = 5 if step is decode_step else None
    wanted = PagedModel(weights, config, PROMPTS).compute(counts, query_len)
    found = PagedModel(weights, config, PROMPTS, forward=hidden).compute(counts, query_len)
    assert all(map(torch.equal, found, wanted))


def with_vocabulary(tiny: Model, weights: Weights, vocabulary: Vocabulary, prompts: list[list[int]]) -> Tensor:
    _, config, _ = tiny

    def step(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
        _, found, likeliest = prefill_step(weights, config, vocabulary, batch, kv_cache, None)
        assert torch.equal(likeliest, found.argmax(-1))
        return found

    return torch.cat(PagedModel(weights, config, prompts, forward=step).compute({0: len(prompts[0])}))


def test_logits_are_for_the_tokens_of_the_vocabulary(tiny: Model) -> None:
    _, config, weights = tiny
    whole = torch.cat(PagedModel(weights, config, PROMPTS).compute({0: len(PROMPTS[0])}))
    larger = with_vocabulary(tiny, weights, Vocabulary(VOCAB_SIZE + 9), PROMPTS)
    assert torch.equal(larger[:, :VOCAB_SIZE], whole)
    assert (larger[:, VOCAB_SIZE:] == -torch.inf).all()
    assert torch.equal(with_vocabulary(tiny, weights, Vocabulary(300), PROMPTS), whole[:, :300])
    known = torch.tensor([400, 3, 77, 5])
    few = weights._replace(lm_head=weights.lm_head[known])
    found = with_vocabulary(tiny, few, Vocabulary(VOCAB_SIZE, known), PROMPTS)
    assert found.shape == whole.shape
    torch.testing.assert_close(found[:, known], whole[:, known])
    assert found.isfinite().sum() == len(known) * len(PROMPTS[0])


def test_ids_beyond_the_models_own_are_its_last(tiny: Model) -> None:
    _, _, weights = tiny
    vocabulary = Vocabulary(VOCAB_SIZE + 9)
    beyond, last = ([[1, 2, token, 3]] for token in (VOCAB_SIZE + 5, VOCAB_SIZE - 1))
    assert torch.equal(*(with_vocabulary(tiny, weights, vocabulary, prompts) for prompts in (beyond, last)))


def test_all_rows_are_wanted_where_none_are_named(tiny: Model) -> None:
    _, config, weights = tiny

    def unnamed(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
        return prefill(weights, config, batch._replace(logits_indices=None), kv_cache)

    def last(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
        row = torch.tensor([len(batch.token_ids) - 1])
        found = prefill(weights, config, batch._replace(logits_indices=row), kv_cache)
        assert found.shape == (1, VOCAB_SIZE)
        return found.expand(len(batch.token_ids), -1)

    (wanted,) = PagedModel(weights, config, PROMPTS).compute({0: 20})
    assert torch.equal(PagedModel(weights, config, PROMPTS, forward=unnamed).compute({0: 20})[0], wanted)
    torch.testing.assert_close(PagedModel(weights, config, PROMPTS, forward=last).compute({0: 20})[0][-1], wanted[-1])


@pytest.mark.parametrize("draws", ["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("knows_some", [False, True])
def test_draft_steps_choose_what_plain_steps_do(tiny: Model, draws: str, knows_some: bool) -> None:
    """Three sequences that want 4, 2 and 1 tokens, and have two each that were not computed yet."""
    _, config, weights = tiny
    known = torch.arange(1, VOCAB_SIZE, 3) if knows_some else torch.arange(VOCAB_SIZE)
    vocabulary = Vocabulary(VOCAB_SIZE, known.flip(0) if knows_some else None)
    own = weights._replace(lm_head=weights.lm_head[known.flip(0)]) if knows_some else weights
    sampling, filters = None, None
    if draws != "greedy":
        sampling = Sampling(torch.tensor([0.8, 0.0, 1.2]), torch.tensor([5, 6, 7]), torch.tensor([37, 18, 33]))
    if draws == "filtered":
        top_k = torch.tensor([6, 2, len(known)])
        filters = SamplingFilters(top_k, torch.tensor([0.9, 1.0, 0.5]), torch.tensor([0.0, 0.1, 0.0]))
    counts = [NUM_DRAFTS, 2, 1]
    room = [prompt + [0] * NUM_DRAFTS for prompt in PROMPTS]

    plain = PagedModel(weights, config, [list(tokens) for tokens in room])
    ready = {number: len(prompt) - 2 for number, prompt in enumerate(PROMPTS)}
    plain.compute(ready)
    expected: list[list[int]] = [[], [], []]
    for step in range(NUM_DRAFTS):
        rows = torch.stack([rows[-1] for rows in plain.compute(dict.fromkeys(range(3), 1 if step else 2))])
        found = torch.full_like(rows, -torch.inf).index_copy(1, known, rows[:, known])
        if sampling is None:
            token_ids = found.argmax(-1)
        else:
            if filters is not None:
                found = apply_top_k_top_p(found, sampling.temperature, filters)
            token_ids = sample(found, sampling._replace(position=sampling.position + step))
        for number, token in enumerate(token_ids.tolist()):
            plain.prompts[number][len(PROMPTS[number]) + step] = token
            expected[number].append(token)

    batches: list[Batch] = []

    def record(weights: Weights, config: ModelConfig, batch: Batch, kv_cache: KVCache) -> Tensor:
        batches.append(batch)
        return torch.zeros(len(batch.token_ids), 1)

    speculation = PagedModel(own, config, room)
    speculation.compute(ready)
    speculation.forward = record
    speculation.compute(dict.fromkeys(range(3), 2))
    first = batches[0]._replace(logits_indices=torch.tensor([1, 3, 5]))
    last_positions = torch.tensor([len(prompt) + count - 2 for prompt, count in zip(PROMPTS, counts, strict=True)])
    state = DraftState(first, last_positions, sampling, filters)
    drafted = []
    with torch.inference_mode():
        for _ in range(NUM_DRAFTS):
            token_ids, state = draft_step(own, config, vocabulary, state, speculation.kv_cache)
            drafted.append(token_ids)
    for number, tokens in enumerate(torch.stack(drafted, dim=1).tolist()):
        assert tokens[: counts[number]] == expected[number][: counts[number]]
        is_written = written(speculation, number)
        assert is_written[: last_positions[number] + 1].all()
        assert not is_written[last_positions[number] + 1 :].any()


def written(paged: PagedModel, sequence: int) -> Tensor:
    """Whether each place of a sequence's pages has keys and values in all layers."""
    keys, values = (half[:, paged.tables[sequence]] for half in paged.kv_cache)
    has_key, has_value = keys.isfinite().all((2, 3)), values.isfinite().all((2, 4))
    assert torch.equal(has_key, has_value)
    assert (has_key == has_key[0]).all()
    return has_key[0].flatten()
