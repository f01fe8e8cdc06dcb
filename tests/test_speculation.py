"""With speculation every answer is the one without it, token by token; only steps are fewer."""

import json
import random
from dataclasses import replace

import pytest

from dispec import LLM, RequestOutput, SamplingParams
from dispec.engine.scheduling.logits_processors import LogitsProcessors
from dispec.engine.speculation.ngram import NgramIndex
from tests.checkpoints import save_tiny
from tests.small_engine import greedy, make, mixed_params, random_prompts, random_tokens, sampled_logprobs, speculating


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("qwen3")
    save_tiny(found, "qwen3")
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of other weights, whose draft tokens are nearly always rejected."""
    found = tmp_path_factory.mktemp("other")
    save_tiny(found, "qwen3", num_hidden_layers=1, seed=7)
    return found


@pytest.fixture(scope="module")
def plain(directory) -> LLM:
    return make(directory)


def num_accepted(llm: LLM) -> int:
    return sum(sum(record.num_accepted_per_position) for record in llm.engine.records)


def assert_same(ours: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert [choice.token_ids for choice in one.outputs] == [choice.token_ids for choice in other.outputs]
        for choice, reference in zip(one.outputs, other.outputs, strict=True):
            assert choice.finish_reason == reference.finish_reason
            if reference.logprobs is not None:
                assert [entry.logprob for entry in sampled_logprobs(choice)] == pytest.approx(
                    [entry.logprob for entry in sampled_logprobs(reference)], abs=1e-4
                )


@pytest.mark.smoke
@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("proposer", ["ngram", "itself", "other"])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_answers_are_those_without_speculation(directory, other, plain, proposer, count, is_adaptive):
    prompts = random_prompts(count)
    params = mixed_params(count, max_tokens=30)
    expected = plain.generate(prompts, params)
    name = {"ngram": "ngram", "itself": directory, "other": other}[proposer]
    llm = speculating(directory, name, is_adaptive=is_adaptive)
    answers = llm.generate(prompts, params)
    assert_same(answers, expected)
    assert sum(answer.metrics.num_accepted_tokens for answer in answers) == num_accepted(llm)
    num_drafted = sum(record.num_draft_tokens for record in llm.engine.records)
    assert sum(answer.metrics.num_draft_tokens for answer in answers) == num_drafted
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    if proposer == "itself" and not is_adaptive:
        # A model agrees with itself, at any temperature and with any penalty: six tokens a step but for the ends.
        records = [record for record in llm.engine.records if record.num_drafts]
        assert num_accepted(llm) == sum(record.num_draft_tokens for record in records)
        assert len(llm.engine.records) < 30


def test_while_the_controller_rests_no_sequence_is_prepared(directory, monkeypatch):
    llm = speculating(directory, directory, is_adaptive=True)
    speculator, num_sequences = llm.engine.speculator, []
    monkeypatch.setattr(speculator.controller, "is_resting", lambda _: True)
    monkeypatch.setattr(
        speculator.controller, "choose", lambda candidates, number: num_sequences.append(number) or len(candidates)
    )
    monkeypatch.setattr(speculator.proposer, "prepare", lambda *_: pytest.fail("a sequence was prepared"))
    llm.generate(random_prompts(3), greedy())
    assert not any(record.num_planned_draft_tokens for record in llm.engine.records)
    assert max(num_sequences) == 3


@pytest.mark.parametrize("wrong", [lambda drafts, chosen: len(drafts), lambda drafts, chosen: min(1, len(drafts))])
def test_accepting_wrong_draft_tokens_would_be_noticed(directory, other, plain, wrong, monkeypatch):
    prompts, params = random_prompts(8), mixed_params(8, max_tokens=30)
    expected = [[choice.token_ids for choice in one.outputs] for one in plain.generate(prompts, params)]
    llm = speculating(directory, other)
    monkeypatch.setattr("dispec.engine.execution.sampler_output.num_accepted", wrong)
    found = [[choice.token_ids for choice in one.outputs] for one in llm.generate(prompts, params)]
    assert found != expected


@pytest.mark.parametrize("proposer", ["ngram", "itself"])
def test_under_preemption_and_prefix_hits(directory, plain, proposer):
    prompts = [random_tokens(40), *random_prompts(6), random_tokens(40)]
    params = mixed_params(8, max_tokens=40)
    expected = plain.generate(prompts, params)
    name = "ngram" if proposer == "ngram" else directory
    memory = "512KiB" if proposer == "ngram" else "1MiB"  # a draft model has its part of each block
    llm = speculating(directory, name, kv_cache_memory=memory, max_model_len=160)
    assert_same(llm.generate(prompts, params), expected)
    assert sum(record.num_preempted for record in llm.engine.records) > 0
    assert_same(llm.generate(prompts, params), expected)
    assert sum(record.num_cached_tokens for record in llm.engine.records) > 0
    llm.engine.scheduler.check()


def test_stops_limits_and_choices(directory, plain):
    prompt = random_tokens(20)
    free = plain.generate([prompt], greedy(30))[0].outputs[0].token_ids
    cases = [
        SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(free[7],), min_tokens=3),
        SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(free[2],), min_tokens=12),
        *(greedy(length) for length in range(1, 9)),
        SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=1),
    ]
    llm = speculating(directory, directory)
    assert_same(llm.generate([prompt] * len(cases), cases), plain.generate([prompt] * len(cases), cases))
    assert num_accepted(llm) > 0
    assert_same(
        [llm.generate([prompt], case)[0] for case in cases], [plain.generate([prompt], case)[0] for case in cases]
    )


def test_vocabularies_may_be_padded_differently(directory, plain, tmp_path):
    """Of two models with the same tokens, either may pad its vocabulary."""
    prompts, params = random_prompts(4), mixed_params(4)
    expected = plain.generate(prompts, params)
    vocab_size = plain.engine.config.vocab_size
    for rows in (vocab_size + 37, vocab_size - 5):
        draft = replace(plain.engine.config, vocab_size=rows, num_layers=1)
        llm = LLM(
            plain.engine.config,
            speculative_model=draft,
            load_format="dummy",
            dtype="float32",
            device="cpu",
            enforce_eager=True,
            kv_cache_memory="16MiB",
        )
        llm.engine.speculator.is_adaptive = False
        llm.engine.runner.weights = plain.engine.runner.weights
        assert_same(llm.generate(prompts, params), expected)


def test_another_tokenizer_is_refused(directory, tmp_path):
    save_tiny(tmp_path, "qwen3")
    file = tmp_path / "tokenizer.json"
    contents = json.loads(file.read_text())
    for token, word in zip(contents["added_tokens"], ("<|one|>", "<|two|>"), strict=False):
        token["content"] = word
    contents["model"]["vocab"] = {
        {"<|endoftext|>": "<|one|>", "<|im_start|>": "<|two|>"}.get(token, token): number
        for token, number in contents["model"]["vocab"].items()
    }
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"speculative_model .* has another tokenizer"):
        make(directory, speculative_model=tmp_path)


@pytest.mark.smoke
def test_penalties_of_draft_tokens_are_not_kept():
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, logit_bias={3: 1.0})
    prompt, rng = [1, 2, 3], random.Random(0)
    for _ in range(50):
        output = [rng.randrange(8) for _ in range(rng.randrange(6))]
        drafts = [rng.randrange(8) for _ in range(rng.randrange(5))]
        edits = LogitsProcessors(params, prompt, 10, frozenset())
        edits.advance(prompt + output[: len(output) // 2])
        ahead = list(edits.entries_ahead(prompt + output, drafts))
        for count, found in enumerate(ahead):
            fresh = LogitsProcessors(params, prompt, 10, frozenset())
            fresh.advance(prompt + output + drafts[:count])
            assert entries(found) == entries(fresh.entries())
        again = prompt + output + [rng.randrange(8)]
        edits.advance(again)
        fresh = LogitsProcessors(params, prompt, 10, frozenset())
        fresh.advance(again)
        assert entries(edits.entries()) == entries(fresh.entries())


def entries(arrays) -> dict[int, tuple[float, float]]:
    """Return scale and addend by token, without those that change nothing."""
    found = {token: (scale, addend) for token, scale, addend in zip(*(a.tolist() for a in arrays), strict=True)}
    return {token: pair for token, pair in found.items() if pair != (1.0, 0.0)}


@pytest.mark.smoke
def test_ngrams_follow_the_latest_of_the_longest_matches():
    rng = random.Random(1)
    index, tokens = NgramIndex(), []
    for _ in range(400):
        tokens.append(rng.randrange(3))
        expected = []
        for size in (4, 3, 2):
            starts = [at for at in range(len(tokens) - size) if tokens[at : at + size] == tokens[-size:]]
            if starts:
                after = starts[-1] + size
                copied = list(tokens)
                for position in range(3):
                    copied.append(copied[after + position])
                expected = copied[-3:]
                break
        assert index.propose(tokens, 3) == expected
