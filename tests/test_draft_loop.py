"""A draft loop finds the draft tokens that the model samples step by step, and leaves the same keys and values."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.engine.loading.draft_checkpoint import save_shared_draft
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.sampling import sample
from dispec.layers.types import Sampling
from tests.checkpoints import save_tiny
from tests.small_engine import make, random_prompts

_KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.2},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.7},
    {"temperature": 0.7, "min_p": 0.1},
)


def draft_tokens_of_each_step(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    """The draft tokens of each sequence, in every step of an engine that always drafts."""
    engine = llm.engine
    engine.speculator.is_adaptive = False
    draft_model = engine.speculator.proposer
    propose, seen = draft_model.propose, []

    def watch(step: SchedulerOutput):
        # Some have fewer draft tokens than others, so that the loop must leave them out.
        works = tuple(
            scheduled._replace(num_draft_tokens=min(scheduled.num_draft_tokens, 1 + scheduled.sequence.id % 4))
            if scheduled.num_draft_tokens
            else scheduled
            for scheduled in step.scheduled_sequences
        )
        found = propose(replace(step, scheduled_sequences=works))
        seen.append([list(scheduled.sequence.draft.token_ids) for scheduled in works])
        for scheduled in step.scheduled_sequences:  # what is verified does not matter here
            missing = scheduled.num_draft_tokens - len(scheduled.sequence.draft.token_ids)
            scheduled.sequence.draft.token_ids += [0] * missing
        return found

    draft_model.propose = watch
    for prompt, each in zip(random_prompts(len(params)), params, strict=True):
        engine.add(prompt, each)
    while engine.has_work:
        engine.step()
    return seen


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("target")
    save_tiny(directory, "qwen3")
    return directory


@pytest.fixture(scope="module", params=[1, 2], ids=["another model", "the same model"])
def draft(tmp_path_factory, request) -> Path:
    directory = tmp_path_factory.mktemp("draft")
    save_tiny(directory, "qwen3", num_hidden_layers=request.param, seed=0 if request.param == 2 else 3)
    return directory


def test_draft_tokens_are_those_of_single_steps(target, draft, monkeypatch):
    params = [
        SamplingParams(max_tokens=24, ignore_eos=True, seed=index, **_KINDS[index % len(_KINDS)]) for index in range(7)
    ]
    found, values = [], []
    for loops in (True, False):
        if not loops:
            monkeypatch.setattr("dispec.engine.speculation.draft_model.can_loop", lambda _: False)
        llm = make(target, speculative_model=draft)
        found.append(draft_tokens_of_each_step(llm, params))
        values.append(llm.engine.speculator.proposer._runner.kv_cache.values[:, 1:])  # not those of padding
    assert found[0] == found[1]
    assert sum(len(tokens) for step in found[0] for tokens in step) > 100
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-4)


def test_draft_tokens_lie_where_the_steps_of_the_target_read_them(target, draft):
    llm = make(target, speculative_model=draft)
    engine = llm.engine
    engine.speculator.is_adaptive = False
    loop, seen = engine.speculator.proposer._loop, 0
    run = loop.run

    def watch(num_draft_tokens):
        nonlocal seen
        run(num_draft_tokens)
        depth = max(num_draft_tokens.values())
        for row, (sequence, count) in enumerate(sorted(num_draft_tokens.items(), key=lambda item: -item[1])):
            on_device = engine.runner.previous_token_ids[row * depth : row * depth + count]
            assert sequence.draft.token_ids == on_device.tolist()
            seen += count

    loop.run = watch
    prompts = random_prompts(5)
    params = [SamplingParams(max_tokens=5 + 3 * index, ignore_eos=True, seed=index) for index in range(5)]
    llm.generate(prompts, params)
    assert seen > 20


def test_a_padded_draft_fits_into_the_room_of_an_engine_for_one_sequence(target, draft, caplog):
    plain = make(target, max_num_seqs=1)
    llm = make(target, speculative_model=draft, max_num_seqs=1, num_speculative_tokens=15)
    llm.engine.speculator.is_adaptive = False
    runner = llm.engine.speculator.proposer._runner
    runner.plan = replace(runner.plan, compile="startup")  # so that drafts are padded, as on CUDA
    prompts, params = random_prompts(2), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [completion.outputs[0].token_ids for completion in plain.generate(prompts, params)]
    assert [completion.outputs[0].token_ids for completion in llm.generate(prompts, params)] == expected
    assert sum(record.num_draft_tokens for record in llm.engine.records) > 20
    assert "a step failed" not in caplog.text


def test_a_head_of_some_tokens_draws_with_their_noise():
    torch.manual_seed(0)
    logits = torch.randn(64, 500)
    sampling = Sampling(torch.full((64,), 1.3), torch.arange(64), torch.arange(100, 164))
    kept = torch.randperm(500)[:60]
    hidden = torch.full_like(logits, -torch.inf)
    hidden[:, kept] = logits[:, kept]
    assert torch.equal(kept[sample(logits[:, kept], sampling, kept)], sample(hidden, sampling))


@pytest.mark.parametrize("is_shared", [False, True])
def test_draft_tokens_of_one_call_are_those_of_the_loop(tmp_path, is_shared):
    """A draft of its own, and one that borrows its target's embedding and some rows of its head."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    fitting = {"head_dim": 32, "intermediate_size": 96}
    save_tiny(target, "llama", **fitting)
    whole = save_tiny(draft, "llama", num_hidden_layers=1, seed=3, **fitting)
    if is_shared:
        tensors = {name: tensor for name, tensor in whole.state_dict().items() if "embed" not in name}
        tensors.pop("lm_head.weight", None)
        about = whole.config.to_dict()
        draft = tmp_path / "shared"
        save_shared_draft(draft, about, tensors, list(range(20, 200)), Tokenizer.from_directory(target))
    kinds = ({"temperature": 0.0}, {"temperature": 1.2})
    params = [SamplingParams(max_tokens=24, ignore_eos=True, seed=index, **kinds[index % 2]) for index in range(7)]
    found = []
    for decodes in (True, False):
        llm = make(target, speculative_model=draft, dtype="bfloat16")
        loop = llm.engine.speculator.proposer._loop
        if loop._decoder is None:
            pytest.skip("this CPU has neither AVX512-BF16 nor AVX2")
        weights = loop._runner.weights
        for matrix in (weights.lm_head, weights.layers.attention.qkv, weights.layers.mlp.down):
            assert matrix.kind == "int8"
        assert llm.engine.runner.weights.layers.mlp.down.blocked.dtype is torch.bfloat16
        if not decodes:
            loop._decoder = None
        found.append(draft_tokens_of_each_step(llm, params))
    assert found[0] == found[1]
    assert sum(len(tokens) for step in found[0] for tokens in step) > 100
