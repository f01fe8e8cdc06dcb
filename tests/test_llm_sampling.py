"""What can be asked of a continuation, through `LLM`, against transformers and against what the words mean."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from dispec import LLM, SamplingParams
from tests.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, save_tiny
from tests.small_engine import (
    BLOCK_SIZE,
    greedy,
    make,
    mixed_params,
    prompt_logprobs,
    random_prompts,
    random_tokens,
    sampled_logprobs,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3")
    return directory, save_tiny(directory, "qwen3").eval()


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    return make(checkpoint[0])


def reference_logprobs(checkpoint, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint[1](torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_model_itself(llm, checkpoint, temperature):
    """Neither temperature nor penalties change them."""
    prompt = random_tokens(30)
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=20, ignore_eos=True, logprobs=20, repetition_penalty=1.5, top_k=50
    )
    # Beside one that asks for none and one that asks for fewer.
    completion, fewer, none = llm.generate([prompt, [1, 2], [3]], [params, greedy(5, logprobs=1), greedy(9)])
    expected = reference_logprobs(checkpoint, prompt + completion.outputs[0].token_ids)
    assert none.outputs[0].logprobs is None
    assert [[*entry] for entry in fewer.outputs[0].logprobs] == [[token] for token in fewer.outputs[0].token_ids]
    assert len(completion.outputs[0].logprobs) == 20
    output = completion.outputs[0]
    for position, (token_id, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = expected[len(prompt) + position - 1]
        assert next(iter(entry)) == token_id
        assert entry[token_id].logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert entry[token_id].rank == 1 + int((row > row[token_id]).sum())
        values, ids = row.topk(20)
        top = {token: one for token, one in entry.items() if one.rank <= 20}
        assert sorted(top, key=lambda token: top[token].rank) == ids.tolist()
        assert sorted((one.logprob for one in top.values()), reverse=True) == pytest.approx(values.tolist(), abs=1e-4)
        assert all(one.decoded_token == llm.tokenizer.decode([token], False) for token, one in entry.items())
    assert output.cumulative_logprob == pytest.approx(sum(one.logprob for one in sampled_logprobs(output)))


@pytest.mark.parametrize("budget", [None, 8])
def test_prompt_logprobs(checkpoint, budget):
    """Whole, and in chunks of the prompt that end anywhere, one-token chunks among them; beside other requests."""
    options = {} if budget is None else {"max_num_batched_tokens": budget, "max_num_seqs": 7}
    llm = make(checkpoint[0], **options)
    prompts = [random_tokens(length, length) for length in (1, 2, BLOCK_SIZE, 150, 33)]
    asked = [greedy(3, prompt_logprobs=4) for _ in prompts]
    completions = llm.generate([*prompts, *prompts], asked + [greedy(3)] * 5)
    for prompt, completion in zip(prompts, completions[:5], strict=True):
        expected = reference_logprobs(checkpoint, prompt)
        assert len(completion.prompt_logprobs) == len(prompt)
        assert completion.prompt_logprobs[0] is None
        for position, found in enumerate(completion.prompt_logprobs[1:], 1):
            row = expected[position - 1]
            assert found[prompt[position]].logprob == pytest.approx(row[prompt[position]].item(), abs=1e-4)
            top = {token: one for token, one in found.items() if one.rank <= 4}
            assert sorted(top, key=lambda token: top[token].rank) == row.topk(4).indices.tolist()
    assert all(completion.prompt_logprobs is None for completion in completions[5:])


def test_a_long_prompt_makes_no_tensor_of_all_its_logits(checkpoint):
    llm = make(checkpoint[0])
    prompt = random_tokens(500)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB_SIZE,):
                    largest = max(largest, tensor.numel() // VOCAB_SIZE)
            return out

    with Largest():
        completion = llm.generate([prompt], greedy(1, prompt_logprobs=0))[0]
    assert len(completion.prompt_logprobs) == 500
    assert 1 < largest <= 128


def test_prompt_logprobs_read_no_cached_prefix_but_leave_theirs(checkpoint):
    llm = make(checkpoint[0])
    prompt = random_tokens(80)
    first = llm.generate([prompt], greedy(2, prompt_logprobs=1))[0]
    again = llm.generate([prompt], greedy(2, prompt_logprobs=1))[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 0)
    assert first.prompt_logprobs == again.prompt_logprobs
    assert llm.generate([prompt], greedy(2))[0].num_cached_tokens == 79


def test_prompt_logprobs_of_preempted_requests(checkpoint):
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    small = make(checkpoint[0], kv_cache_memory=16 * block_bytes, max_num_seqs=8, max_num_batched_tokens=16)
    prompts = [random_tokens(60, seed) for seed in range(6)]
    completions = small.generate(prompts, greedy(60, prompt_logprobs=0, logprobs=0))
    assert sum(record.num_preempted for record in small.engine.records) > 2
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = reference_logprobs(checkpoint, prompt + completion.outputs[0].token_ids)
        tokens = prompt + completion.outputs[0].token_ids
        found = [one.logprob for one in prompt_logprobs(completion) + sampled_logprobs(completion.outputs[0])]
        assert found == pytest.approx([expected[i, tokens[i + 1]].item() for i in range(len(found))], abs=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(llm, checkpoint, penalty):
    for prompt in random_prompts(4):
        with torch.no_grad():
            expected = checkpoint[1].generate(
                torch.tensor([prompt]),
                max_new_tokens=30,
                min_new_tokens=30,
                do_sample=False,
                eos_token_id=None,
                repetition_penalty=penalty,
            )[0, len(prompt) :]
        assert (
            llm.generate([prompt], greedy(30, repetition_penalty=penalty))[0].outputs[0].token_ids == expected.tolist()
        )


def test_presence_and_frequency_penalties_follow_the_published_formula(llm, checkpoint):
    """logit - presence * (count > 0) - frequency * count, over tokens of the output (OpenAI's API reference)."""
    for prompt, presence, frequency in zip(random_prompts(3), (2.0, 0.0, -1.0), (0.0, 1.5, 0.4), strict=True):
        tokens = list(prompt)
        for _ in range(30):
            with torch.no_grad():
                logits = checkpoint[1](torch.tensor([tokens])).logits[0, -1]
            for token, count in Counter(tokens[len(prompt) :]).items():
                logits[token] -= presence + frequency * count
            tokens.append(int(logits.argmax()))
        params = greedy(30, presence_penalty=presence, frequency_penalty=frequency)
        assert llm.generate([prompt], params)[0].outputs[0].token_ids == tokens[len(prompt) :]


@pytest.mark.smoke
def test_logit_bias_allowed_tokens_and_bad_words(llm):
    prompt = random_tokens(10)
    hot = {"temperature": 3.0, "max_tokens": 60, "ignore_eos": True, "seed": 5}
    assert llm.generate([prompt], greedy(5, logit_bias={7: 100.0}))[0].outputs[0].token_ids == [7] * 5
    assert 7 not in llm.generate([prompt], SamplingParams(logit_bias={7: -100.0}, **hot))[0].outputs[0].token_ids
    allowed = (3, 5, 8, 400)
    assert set(llm.generate([prompt], SamplingParams(allowed_token_ids=allowed, **hot))[0].outputs[0].token_ids) == set(
        allowed
    )
    without = SamplingParams(allowed_token_ids=allowed, bad_words_token_ids=((3,), (5, 8), (8, 8, 5)), **hot)
    tokens = llm.generate([prompt], without)[0].outputs[0].token_ids
    assert 3 not in tokens
    assert (5, 8) not in set(pairwise(tokens))
    assert (8, 8, 5) not in set(zip(tokens, tokens[1:], tokens[2:], strict=False))
    assert set(tokens) == {5, 8, 400}


@pytest.mark.smoke
def test_bad_words_as_texts(llm):
    params = greedy(40)
    text = llm.generate(["the"], params)[0].outputs[0].text
    word = next(word for word in text.split() if word.isascii())
    clean = llm.generate(["the"], greedy(40, bad_words=(word,)))[0].outputs[0].text
    ids = llm.tokenizer.bad_word_token_ids([word])
    assert word in text
    tokens = llm.generate(["the"], greedy(40, bad_words=(word,)))[0].outputs[0].token_ids
    for forbidden in ids:
        assert all(tuple(tokens[i : i + len(forbidden)]) != forbidden for i in range(len(tokens)))
    assert clean != text


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(llm):
    prompts = random_prompts(5)
    expected = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy())]
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True, **setting)
        assert [c.outputs[0].token_ids for c in llm.generate(prompts, params)] == expected


