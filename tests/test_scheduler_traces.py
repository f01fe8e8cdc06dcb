"""The scheduler under random traces: every sequence gets the tokens that it would get alone."""

import random
import sys
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dispec.engine.scheduling.sequence import Sequence
from tests.fake_engine import VOCAB_SIZE, FakeEngine, alone, entries_of, logprob_after

# Long enough for the largest pool; two are the same up to the tenth token.
_ONE = [(3 * position + position // 7) % VOCAB_SIZE for position in range(64)]
DOCUMENTS = [_ONE, _ONE[:10] + _ONE[11:] + _ONE[:1], [5, *_ONE[:-1]]]

TOKENS = st.integers(0, VOCAB_SIZE - 1)
STEPS = st.lists(st.booleans(), min_size=1, max_size=8)  # whether each overlaps
REQUESTS = st.fixed_dictionaries(
    {
        "document": st.sampled_from([0, 0, 1, 2]),
        "num_blocks": st.sampled_from([0, 1, 2, 2, 3, 4, 12]),
        "beyond": st.integers(-1, 3),
        "tail": st.lists(TOKENS, max_size=2),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "max_tokens": st.integers(1, 12),
        "priority": st.integers(-2, 2),
        "cache_salt": st.sampled_from([None, None, None, "salt"]),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({1}), frozenset({2, 3})]),
        "prompt_logprobs": st.sampled_from([None, None, 0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.0]),
    }
)


class Traces(RuleBasedStateMachine):
    """Requests that come, stop and are aborted at any time, in pools that are nearly always too small."""

    engine: FakeEngine

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Sequence] = []

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        more_tokens=st.integers(0, 8),
        max_prefill_chunk=st.none() | st.integers(1, 6),
        max_lone_prefill_chunk=st.none() | st.integers(1, 6),
        enable_prefix_caching=st.sampled_from([True, True, True, False]),
        drafts=st.none() | st.integers(0, 999).map(random.Random),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, more_tokens: int, **options: Any) -> None:
        self.engine = FakeEngine(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_tokens,
            priority_aging=2.0,
            **options,
        )

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), steps=STEPS)
    def add(self, requests: list[dict[str, Any]], steps: list[bool]) -> None:
        """Prompts that begin alike; of one token, whole blocks, one token more or less, as many as fit."""
        longest = self.engine.max_model_len - 1
        for request in requests:
            document, num_blocks, beyond, tail, options = self.take_apart(**request)
            length = min(max(1, num_blocks * self.engine.pool.block_size + beyond), longest)
            prompt = (DOCUMENTS[document][: max(0, length - len(tail))] + tail)[:length]
            self.requests += self.engine.add(prompt, logprobs=0, **options).choices
        self.step(steps)

    @staticmethod
    def take_apart(document: int, num_blocks: int, beyond: int, tail: list[int], **options: Any) -> tuple[Any, ...]:
        return document, num_blocks, beyond, tail, options

    @precondition(lambda self: any(request.finish_reason for request in self.requests))
    @rule(index=st.integers(0, 99), more=st.lists(TOKENS, max_size=3), steps=STEPS)
    def add_next_turn(self, index: int, more: list[int], steps: list[bool]) -> None:
        ended = [request for request in self.requests if request.finish_reason]
        request = ended[index % len(ended)]
        prompt = [*request.token_ids, *more]
        if len(prompt) < self.engine.max_model_len:
            self.requests += self.engine.add(prompt, max_tokens=3, cache_salt=request.cache_salt).choices
        self.step(steps)

    @precondition(lambda self: self.alive)
    @rule(steps=STEPS)
    def step(self, steps: list[bool]) -> None:
        for overlaps in steps:
            if self.engine.scheduler.has_work:
                self.engine.step(overlaps)

    @precondition(lambda self: self.alive)
    @rule(index=st.integers(0, 99), steps=STEPS)
    def abort(self, index: int, steps: list[bool]) -> None:
        request = self.alive[index % len(self.alive)]
        self.engine.scheduler.finish(request, "abort")
        self.engine.scheduler.finish(request, "stop")  # which changes nothing
        self.engine.scheduler.check()
        self.step(steps)

    @property
    def alive(self) -> list[Sequence]:
        return [request for request in self.requests if request.finish_reason is None]

    def teardown(self) -> None:
        if not self.requests or sys.exc_info()[0] is not None:  # a step has failed, which says more
            return
        # In each step the running sequence that is first in rank computes at least a token, or waits for its last one.
        # It loses what it has computed only to a sequence of better rank, once for each. So the number of steps is at
        # most three times the number of tokens, and twice that where each token must be known before the next.
        lengths = [request.max_len for request in self.alive]
        self.engine.run(overlaps=bool(len(lengths) % 2), limit=2 * 3 * sum(lengths) + 2)
        assert self.engine.num_used == 0
        for request in self.requests:
            self.check_output(request)

    @staticmethod
    def check_output(request: Sequence) -> None:
        expected, tokens = alone(request), request.output_token_ids
        if request.finish_reason == "abort":
            assert tokens == expected[: len(tokens)]
            return
        assert tokens == expected
        assert request.finish_reason == ("stop" if expected[-1] in request.stop_token_ids else "length")
        assert len(request.logprobs) == (0 if request.params.logprobs is None else len(tokens))
        if request.params.prompt_logprobs is not None:
            prompt = request.token_ids[: request.num_prompt_tokens]
            pairs = zip(entries_of(prompt), prompt[1:], strict=False)
            assert request.prompt_logprobs == [logprob_after(entry, token_id) for entry, token_id in pairs]


TestTraces = Traces.TestCase
TestTraces.settings = settings(
    max_examples=250,
    stateful_step_count=20,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
