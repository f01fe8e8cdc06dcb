"""The scheduler under random traces: whatever happens, every sequence gets the tokens that it would get alone."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.sequence import Sequence
from tests.fake_engine import VOCAB_SIZE, FakeEngine, alone, entries_of, logprob_after

# Long enough for the largest pool, and different from the first token or from the tenth on.
DOCUMENTS = [
    [(3 * position + position // 7 + (position > 9) * kind) % VOCAB_SIZE for position in range(64)] for kind in (0, 1)
]
DOCUMENTS.append([5, *DOCUMENTS[0]])


class Traces(RuleBasedStateMachine):
    """Requests that come, stop and are aborted at any time, in pools that are nearly always too small."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Sequence] = []

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        max_num_seqs = data.draw(st.integers(1, 6), "max_num_seqs")
        self.engine = FakeEngine(
            data.draw(st.integers(2, 12), "num_blocks"),
            data.draw(st.sampled_from([1, 2, 4]), "block_size"),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=data.draw(st.integers(max_num_seqs, max_num_seqs + 12), "max_num_batched_tokens"),
            max_prefill_chunk=data.draw(st.none() | st.integers(1, 6), "max_prefill_chunk"),
            priority_aging=2.0,
            enable_prefix_caching=data.draw(st.sampled_from([True, True, True, False]), "enable_prefix_caching"),
        )

    def add(self, prompt: list[int], **options: Any) -> None:
        if len(prompt) < self.engine.max_model_len:
            self.requests += self.engine.add(prompt, **options).choices

    @property
    def alive(self) -> list[Sequence]:
        return [request for request in self.requests if request.finish_reason is None]

    @rule(
        document=st.integers(0, len(DOCUMENTS) - 1),
        blocks=st.integers(0, 12),
        beyond=st.integers(-1, 3),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        options=st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 12),
                "priority": st.integers(-2, 2),
                "cache_salt": st.sampled_from([None, None, None, "salt"]),
                "stop_token_ids": st.sampled_from([frozenset(), frozenset({1}), frozenset({2, 3})]),
                "prompt_logprobs": st.sampled_from([None, None, None, 0]),
                "logprobs": st.sampled_from([None, 0]),
                "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 1.0]),
            }
        ),
    )
    def add_prompt(
        self, document: int, blocks: int, beyond: int, tail: list[int], n: int, options: dict[str, Any]
    ) -> None:
        """Prompts that begin alike; of one token, whole blocks, one more or less, as many as fit."""
        length = min(max(1, blocks * self.engine.pool.block_size + beyond), self.engine.max_model_len - 1)
        self.add((DOCUMENTS[document][: max(0, length - len(tail))] + tail)[:length], n=n, **options)

    @precondition(lambda self: any(request.finish_reason for request in self.requests))
    @rule(index=st.integers(0, 99), more=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3))
    def add_next_turn(self, index: int, more: list[int]) -> None:
        ended = [request for request in self.requests if request.finish_reason]
        request = ended[index % len(ended)]
        self.add(request.token_ids + more, max_tokens=3, cache_salt=request.cache_salt)

    @precondition(lambda self: self.requests)
    @rule(overlaps=st.booleans(), count=st.integers(1, 4))
    def step(self, overlaps: bool, count: int) -> None:
        for _ in range(count):
            self.engine.step(overlaps)

    @precondition(lambda self: self.alive)
    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        request = self.alive[index % len(self.alive)]
        self.engine.scheduler.finish(request, "abort")
        self.engine.scheduler.finish(request, "stop")
        self.engine.scheduler.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # In each step the running sequence that is first in rank computes a token at least, or waits for its last
        # one. It keeps what it has computed unless one of better rank is admitted, which happens once for each, and
        # nobody is admitted before the first in rank. So everybody pays for itself, for those that it waits for, which
        # end, and for one that it pushes aside. Where each token must be known before the next, steps are twice as many.
        lengths = [request.max_len for request in self.alive]
        self.engine.run(overlaps=bool(len(lengths) % 2), limit=2 * 3 * sum(lengths) + 2)
        assert self.engine.num_used == 0
        for request in self.requests:
            assert request.finish_reason is not None
            expected = alone(request)
            if request.finish_reason == "abort":
                assert request.output_token_ids == expected[: request.num_output_tokens]
            else:
                assert request.output_token_ids == expected
                assert request.finish_reason == ("stop" if expected[-1] in request.stop_token_ids else "length")
                self.check_logprobs(request)

    @staticmethod
    def check_logprobs(request: Sequence) -> None:
        assert len(request.logprobs) == (0 if request.params.logprobs is None else request.num_output_tokens)
        if request.params.prompt_logprobs is not None:
            prompt = request.token_ids[: request.num_prompt_tokens]
            pairs = zip(entries_of(prompt), prompt[1:], strict=False)
            assert request.prompt_logprobs == [logprob_after(entry, token_id) for entry, token_id in pairs]


TestTraces = Traces.TestCase
TestTraces.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
