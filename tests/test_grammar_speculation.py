"""Grammars with draft tokens: outputs are those without speculation, and draft tokens follow the grammar."""

from dataclasses import replace

import numpy as np
import pytest

from dispec import LLM, SamplingParams
from tests.checkpoints import save_tiny
from tests.grammar_cases import FORM, check_text, grammar_params, text_of
from tests.small_engine import make, prompt_logprobs, random_prompts, random_tokens, sampled_logprobs, speculating


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("qwen3")
    save_tiny(found, "qwen3")
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of other weights, whose draft tokens are nearly always rejected where the grammar leaves a choice."""
    found = tmp_path_factory.mktemp("other")
    save_tiny(found, "qwen3", num_hidden_layers=1, seed=7)
    return found


@pytest.fixture(scope="module")
def plain(directory) -> LLM:
    return make(directory)


@pytest.fixture(scope="module")
def cases() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts with some text of the grammar, so that n-grams find it; short limits, so that outputs are closed."""
    prompts = [prompt[:20] + random_tokens(6, 1) * 3 for prompt in random_prompts(12)]
    return prompts, grammar_params(12, max_tokens=42, min_tokens=0)


@pytest.mark.parametrize(
    ("proposer", "overlaps"), [("ngram", False), ("ngram", True), ("itself", False), ("other", True)]
)
def test_outputs_are_those_without_speculation(directory, other, plain, cases, proposer, overlaps):
    prompts, params = cases
    expected = plain.generate(prompts, params)
    name = {"ngram": "ngram", "itself": directory, "other": other}[proposer]
    llm = speculating(directory, name, async_scheduling=overlaps)
    found = llm.generate(prompts, params)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        check_text(index, text_of(llm, ours.outputs[0].token_ids))
        output, wanted = ours.outputs[0], theirs.outputs[0]
        assert (output.token_ids, output.finish_reason) == (wanted.token_ids, wanted.finish_reason)
        if wanted.logprobs is not None:
            assert [one.logprob for one in sampled_logprobs(output)] == pytest.approx(
                [one.logprob for one in sampled_logprobs(wanted)], abs=1e-4
            )
    llm.engine.scheduler.check()
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    records = list(llm.engine.records)
    accepted = sum(sum(record.num_accepted_per_position) for record in records)
    assert 0 < accepted <= sum(record.num_draft_tokens for record in records)


def test_a_model_agrees_with_itself_under_a_grammar(directory):
    """Its draft tokens are masked as the target's are: all are accepted, up to the end of the output."""
    llm = speculating(directory, directory)
    params = SamplingParams(temperature=1, seed=0, max_tokens=200, structured_outputs={"regex": "[a-z ]{60}"})
    completion = llm.generate([random_tokens(9)], params)[0]
    assert len(text_of(llm, completion.outputs[0].token_ids)) == 60
    records = [record for record in llm.engine.records if record.num_drafts]
    rejected = sum(record.num_draft_tokens - sum(record.num_accepted_per_position) for record in records)
    assert rejected <= llm.engine.speculator.max_num_draft_tokens


def test_ngrams_are_cut_at_the_first_token_that_the_grammar_rejects(directory):
    """The prompt repeats digits and letters; only the digits may be proposed."""
    llm = speculating(directory, "ngram")
    digits, letters = llm.tokenizer.encode("7 8 9 7 8 9 "), llm.tokenizer.encode("xyz")
    engine = llm.engine
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, structured_outputs={"regex": "7 8 9 ([0-9 ]){40,}"}
    )
    sequence = engine.add([*digits, *letters, *digits, *letters], params)
    proposed = []
    while engine.has_work:
        engine.speculator.plan(engine.scheduler.running)
        proposed += sequence.draft.token_ids
        engine.step()
    assert set(text_of(llm, proposed)) <= set("0123456789 ")
    assert not {*letters} & {*proposed}


def test_reasoning_and_speculation(directory, plain):
    structure = {"regex": FORM, "reasoning_start_token_ids": (5,), "reasoning_end_token_ids": (301, 302)}
    params = [
        SamplingParams(
            temperature=1, seed=seed, max_tokens=80, logit_bias={301: 14.0, 302: 14.0}, structured_outputs=structure
        )
        for seed in range(4)
    ]
    prompts = random_prompts(4)
    expected = [completion.outputs[0].token_ids for completion in plain.generate(prompts, params)]
    for name in ("ngram", directory):
        llm = speculating(directory, name)
        assert [completion.outputs[0].token_ids for completion in llm.generate(prompts, params)] == expected


@pytest.mark.parametrize("name", [None, "other"])
def test_sampled_tokens_have_the_models_distribution_among_the_allowed_ones(directory, other, plain, name):
    """A letter after a forced token, 512 times, by chi-square at 0.1 %."""
    llm = plain if name is None else speculating(directory, other)
    prompt, temperature = random_tokens(30), 4.0
    params = SamplingParams(temperature=temperature, max_tokens=9, n=128, structured_outputs={"regex": "~[A-X]~"})
    counts = np.zeros(24)
    for batch in range(4):
        for choice in llm.generate([prompt], replace(params, seed=1000 * batch))[0].outputs:
            counts[ord(choice.text[1]) - ord("A")] += 1
    if name is not None:
        assert any(record.num_draft_tokens for record in llm.engine.records)
    # The model's own probabilities, as log-probabilities of the tokens of prompts.
    tilde, *letters = (plain.tokenizer.encode(letter)[0] for letter in "~ABCDEFGHIJKLMNOPQRSTUVWX")
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found = plain.generate([[*prompt, tilde, letter] for letter in letters], scored)
    expected = np.exp(np.array([prompt_logprobs(completion)[-1].logprob for completion in found]) / temperature)
    expected *= counts.sum() / expected.sum()
    order = np.argsort(expected)
    rare = order[: np.searchsorted(expected[order].cumsum(), 5) + 1]  # together at least five
    common = np.setdiff1d(order, rare)
    wanted = np.append(expected[common], expected[rare].sum())
    seen = np.append(counts[common], counts[rare].sum())
    degrees = len(wanted) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson and Hilferty, 1931
    assert ((seen - wanted) ** 2 / wanted).sum() < limit
