"""Logit processing, host and device together, against transformers' processors and published formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as peer

from dispec.engine.request_checks import check_params
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.logits_processors import LogitsProcessors
from dispec.layers.logit_processing import apply_penalties, apply_token_mask, apply_top_k_top_p
from dispec.layers.logprobs import logprobs
from dispec.layers.types import Penalties, SamplingFilters

pytestmark = pytest.mark.smoke

VOCAB = 77  # neither a multiple of 32 nor of anything else
PROMPT = [3, 9, 9, 40, 76, 3]
OUTPUT = [5, 9, 5, 70, 5, 31, 9]
STOPS = frozenset({2, 64, 76})


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def host(params: SamplingParams, prompt: list[int] = PROMPT, output: list[int] = OUTPUT) -> LogitsProcessors:
    state = LogitsProcessors(params, prompt, VOCAB, STOPS)
    state.advance(prompt + output)
    return state


def process(logits: Tensor, states: list[LogitsProcessors], outputs: list[list[int]], padding: int = 3) -> Tensor:
    """Edits and masks of several sequences on the rows of one batch, as the engine puts them together."""
    entries = [state.entries() for state in states]
    index = [row * VOCAB + tokens for row, (tokens, _, _) in enumerate(entries)]
    columns = [np.concatenate(column) for column in (index, [e[1] for e in entries], [e[2] for e in entries])]
    filled = [
        np.concatenate([column, np.full(padding, value, column.dtype)])
        for column, value in zip(columns, (0, 1, 0), strict=True)
    ]
    allowed = torch.full((len(states), -(-VOCAB // 32)), -1, dtype=torch.int32)
    for row, (state, output) in enumerate(zip(states, outputs, strict=True)):
        mask = state.allowed_mask(len(output), output)
        if mask is not None:
            allowed[row] = torch.from_numpy(mask)
    return apply_token_mask(apply_penalties(logits, Penalties(*map(torch.from_numpy, filled))), allowed)


def filters(rows: int, top_k: int = VOCAB, top_p: float = 1.0, min_p: float = 0.0) -> SamplingFilters:
    return SamplingFilters(torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p))


def expect_same_tokens(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isfinite(), expected.isfinite())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1.0, 0.0),
        (10, 1.0, 0.0),
        (VOCAB, 0.2, 0.0),
        (VOCAB, 0.9, 0.0),
        (VOCAB, 1e-6, 0.0),
        (VOCAB, 1.0, 0.05),
        (VOCAB, 1.0, 1.0),
        (20, 0.8, 0.1),
        (5, 0.99, 0.3),
        (VOCAB, 1.0, 0.0),
    ],
)
def test_restrict_is_what_transformers_does(top_k, top_p, min_p, temperature):
    logits = logits_of(20)
    scores = peer.TemperatureLogitsWarper(temperature)(None, logits.double())
    scores = peer.TopKLogitsWarper(top_k)(None, scores)
    scores = peer.TopPLogitsWarper(top_p)(None, scores)
    scores = peer.MinPLogitsWarper(min_p)(None, scores)
    actual = apply_top_k_top_p(logits, torch.full((20,), temperature), filters(20, top_k, top_p, min_p))
    expect_same_tokens(actual, scores)
    assert torch.equal(actual[actual.isfinite()], logits[actual.isfinite()])


def test_equally_probable_tokens_stay_together():
    logits = torch.tensor([[2.0, 1.0, 2.0, 0.0, 1.0, 2.0]])
    one = torch.ones(1)
    assert apply_top_k_top_p(logits, one, filters(1, top_k=1))[0].isfinite().tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
    ]
    assert apply_top_k_top_p(logits, one, filters(1, top_p=0.1))[0].isfinite().sum() == 3
    assert apply_top_k_top_p(logits, one, filters(1, top_k=4))[0].isfinite().sum() == 5


def test_greedy_rows_and_masked_tokens_under_filters():
    logits = logits_of(4)
    logits[:, 10:] = -torch.inf
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.7])
    for chosen in (filters(4, 1), filters(4, 30, 0.5), filters(4, VOCAB, 1e-9), filters(4, min_p=1.0), filters(4)):
        restricted = apply_top_k_top_p(logits, temperature, chosen)
        assert torch.equal(restricted.argmax(-1), logits.argmax(-1))
        assert not restricted[:, 10:].isfinite().any()
    assert torch.equal(apply_top_k_top_p(logits, temperature, filters(4)), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty_is_transformers(penalty):
    logits = logits_of(1)
    expected = peer.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits)
    actual = process(logits, [host(SamplingParams(repetition_penalty=penalty))], [OUTPUT])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_logit_bias_is_transformers():
    bias = {0: 1.5, 9: -100.0, 5: 100.0, 76: 0.25}
    logits = logits_of(1)
    expected = peer.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
        torch.tensor([PROMPT + OUTPUT]), logits
    )
    torch.testing.assert_close(process(logits, [host(SamplingParams(logit_bias=bias))], [OUTPUT]), expected)


@pytest.mark.parametrize("output", [[], [5], [5, 9], [4, 9], [31, 5, 9], [9]])
def test_bad_words_are_transformers(output):
    words = [[8], [5, 6], [5, 9, 7], [9, 11], [9, 12], [31, 5, 9, 13], [9, 9, 7], [3, 5, 14]]
    params = SamplingParams(bad_words_token_ids=tuple(map(tuple, words)))
    logits = logits_of(1)
    # transformers matches the prompt as well; DiSpec, like vLLM, only the output.
    expected = peer.NoBadWordsLogitsProcessor(words)(torch.tensor([output], dtype=torch.int64), logits)
    actual = process(logits, [host(params, output=output)], [output])
    assert torch.equal(actual, expected)
    mask = host(params, output=output).allowed_mask(len(output), PROMPT + output)
    assert torch.equal(apply_token_mask(logits, torch.from_numpy(mask)[None]), expected), "given the whole sequence"


def test_allowed_tokens_are_transformers():
    allowed = (0, 31, 32, 63, 64, 76)
    logits = logits_of(1)
    others = [token for token in range(VOCAB) if token not in allowed]
    expected = peer.SuppressTokensLogitsProcessor(others)(None, logits)
    assert torch.equal(process(logits, [host(SamplingParams(allowed_token_ids=allowed))], [OUTPUT]), expected)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_min_tokens_is_transformers(count):
    state, logits = host(SamplingParams(min_tokens=4)), logits_of(1)
    processor = peer.MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, sorted(STOPS))
    ids = torch.tensor([PROMPT + OUTPUT[:count]])
    assert torch.equal(process(logits, [state], [OUTPUT[:count]]), processor(ids, logits))
    processor = peer.MinLengthLogitsProcessor(len(PROMPT) + 4, sorted(STOPS))
    assert torch.equal(process(logits, [state], [OUTPUT[:count]]), processor(ids, logits))


def test_presence_and_frequency_follow_the_published_formula():
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c the counts of what was sampled."""
    logits = logits_of(1)
    for presence, frequency in ((0.7, 0.0), (0.0, 0.4), (-1.5, 2.0)):
        expected = logits.clone()
        for token in range(VOCAB):
            count = OUTPUT.count(token)
            expected[0, token] = logits[0, token] - count * frequency - float(count > 0) * presence
        params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        torch.testing.assert_close(process(logits, [host(params)], [OUTPUT]), expected, rtol=1e-6, atol=1e-6)


