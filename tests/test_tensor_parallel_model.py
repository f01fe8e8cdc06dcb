"""The built-in model on several ranks: nine heads in three groups, evenly over three or unevenly over two."""

import statistics

import pytest

from dispec import LLM, SamplingParams
from dispec.engine.api.outputs import TokenLogprobs
from tests.test_default_model import QUESTIONS, TEXTS

OPTIONS = {"device": "cpu", "enforce_eager": True, "kv_cache_memory": "64MiB"}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.slow
def test_three_ranks_answer_in_float32_as_one():
    found = []
    for size in (1, 3):
        llm = LLM("smollm2", **OPTIONS, dtype="float32", tensor_parallel_size=size)
        try:
            found.append(
                [one.outputs[0].token_ids for one in llm.generate([*QUESTIONS, *TEXTS[:5]], GREEDY, use_tqdm=False)]
            )
        finally:
            llm.engine.close()
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_draft_that_shares_the_target_s_embedding_is_run_by_the_first_rank() -> None:
    found = []
    for options in ({}, {"tensor_parallel_size": 2, "speculative_model": "smollm2-draft"}):
        llm = LLM("smollm2", **OPTIONS, dtype="float32", **options)
        try:
            if llm.engine.speculator is not None:
                llm.engine.speculator.is_adaptive = False
            found.append([one.outputs[0].token_ids for one in llm.generate(QUESTIONS, GREEDY, use_tqdm=False)])
            num_accepted = sum(sum(record.num_accepted_per_position) for record in llm.engine.records)
        finally:
            llm.engine.close()
    assert found[0] == found[1]
    assert num_accepted > 20


def scored(dtype: str, size: int) -> list[TokenLogprobs]:
    """What the model says of every token of some given texts, so that no choice of it changes what it sees next."""
    llm = LLM("smollm2", **OPTIONS, dtype=dtype, tensor_parallel_size=size)
    try:
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        completions = llm.generate([" ".join(QUESTIONS), *TEXTS], params, use_tqdm=False)
        return [entry for one in completions for entry in one.prompt_logprobs or [] if entry is not None]
    finally:
        llm.engine.close()


@pytest.mark.slow
def test_two_ranks_in_bfloat16_are_no_further_from_float32_than_one():
    exact, alone, together = scored("float32", 1), scored("bfloat16", 1), scored("bfloat16", 2)
    assert len(exact) == len(alone) == len(together) > 150

    def error(found: list[TokenLogprobs]) -> float:
        own = [(next(iter(a.values())), next(iter(b.values()))) for a, b in zip(found, exact, strict=True)]
        return statistics.fmean(abs(a.logprob - b.logprob) for a, b in own)

    def likeliest(entry: TokenLogprobs) -> int:
        return next(token for token, one in entry.items() if one.rank == 1)

    def agreement(found: list[TokenLogprobs]) -> float:
        return statistics.fmean(likeliest(a) == likeliest(b) for a, b in zip(found, exact, strict=True))

    # bf16 keeps eight bits, so that logits of about 20 are right to about 0.1.
    assert 0 < error(together) < 1.3 * error(alone) < 0.15
    assert agreement(together) > 0.93
    assert agreement(together) > agreement(alone) - 0.03
