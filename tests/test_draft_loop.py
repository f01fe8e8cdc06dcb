"""A draft model's loop guesses what the model guesses step by step, and leaves the same keys and values."""

from dataclasses import replace

import pytest
import torch
from engine.recorded_draft_loop import RecordedDraftLoop

from engine import SamplingParams
from engine.draft_checkpoint import save_shared_draft
from engine.step import Step
from engine.tokenizer import Tokenizer
from layers.sampling import draw
from layers.speculation import DraftState, advance
from layers.types import Batch, Sampling
from tests.checkpoints import save_tiny
from tests.small_engine import make, random_prompts

_KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.2},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.7},
    {"temperature": 0.7, "min_p": 0.1},
)


class LaunchedLoop:
    """What CUDA replays, launched on a CPU."""

    def __init__(self, loop: RecordedDraftLoop) -> None:
        self._loop = loop

    def run(self, depths) -> None:
        found = self._loop.launch(depths)
        for (sequence, count), tokens in zip(depths.items(), found.tolist(), strict=True):
            sequence.draft_token_ids = tokens[:count]


def guesses_of_each_step(llm, params, monkeypatch, kind: str) -> list[list[list[int]]]:
    engine = llm.engine
    speculator = engine.speculator
    speculator.is_adaptive = False
    draft_model = speculator.draft_model
    if kind == "single steps":
        monkeypatch.setattr("engine.draft_model.can_loop", lambda _: False)
    elif kind == "recorded":
        recorded = RecordedDraftLoop(draft_model._loop._guesser, engine.runner, 16, speculator.max_num_drafts, 512)
        recorded._chosen = torch.zeros(16 * speculator.max_num_drafts, dtype=torch.int64)
        draft_model._loop = LaunchedLoop(recorded)
    propose, seen = draft_model.propose, []

    def watch(step: Step):
        # Some have fewer guesses than others, so that the loop must leave them out.
        works = tuple(
            work._replace(num_drafts=min(work.num_drafts, 1 + work.sequence.id % 4)) if work.num_drafts else work
            for work in step.work
        )
        found = propose(replace(step, work=works))
        seen.append([list(work.sequence.draft_token_ids) for work in works])
        for work in step.work:  # what is verified does not matter here
            missing = work.num_drafts - len(work.sequence.draft_token_ids)
            work.sequence.draft_token_ids += [0] * missing
        return found

    monkeypatch.setattr(draft_model, "propose", watch)
    for prompt, each in zip(random_prompts(len(params)), params, strict=True):
        engine.add(prompt, each)
    while engine.has_work:
        engine.step()
    return seen


@pytest.mark.parametrize("layers", [1, 2])
def test_guesses_are_those_of_single_steps(layers, tmp_path, monkeypatch):
    save_tiny(tmp_path / "target", "qwen3")
    save_tiny(tmp_path / "draft", "qwen3", num_hidden_layers=layers, seed=0 if layers == 2 else 3)
    params = [
        SamplingParams(max_tokens=24, ignore_eos=True, seed=index, **_KINDS[index % len(_KINDS)]) for index in range(7)
    ]
    found, pages = [], []
    for kind in ("loop", "recorded", "single steps"):
        llm = make(tmp_path / "target", speculative_model=tmp_path / "draft")
        with monkeypatch.context() as patch:
            found.append(guesses_of_each_step(llm, params, patch, kind))
        runner = llm.engine.speculator.draft_model._runner
        pages.append(torch.stack([layer.values for layer in runner.kv_cache])[:, 1:])  # not those of padding
    assert found[0] == found[1] == found[2]
    assert sum(len(guesses) for step in found[0] for guesses in step) > 100
    for others in pages[1:]:
        torch.testing.assert_close(pages[0], others, atol=1e-5, rtol=1e-4)


def test_a_state_advances_until_a_sequence_has_its_guesses():
    block_size = 4
    tables = torch.tensor([[3, 7, 9], [5, 2, 8]], dtype=torch.int32)
    batch = Batch(
        token_ids=torch.tensor([1, 2, 3, 4], dtype=torch.int32),
        positions=torch.tensor([5, 6, 1, 2], dtype=torch.int32),
        slot_mapping=torch.tensor([29, 30, 21, 22], dtype=torch.int32),
        block_tables=tables,
        query_start=torch.tensor([0, 2, 4], dtype=torch.int32),
        context_lens=torch.tensor([7, 3], dtype=torch.int32),
        logits_indices=torch.tensor([1, 3], dtype=torch.int32),
        query_len=2,
    )
    sampling = Sampling(torch.zeros(2), torch.tensor([1, 2]), torch.tensor([7, 3], dtype=torch.int32))
    state, last = DraftState(batch, sampling), torch.tensor([8, 3], dtype=torch.int32)
    seen = []
    for count in range(4):
        state = advance(state, torch.tensor([10 + count, 20 + count]), last, block_size)
        assert state.batch.token_ids.tolist() == [10 + count, 20 + count]
        assert state.batch.context_lens.tolist() == [position + 1 for position in state.batch.positions.tolist()]
        assert state.sampling.position.tolist() == [8 + count, 4 + count]
        seen.append((state.batch.positions.tolist(), state.batch.slot_mapping.tolist()))
    first = [(7, 7 * 4 + 3), (8, 9 * 4), (8, 0), (8, 0)]  # then into the padding block, and no further
    second = [(3, 5 * 4 + 3), (3, 0), (3, 0), (3, 0)]
    assert seen == [([a, c], [b, d]) for (a, b), (c, d) in zip(first, second, strict=True)]


def test_a_head_of_some_tokens_draws_with_their_noise():
    torch.manual_seed(0)
    logits = torch.randn(64, 500)
    sampling = Sampling(torch.full((64,), 1.3), torch.arange(64), torch.arange(100, 164))
    kept = torch.randperm(500)[:60]
    hidden = torch.full_like(logits, -torch.inf)
    hidden[:, kept] = logits[:, kept]
    assert torch.equal(kept[draw(logits[:, kept], sampling, kept)], draw(hidden, sampling))


@pytest.mark.parametrize("is_shared", [False, True])
def test_draft_tokens_of_one_call_are_those_of_the_loop(tmp_path, monkeypatch, is_shared):
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
        loop = llm.engine.speculator.draft_model._loop
        if loop._decoder is None:
            pytest.skip("this CPU has neither AVX512-BF16 nor AVX2")
        weights = loop._guesser.runner.weights
        for matrix in (weights.lm_head, weights.blocks.attention.qkv, weights.blocks.mlp.down):
            assert matrix.blocked.dtype is torch.int8
        assert llm.engine.runner.weights.blocks.mlp.down.blocked.dtype is torch.bfloat16
        if not decodes:
            loop._decoder = None
        with monkeypatch.context() as patch:
            found.append(guesses_of_each_step(llm, params, patch, "loop"))
    assert found[0] == found[1]
    assert sum(len(guesses) for step in found[0] for guesses in step) > 100