def test_draws_through_the_engine_follow_the_processed_distribution(llm, checkpoint):
    """Chi-square over 3,000 seeds of one token; the 0.1 % quantile at the degrees of freedom there are."""
    prompt = random_tokens(12)
    logits = reference_logprobs(checkpoint, prompt)[-1] / 0.7
    kept = logits.topk(8)
    params = [
        SamplingParams(temperature=0.7, top_k=8, max_tokens=1, seed=seed, ignore_eos=True) for seed in range(3000)
    ]
    counts = Counter(c.outputs[0].token_ids[0] for c in llm.generate([prompt] * 3000, params, use_tqdm=False))
    expected = (kept.values.softmax(-1) * 3000).tolist()
    assert set(counts) <= set(kept.indices.tolist())
    statistic = sum(
        (counts[token] - number) ** 2 / number for token, number in zip(kept.indices.tolist(), expected, strict=True)
    )
    assert statistic < 24.3  # 7 degrees


@pytest.mark.smoke
def test_min_tokens_withholds_the_end(llm):
    prompt = random_tokens(10)
    eager_to_end = {"logit_bias": {EOS_TOKEN_ID: 100.0}, "temperature": 0}
    assert llm.generate([prompt], SamplingParams(max_tokens=9, **eager_to_end))[0].outputs[0].token_ids == [
        EOS_TOKEN_ID
    ]
    completion = llm.generate([prompt], SamplingParams(max_tokens=9, min_tokens=4, **eager_to_end))[0]
    assert len(completion.outputs[0].token_ids) == 5
    assert completion.outputs[0].token_ids[-1] == EOS_TOKEN_ID
    assert EOS_TOKEN_ID not in completion.outputs[0].token_ids[:-1]
    assert (completion.outputs[0].finish_reason, completion.outputs[0].stop_reason) == ("stop", None)