def test_edit_takes_half_precision_infinities_and_no_entries():
    logits = logits_of(2).bfloat16()
    logits[1, 4] = -torch.inf
    edits = Penalties(
        torch.tensor([4, VOCAB + 4, 0, 0]), torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([0.5, 1.0, 0, 0])
    )
    expected = logits.float()
    expected[0, 4] = (expected[0, 4] / 2 if expected[0, 4] > 0 else expected[0, 4] * 2) + 0.5
    actual = apply_penalties(logits, edits)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    nothing = Penalties(torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.zeros(0))
    assert torch.equal(apply_penalties(logits, nothing), logits.float())


def test_padding_does_not_disturb_the_entry_it_repeats():
    params = SamplingParams(logit_bias={0: 3.0})
    logits = logits_of(1)
    assert torch.equal(*(process(logits, [host(params)], [OUTPUT], padding) for padding in (0, 50)))


tokens = st.integers(0, VOCAB - 1)
some_tokens = st.lists(tokens, max_size=30)
mixes = st.builds(
    dict,
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.5]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=16), max_size=5),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=3).map(tuple),
    bad_words_token_ids=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    min_tokens=st.sampled_from([0, 5, 200]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(mixes, some_tokens, some_tokens), min_size=1, max_size=5), st.data())
