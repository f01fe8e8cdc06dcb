"""Grammars in the engine's steps: outputs follow them, forced tokens are not sampled, other sequences pay nothing."""

import re

import pytest

from dispec import LLM, SamplingParams
from dispec.engine.execution.sampler import Sampler
from tests.checkpoints import EOS_TOKEN_ID, save_tiny
from tests.grammar_cases import CHOICES, FORM, PERSON, check_text, grammar_params, text_of
from tests.small_engine import alone, greedy, make, prompt_logprobs, random_prompts, random_tokens, sampled_logprobs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("llama")
    save_tiny(found, "llama")
    return found


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return make(directory)


@pytest.mark.smoke
def test_outputs_follow_their_grammars_in_any_batch(llm):
    """With every kind of sampling, beside each other and beside free text; each is what it is alone."""
    prompts = random_prompts(18)
    params = [*grammar_params(16), *(greedy(20) for _ in range(2))]
    together = llm.generate(prompts, params)
    for index, completion in enumerate(together[:16]):
        if completion.outputs[0].finish_reason == "stop":
            check_text(index, completion.outputs[0].text)
    assert sum(completion.outputs[0].finish_reason == "stop" for completion in together[:16]) > 8
    llm.engine.scheduler.check()
    assert [completion.outputs[0].token_ids for completion in together] == alone(llm, prompts, params)


@pytest.mark.smoke
def test_forced_tokens_take_no_step(llm):
    params = SamplingParams(temperature=1, seed=3, max_tokens=200, structured_outputs={"regex": FORM})
    llm.engine.records.clear()
    completion = llm.generate([random_tokens(20)], params)[0]
    assert re.fullmatch(FORM, completion.outputs[0].text)
    records = list(llm.engine.records)
    # "Name: ", "\nAge: " and "\nQuestion: " are forced but for the letters that their last tokens may share.
    assert len(records) < len(completion.outputs[0].token_ids) - 8
    assert sum(record.num_prompt_tokens for record in records) == 20
    assert sum(record.num_decoded_tokens for record in records) == sum(record.num_tokens for record in records[1:])
    assert {record.kind for record in records[1:]} == {"decode"}


def test_forced_tokens_are_streamed_with_the_sampled_one(llm):
    params = SamplingParams(temperature=0, max_tokens=100, structured_outputs={"choice": CHOICES})
    engine = llm.engine
    sequence = engine.add(random_tokens(5), params)
    outputs = []
    while engine.has_work:
        new = engine.step()
        outputs.append(new)
        engine.scheduler.check()
    assert max(map(len, outputs)) > 3
    tokens = [output for step in outputs for output in step]
    assert [output.token_id for output in tokens] == sequence.output_token_ids
    assert [output.finish_reason for output in tokens] == [None] * (len(tokens) - 1) + ["stop"]
    assert [output.num_cached_tokens for output in tokens] == [0] + [None] * (len(tokens) - 1)
    assert tokens[-1].completes_grammar == (tokens[-1].token_id != EOS_TOKEN_ID)