@pytest.mark.smoke
def test_stop_strings_end_the_text_and_the_work(llm):
    prompt = "the quick"
    whole = llm.generate([prompt], greedy(60))[0]
    middle = len(whole.outputs[0].text) // 2
    stop = whole.outputs[0].text[middle : middle + 4]
    first = whole.outputs[0].text.index(stop)
    stopped = llm.generate([prompt], greedy(60, stop=("not there", stop)))[0]
    assert stopped.outputs[0].text == whole.outputs[0].text[:first]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert stopped.outputs[0].token_ids == whole.outputs[0].token_ids[: len(stopped.outputs[0].token_ids)]
    assert len(stopped.outputs[0].token_ids) < 60
    with_it = llm.generate([prompt], greedy(60, stop=(stop,), include_stop_str_in_output=True))[0]
    assert with_it.outputs[0].text == whole.outputs[0].text[: first + len(stop)]
    pieces = list(llm.stream(prompt, greedy(60, stop=(stop,))))
    assert "".join(piece.outputs[0].text for piece in pieces) == stopped.outputs[0].text
    assert pieces[-1].outputs[0].finish_reason == "stop"
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


def test_the_same_tokens_in_any_batch(llm):
    """The guarantee of the README, over every feature at once."""
    prompts, params = random_prompts(16), mixed_params(16)
    together = [c.outputs[0].token_ids for c in llm.generate(prompts, params)]
    for start in (0, 5, 11):
        part = llm.generate(prompts[start : start + 5], params[start : start + 5])
        assert [c.outputs[0].token_ids for c in part] == together[start : start + 5]


def test_special_tokens_in_the_text(llm):
    biased = {"temperature": 0, "max_tokens": 3, "logit_bias": {EOS_TOKEN_ID: 100.0}, "ignore_eos": True}
    assert llm.generate([[5]], SamplingParams(**biased))[0].outputs[0].text == ""
    shown = llm.generate([[5]], SamplingParams(skip_special_tokens=False, **biased))[0].outputs[0].text
    assert shown == llm.tokenizer.decode([EOS_TOKEN_ID] * 3, skip_special_tokens=False)
    assert shown


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("allowed_token_ids", ()),
        ("bad_words", "one text"),
        ("bad_words", ("",)),
        ("bad_words_token_ids", ((),)),
        ("min_tokens", -1),
        ("min_tokens", 300),
        ("max_tokens", 0),
        ("seed", 2**63),
        ("stop", ("x",) * 17),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_bad_sampling_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias holds token id 512"),
        ({"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids holds token id 512"),
        ({"bad_words_token_ids": ((1, VOCAB_SIZE),)}, "bad_words_token_ids holds token id 512"),
        ({"allowed_token_ids": (4,), "bad_words_token_ids": ((4,),)}, "rule out every token"),
        ({"allowed_token_ids": (EOS_TOKEN_ID,), "min_tokens": 2}, "rule out every token"),
    ],
)
def test_parameters_that_the_model_cannot_serve(llm, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([[1]], SamplingParams(**params))
    assert not llm.engine.has_work


def test_texts_need_a_tokenizer(llm):
    with pytest.raises(ValueError, match="stop is a text, which the engine does not see"):
        llm.engine.add([1], SamplingParams(stop=("x",)))