def test_rows_of_a_batch_are_what_each_is_alone_and_what_the_definitions_say(rows, data):
    rows = [(SamplingParams(**fields), prompt, output) for fields, prompt, output in rows]
    logits = logits_of(len(rows))
    states = [LogitsProcessors(params, prompt, VOCAB, STOPS) for params, prompt, _ in rows]
    for state, (_, prompt, output) in zip(states, rows, strict=True):
        for end in [*sorted(data.draw(st.sets(st.integers(0, len(output)), max_size=4))), len(output)]:
            state.advance(prompt + output[:end])
    outputs = [output for _, _, output in rows]
    together = process(logits, states, outputs)
    for row, (params, prompt, output) in enumerate(rows):
        fresh = host(params, prompt, output)
        alone = process(logits[row : row + 1], [fresh], [output])[0]
        assert torch.equal(together[row], alone)
        torch.testing.assert_close(alone, by_definition(logits[row], params, prompt, output), rtol=1e-5, atol=1e-5)
        assert fresh.has_penalties or not len(fresh.entries()[0])
        assert fresh.has_mask or fresh.allowed_mask(len(output), output) is None


def by_definition(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> Tensor:
    values = logits.double().tolist()
    for token in range(VOCAB):
        if token in prompt or token in output:
            scale = params.repetition_penalty
            values[token] = values[token] / scale if values[token] > 0 else values[token] * scale
        values[token] += params.logit_bias.get(token, 0.0)
        values[token] -= output.count(token) * params.frequency_penalty
        values[token] -= (token in output) * params.presence_penalty
        banned = any(
            words[-1] == token and tuple(output[len(output) - len(words) + 1 :]) == words[:-1]
            for words in params.bad_words_token_ids
            if len(words) <= len(output) + 1
        )
        forbidden = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        if banned or forbidden or (token in STOPS and len(output) < params.min_tokens):
            values[token] = float("-inf")
    return torch.tensor(values, dtype=torch.float32)


def test_state_costs_no_copies_and_masks_are_kept():
    params = SamplingParams(presence_penalty=0.5, bad_words_token_ids=((5, 6), (7,)), min_tokens=3)
    state = LogitsProcessors(params, PROMPT, VOCAB, STOPS)
    output = list(range(60))
    for end in range(len(output) + 1):
        state.advance(PROMPT + output[:end])
        found = state.entries()
        assert found[0].tolist() == output[:end]
        assert [array.dtype for array in found] == [np.int64, np.float32, np.float32]
        assert found[2].base is state.entries()[2].base is not None
    assert state.allowed_mask(0, []) is state.allowed_mask(2, [8, 9]) is not state.allowed_mask(3, [8, 9, 9])
    first, again = (state.allowed_mask(9, [5]) for _ in range(2))
    assert first is again is not state.allowed_mask(9, [4])
    assert not np.array_equal(first, state.allowed_mask(2, [5])), "stop tokens are withheld there as well"
    assert (
        LogitsProcessors(SamplingParams(bad_words_token_ids=((5, 6),)), [], VOCAB, STOPS).allowed_mask(2, [4, 4])
        is None
    )


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"allowed_token_ids": (2, 64), "min_tokens": 1}, ["allowed_token_ids", "min_tokens"]),
        ({"allowed_token_ids": (5, 8), "bad_words_token_ids": ((5,), (1, 8))}, ["allowed_token_ids", "bad_words"]),
        ({"bad_words_token_ids": tuple((token,) for token in range(VOCAB))}, ["bad_words"]),
    ],
)
def test_what_would_leave_nothing_is_refused(fields, names):
    with pytest.raises(ValueError, match=" and ".join(names)):
        check_params(SamplingParams(**fields), STOPS, VOCAB)


def test_what_leaves_something_is_not_refused():
    for fields in ({}, {"min_tokens": 5}, {"allowed_token_ids": (2,)}, {"bad_words_token_ids": ((1,), (2, 3))}):
        check_params(SamplingParams(**fields), STOPS, VOCAB)
    check_params(SamplingParams(allowed_token_ids=(2,), min_tokens=1), frozenset(), VOCAB)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype, count):
    logits = logits_of(30).to(dtype)
    chosen = torch.arange(30, dtype=torch.int32)
    chosen[:3] = logits.argmax(-1)[:3]
    result = logprobs(logits, chosen, count)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(
        result.logprob.double(), exact.gather(1, chosen.long()[:, None])[:, 0], rtol=0, atol=5e-6
    )
    torch.testing.assert_close(
        result.top_logprobs.double(), exact.sort(descending=True).values[:, :count], rtol=0, atol=5e-6
    )
    for row, token in enumerate(chosen.tolist()):
        assert result.rank[row] == sum(value > logits[row, token] for value in logits[row]) + 1
        for column, likely in enumerate(result.top_token_ids[row].tolist()):
            assert likely != token or result.top_logprobs[row, column] == result.logprob[row]
    assert (result.rank[:3] == 1).all()
