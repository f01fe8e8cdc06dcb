"""A request that one engine begins and another one continues gets the answer of a single engine."""

import random
from dataclasses import replace

import pytest

from dispec import LLM, SamplingParams
from dispec.engine.engine import Engine
from dispec.engine.scheduling.sequence import Sequence, Status
from dispec.engine.transfer.interface import RemoteBlocks
from tests.checkpoints import save_tiny
from tests.fake_transfer_engine import FakeTransferEngine, Network
from tests.small_engine import (
    greedy,
    make,
    mixed_params,
    prompt_logprobs,
    random_prompts,
    random_tokens,
    sampled_logprobs,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("qwen3")
    save_tiny(found, "qwen3")
    return found


@pytest.fixture(scope="module")
def plain(directory) -> LLM:
    return make(directory)


class Pair:
    """A prefill engine and a decode engine.

    front: whether a frontend tells the decode engine the first tokens; otherwise they come with the blocks.
    """

    def __init__(self, directory, network: Network, *, front: bool, **options) -> None:
        self.network, self.front = network, front
        self.prefill, self.decode = (make(directory, **options).engine for _ in range(2))
        for name, engine in (("p", self.prefill), ("d", self.decode)):
            engine.kv_connector.transfer_engine = FakeTransferEngine(network, name, engine.runner.kv_cache)
        self.requests: dict[str, tuple[Sequence, Sequence]] = {}
        self.is_told: set[str] = set()

    def add(self, name: str, prompt: list[int], params: SamplingParams, **others) -> Sequence:
        sent = self.prefill.add(prompt, params, publish_as=name, **others)
        remote_blocks = RemoteBlocks("p", name, "127.0.0.1", 1)
        received = self.decode.add(prompt, params, pull=remote_blocks, is_resumed=self.front, **others)
        self.requests[name] = sent, received
        return received

    def step(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.work_while_idle()
            if engine.has_work:
                engine.step()
            engine.scheduler.check()
        for name, (sent, received) in self.requests.items():
            choices = sent.choices
            if self.front and name not in self.is_told and all(choice.num_output_tokens for choice in choices):
                self.is_told.add(name)
                limit = received.params.max_tokens
                ended = [choice.finish_reason == "stop" or limit == 1 for choice in choices]
                outputs = [None if end else choice.output_token_ids for choice, end in zip(choices, ended, strict=True)]
                self.decode.resume(received, outputs)

    def run(self) -> None:
        for _ in range(3000):
            self.step()
            choices = [choice for _, received in self.requests.values() for choice in received.choices]
            if all(choice.status is Status.FINISHED for choice in choices) and not self.prefill.kv_connector.num_sends:
                return
        raise AssertionError("some requests never ended")

    def answers(self) -> list[list[list[int]]]:
        """Return the tokens of each choice of each request, from the engine where it ended."""
        return [
            [
                late.output_token_ids or early.output_token_ids
                for early, late in zip(sent.choices, received.choices, strict=True)
            ]
            for sent, received in self.requests.values()
        ]

    def assert_empty(self) -> None:
        for engine in (self.prefill, self.decode):
            pool = engine.scheduler.pool
            assert pool.num_free == pool.num_usable
            assert not engine.has_work
            assert not engine.scheduler.num_waiting


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Return prompts with shared prefixes or of full blocks, with all features and some with several choices."""
    prompts = random_prompts(count - 4) + [random_tokens(size) for size in (16, 32, 48, 1)]
    params = mixed_params(count, max_tokens=12)
    shared = random_tokens(40, 99)
    found = []
    for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        if index % 3 == 0:
            prompt = shared + prompt
        found.append((prompt, replace(param, n=1 + index % 3 // 2 * 2, max_tokens=1 + index % 12)))
    return found


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize(
    ("failure", "options"),
    [
        (0.0, {}),
        (0.3, {}),
        (0.1, {"kv_cache_memory": "1MiB"}),
        (0.1, {"enable_prefix_caching": False}),
        (0.1, {"speculative_model": "ngram"}),
        (0.0, {"max_num_batched_tokens": 24, "max_num_seqs": 4}),
    ],
)
def test_answers_are_those_of_one_engine(directory, plain, front, failure, options):
    network = Network(1, failure=failure)
    pair = Pair(directory, network, front=front, **options)
    work = requests(20)
    expected = plain.generate([prompt for prompt, _ in work], [params for _, params in work])
    rng = random.Random(3)
    for number, (prompt, params) in enumerate(work):
        pair.add(f"t{number}", prompt, params)
        for _ in range(rng.randint(0, 3)):
            pair.step()
    pair.run()
    assert pair.answers() == [[choice.token_ids for choice in one.outputs] for one in expected]
    pair.assert_empty()
    if not failure:
        # A request that ended with its first token is not pulled if the frontend knows that in time.
        assert network.num_pulled >= sum(params.max_tokens > 1 or not front for _, params in work)
        assert pair.decode.kv_connector.totals.num_failed_receives == 0
        computed = sum(record.num_prompt_tokens for record in pair.decode.records)
        assert computed == 0, "the decode engine computed a prompt that it received"


@pytest.mark.smoke
def test_logprobs_and_first_tokens_come_with_the_blocks(directory, plain):
    pair = Pair(directory, Network(2), front=False)
    params = SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=1, n=2, seed=4, temperature=1.0, ignore_eos=True)
    prompt = random_tokens(37)
    (expected,) = plain.generate([prompt], [params])
    received = pair.add("one", prompt, params)
    pair.run()
    assert [entry.logprob for entry in received.prompt_logprobs] == pytest.approx(
        [entry.logprob for entry in prompt_logprobs(expected)], abs=1e-4
    )
    for choice, reference in zip(received.choices, expected.outputs, strict=True):
        assert [entry.token_id for entry in choice.logprobs] == reference.token_ids
        assert [entry.logprob for entry in choice.logprobs] == pytest.approx(
            [entry.logprob for entry in sampled_logprobs(reference)], abs=1e-4
        )


def test_cached_blocks_are_not_moved(directory):
    network = Network(3, delay=0.0)
    pair = Pair(directory, network, front=True)
    prompt = random_tokens(70)
    params = greedy(4)
    pair.add("first", prompt, params)
    pair.run()
    assert network.num_blocks == 5
    pair.add("second", prompt[:64] + random_tokens(10, 5), params)
    pair.run()
    assert network.num_blocks == 6


def test_aborted_requests_leave_no_blocks(directory):
    pair = Pair(directory, Network(4, delay=0.7), front=True)
    rng = random.Random(5)
    for number, (prompt, params) in enumerate(requests(24)):
        pair.add(f"t{number}", prompt, params)
        for _ in range(rng.randint(0, 2)):
            pair.step()
        if rng.random() < 0.5:
            name = f"t{rng.randint(0, number)}"
            sent, received = pair.requests.pop(name, (None, None))
            if sent is not None:
                for choice in sent.choices:
                    pair.prefill.abort(choice)
                for choice in received.choices:
                    pair.decode.abort(choice)
    pair.run()
    for _ in range(50):
        pair.step()
    pair.assert_empty()


def test_blocks_of_another_prompt_are_rejected(directory, plain):
    pair = Pair(directory, Network(6), front=False)
    params = greedy(5)
    mine, other = random_tokens(40, 1), random_tokens(40, 2)
    pair.prefill.add(other, params, publish_as="one")
    sequence = pair.decode.add(mine, params, pull=RemoteBlocks("p", "one", "127.0.0.1", 1))
    while sequence.status is not Status.FINISHED:
        pair.step()
    assert sequence.output_token_ids == plain.generate([mine], [params])[0].outputs[0].token_ids
    assert pair.decode.kv_connector.totals.num_failed_receives == 1


def test_a_request_resumes_from_its_tokens_alone(directory, plain):
    """An engine resumes a request from its prompt and its output tokens."""
    engine: Engine = make(directory).engine
    params = SamplingParams(max_tokens=10, n=2, seed=3, temperature=1.0, logprobs=0, ignore_eos=True)
    prompt = random_tokens(33)
    (expected,) = plain.generate([prompt], [params])
    first = engine.add(prompt, params, is_resumed=True)
    assert not engine.has_work
    engine.resume(first, [expected.outputs[0].token_ids[:4], None])
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert first.output_token_ids == expected.outputs[0].token_ids
    assert len(first.logprobs) == 6
    assert first.choices[1].finish_reason == "abort"


def test_an_engine_without_transfer_says_so(plain):
    with pytest.raises(ValueError, match="kv_transfer is off"):
        plain.engine.add([1, 2, 3], SamplingParams(), publish_as="x")