def test_with_logprobs_every_token_is_sampled(llm):
    """Log-probabilities are those of the model itself, which the same tokens have in a prompt."""
    prompt = random_tokens(20)
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature, seed=1, max_tokens=200, logprobs=0, structured_outputs={"json": PERSON}
        )
        llm.engine.records.clear()
        output = llm.generate([prompt], params)[0].outputs[0]
        assert len(llm.engine.records) == len(output.token_ids)
        again = llm.generate([prompt + output.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
        for ours, other in zip(sampled_logprobs(output), prompt_logprobs(again)[len(prompt) - 1 :], strict=True):
            assert ours.rank == other.rank
            assert ours.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_batch_without_grammars_makes_no_masks(llm, monkeypatch):
    masked = []
    monkeypatch.setattr(Sampler, "_token_mask", lambda *_: masked.append(1))
    llm.generate(random_prompts(3), greedy(4))
    assert not masked


@pytest.mark.smoke
@pytest.mark.parametrize("logprobs", [None, 2])
def test_reasoning_comes_first_and_has_no_end_token(llm, logprobs):
    """The start marker is forced; free text of any tokens but end tokens follows; after the end marker, the grammar."""
    start, end = (5, 300), (301, 302)
    params = SamplingParams(
        temperature=1.5,
        seed=8,
        max_tokens=400,
        logprobs=logprobs,
        logit_bias={301: 14.0, 302: 14.0, EOS_TOKEN_ID: 20.0},
        structured_outputs={
            "choice": CHOICES,
            "reasoning_start_token_ids": start,
            "reasoning_end_token_ids": end,
        },
    )
    for prompt in random_prompts(4):
        completion = llm.generate([prompt], params)[0]
        tokens = completion.outputs[0].token_ids
        assert tuple(tokens[:2]) == start
        at = next(index for index in range(2, len(tokens)) if tuple(tokens[index : index + 2]) == end)
        assert at >= 2
        assert EOS_TOKEN_ID not in tokens[:at]
        assert text_of(llm, tokens[at + 2 :]) in CHOICES
        assert completion.outputs[0].finish_reason == "stop"


def test_a_choice_of_a_request_is_what_its_seed_gives_alone(llm):
    prompt = random_tokens(30)
    params = SamplingParams(temperature=1, seed=4, n=3, max_tokens=100, structured_outputs={"regex": FORM})
    choices = llm.generate([prompt], params)[0].outputs
    for index, choice in enumerate(choices):
        assert re.fullmatch(FORM, choice.text)
        single = SamplingParams(temperature=1, seed=4 + index, max_tokens=100, structured_outputs={"regex": FORM})
        assert alone(llm, [prompt], single) == [choice.token_ids]


def test_the_grammar_wins_where_other_parameters_leave_nothing(llm):
    prompt = random_tokens(9)
    for others in (
        {"allowed_token_ids": (400, 401)},
        {"min_tokens": 50},
        {"logit_bias": dict.fromkeys(range(40, 400), -100.0)},
        {"bad_words_token_ids": tuple((token,) for token in range(3, 400))},
        {"stop_token_ids": ()},
    ):
        params = SamplingParams(
            temperature=0.7, seed=0, max_tokens=200, structured_outputs={"choice": CHOICES}, **others
        )
        completion = llm.generate([prompt], params)[0]
        assert (completion.outputs[0].text in CHOICES, completion.outputs[0].finish_reason) == (True, "stop"), others


def test_an_end_token_that_is_ignored_is_not_sampled_while_the_text_can_go_on(llm):
    params = SamplingParams(
        temperature=1,
        seed=0,
        max_tokens=50,
        ignore_eos=True,
        logit_bias={EOS_TOKEN_ID: 100.0},
        structured_outputs={"regex": "[0-9]{5,30}"},
    )
    completion = llm.generate([random_tokens(9)], params)[0]
    assert re.fullmatch("[0-9]{30}", completion.outputs[0].text)
    assert completion.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("logprobs", [None, 0])
def test_an_output_that_reaches_its_last_token_is_closed_in_time(llm, logprobs):
    """At every limit the output follows its grammar, and has no more tokens than the limit."""
    prompts = random_prompts(10)
    reasons = set()
    for max_tokens in (29, 31, 36, 47):
        params = grammar_params(10, max_tokens=max_tokens, logprobs=logprobs, min_tokens=0)
        for index, (completion, param) in enumerate(zip(llm.generate(prompts, params), params, strict=True)):
            assert len(completion.outputs[0].token_ids) <= max_tokens
            check_text(index, text_of(llm, completion.outputs[0].token_ids))
            reasons.add(completion.outputs[0].finish_reason)
            if param.logprobs is not None:
                assert [[*entry] for entry in completion.outputs[0].logprobs] == [
                    [token] for token in completion.outputs[0].token_ids
                ]
        llm.engine.scheduler.check()
    assert reasons == {"stop", "length"}


def test_logprobs_of_a_closing_are_the_models_own(llm):
    prompt = random_tokens(20)
    structure = {"regex": '"[a-z]{1,90}"'}
    params = SamplingParams(temperature=1, seed=1, max_tokens=17, logprobs=0, structured_outputs=structure)
    output = llm.generate([prompt], params)[0].outputs[0]
    assert (output.finish_reason, output.text[-1]) == ("length", '"')
    again = llm.generate([prompt + output.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    found, expected = sampled_logprobs(output), prompt_logprobs(again)[len(prompt) - 1 :]
    assert [entry.rank for entry in found] == [entry.rank for entry in expected]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)


def test_reasoning_that_does_not_end_is_closed(llm):
    structure = {"choice": CHOICES[:1], "reasoning_start_token_ids": (5,), "reasoning_end_token_ids": (301, 302)}
    for max_tokens in (12, 30):
        params = SamplingParams(temperature=1, seed=0, max_tokens=max_tokens, structured_outputs=structure)
        completion = llm.generate([random_tokens(7)], params)[0]
        tokens = completion.outputs[0].token_ids
        at = tokens.index(301)
        assert tokens[at : at + 2] == [301, 302]
        assert text_of(llm, tokens[at + 2 :]) == CHOICES[0]
        assert max_tokens - 1 <= len(tokens) <= max_tokens
        assert completion.outputs[0].finish_reason == "length"


def test_an_output_that_may_end_ends_where_no_longer_one_fits(llm):
    """After three letters no three more fit into the one token that is left: an end token follows instead."""
    params = SamplingParams(
        temperature=0,
        max_tokens=4,
        logit_bias={EOS_TOKEN_ID: -100.0},
        structured_outputs={"regex": "([qxz][qxz][qxz])+"},
    )
    completion = llm.generate([random_tokens(7)], params)[0]
    assert re.fullmatch("[qxz]{3}", completion.outputs[0].text)
    assert completion.outputs[0].token_ids[3:] == [EOS_TOKEN_ID]
    assert completion.outputs[0].finish_reason == "stop"


def test_a_limit_below_every_known_output_is_refused(llm):
    structure = {"json": PERSON}
    with pytest.raises(ValueError, match=r"max_tokens or what the context leaves of it is 3, must be at least \d+"):
        llm.generate([random_tokens(7)], SamplingParams(max_tokens=3, structured_outputs=structure))
    longest = llm.engine.max_model_len - 3
    with pytest.raises(ValueError, match="is 3, must be at least"):
        llm.generate([random_tokens(longest)], SamplingParams(max_tokens=300, structured_outputs=structure))


@pytest.mark.parametrize("logprobs", [None, 1])
def test_reasoning_of_limited_length(llm, logprobs):
    structure = {"choice": CHOICES, "reasoning_start_token_ids": (5,), "reasoning_end_token_ids": (301, 302)}
    params = SamplingParams(
        temperature=1,
        seed=0,
        max_tokens=100,
        logprobs=logprobs,
        structured_outputs=structure | {"reasoning_max_tokens": 7},
    )
    completion = llm.generate([random_tokens(7)], params)[0]
    assert completion.outputs[0].token_ids[8:10] == [301, 302]
    assert text_of(llm, completion.outputs[0].token_ids[10:]) in CHOICES
    assert completion.outputs[0].finish_reason == "stop"


def test_a_negative_limit_of_reasoning_is_refused():
    with pytest.raises(ValueError, match="reasoning_max_tokens is -1, must be an integer of at least 0"):
        SamplingParams(structured_outputs={"choice": CHOICES, "reasoning_max_tokens": -1})


def test_reasoning_of_limited_length_before_a_free_answer(llm):
    structure = {"reasoning_end_token_ids": (301, 302), "reasoning_max_tokens": 7}
    params = SamplingParams(temperature=1, seed=0, max_tokens=30, structured_outputs=structure, stop_token_ids=(7,))
    free = SamplingParams(temperature=1, seed=0, max_tokens=30, stop_token_ids=(7,))
    prompt = random_tokens(7)
    tokens = llm.generate([prompt], params)[0].outputs[0].token_ids
    assert tokens[7:9] == [301, 302]
    assert tokens[:7] == llm.generate([prompt], free)[0].outputs[0].token_ids[:7]
    assert len(tokens) == 30 or tokens[-1] in (7, EOS_TOKEN_ID)
