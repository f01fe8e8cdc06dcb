"""Requests through a real engine process: the answers are those of `LLM`, and nothing is left behind."""

import asyncio
import os
import stat
import time
from pathlib import Path

import pytest

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.client.engine_client import EngineClient, EngineObserver
from dispec.serving.client.errors import InvalidRequest, NotReady, Overloaded, RequestTimedOut
from tests.engine_clients import (
    Recorder,
    ask,
    assert_empty,
    assert_same,
    generate,
    many_requests,
    read,
    running_client,
    until,
)
from tests.engine_clients import directory as directory
from tests.engine_clients import llm as llm
from tests.engine_clients import one_thread_each as one_thread_each
from tests.small_engine import greedy, random_prompts, random_tokens

# Small steps, so that there is something to interrupt.
SMALL_STEPS = {"max_num_seqs": 16, "max_num_batched_tokens": 32}
LONG = greedy(400)


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared_client(loop, directory):
    context = running_client(directory, SMALL_STEPS)
    client = loop.run(context.__aenter__())
    yield client
    loop.run(context.__aexit__(None, None, None))


@pytest.fixture
def client(loop, shared_client):
    """One engine process for all tests that leave it alive, empty after each of them."""
    yield shared_client
    assert_empty(loop.run(shared_client.inspect()))
    assert shared_client.load == 0
    shared_client.observers.clear()


@pytest.mark.smoke
def test_64_concurrent_requests_are_answered_as_in_one_process(loop, client, llm):
    requests = many_requests(llm)
    expected = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])

    async def all_at_once():
        return await asyncio.gather(*(generate(client, prompt, params) for prompt, params in requests))

    reasons = assert_same(expected, loop.run(all_at_once()))
    assert reasons >= {("length", type(None)), ("stop", str), ("stop", int)}


def test_a_cached_prefix_is_counted(loop, client):
    prompt = random_tokens(70, seed=1)
    first, second = (loop.run(generate(client, prompt, greedy(2)))[0].num_cached_tokens for _ in range(2))
    assert (first, second) == (0, 64)


def test_cache_salt_and_priority_reach_the_engine(loop, client):
    prompt = random_tokens(70, seed=2)
    salted = [loop.run(generate(client, prompt, greedy(2), cache_salt=salt))[0] for salt in ("a", "b", "a")]
    assert [answer.num_cached_tokens for answer in salted] == [0, 0, 64]

    async def in_which_order() -> list[int]:
        running = [ask(client, random_tokens(5, seed), LONG) for seed in range(16)]
        await until(lambda: client.num_waiting == 0)
        streams = [ask(client, [5], greedy(1), priority=priority) for priority in (3, -1, 0)]
        for stream in streams:
            await stream.accepted()
        running[7].abort()  # one place, which each of them needs for one step
        for stream in streams:
            await read(stream)
        for stream in running:
            stream.abort()
        return sorted(range(3), key=lambda index: streams[index].timing.started)

    assert loop.run(in_which_order()) == [1, 2, 0]


def test_a_slow_reader_gets_everything_in_few_updates(loop, client, llm):
    prompt, params = random_tokens(20), greedy(60, logprobs=1, n=3)
    expected = llm.generate([prompt], params)[0]

    async def read_late():
        stream = ask(client, prompt, params)
        await until(lambda: stream.has_ended)
        return await read(stream)

    async def wait_then_read():
        stream = ask(client, prompt, params)
        await stream.wait()
        return await read(stream)

    for answers in (loop.run(read_late()), loop.run(wait_then_read())):
        assert [answer.num_updates for answer in answers] == [1, 1, 1]
        assert [answer.token_ids for answer in answers] == [choice.token_ids for choice in expected.outputs]
        assert [answer.text for answer in answers] == [choice.text for choice in expected.outputs]
        assert [len(answer.logprobs) for answer in answers] == [60, 60, 60]
        assert answers[0].num_cached_tokens is not None


async def queued(client: EngineClient):
    others = [ask(client, random_tokens(3, seed), LONG) for seed in range(16)]
    await until(lambda: client.num_waiting == 0)
    stream = ask(client, random_tokens(5), greedy(400, n=2))
    await stream.accepted()
    assert stream.timing.started is None
    return [stream, *others]


async def sent(client: EngineClient):
    return [ask(client, random_tokens(5), LONG)]


async def computing_its_prompt(client: EngineClient):
    client.observers.append(recorder := Recorder())
    stream = ask(client, random_tokens(500), greedy(2))
    await until(lambda: len(recorder.records) > 0)
    assert stream.timing.first_token is None
    return [stream]


async def forked(client: EngineClient):
    """Several choices that wait for their prompt."""
    stream = ask(client, random_tokens(500), greedy(5, n=5))
    await until(lambda: stream.timing.started is not None)
    return [stream]


async def decoding(client: EngineClient):
    stream = ask(client, random_tokens(50), greedy(400, n=3))
    async for update in stream:
        if update.index == 2:
            break
    return [stream]


@pytest.mark.parametrize("phase", [sent, queued, computing_its_prompt, forked, decoding])
def test_aborting_takes_effect_before_the_next_step(loop, client, phase):
    async def abort() -> None:
        streams = await phase(client)
        for stream in streams:
            stream.abort()
            stream.abort()
        assert_empty(await client.inspect())  # it asks right behind the abort
        for stream in streams:
            reasons = [update.finish_reason async for update in stream if update.finish_reason is not None]
            assert reasons == ["abort"] * stream.request.params.n

    loop.run(abort())


def test_an_abort_leaves_the_others_alone(loop, client, llm):
    prompts = random_prompts(6)
    expected = llm.generate(prompts, greedy(80))

    async def abort_every_other():
        streams = [ask(client, prompt, greedy(80)) for prompt in prompts]
        for stream in streams[::2]:
            await anext(stream)
            stream.abort()
        return [await read(stream) for stream in streams[1::2]]

    answers = loop.run(abort_every_other())
    assert [answer[0].token_ids for answer in answers] == [
        completion.outputs[0].token_ids for completion in expected[1::2]
    ]


def test_aborting_a_request_after_one_of_its_choices_has_ended(loop, client):
    stops = tuple(range(0, 512, 20))
    params = SamplingParams(temperature=1.5, seed=0, n=8, max_tokens=400, ignore_eos=True, stop_token_ids=stops)

    async def abort() -> None:
        stream = ask(client, random_tokens(5), params)
        async for update in stream:
            if update.finish_reason is not None:
                break
        stream.abort()
        assert_empty(await client.inspect())

    loop.run(abort())


def test_aborting_after_the_end_does_nothing(loop, client):
    async def abort_late() -> None:
        stream = ask(client, random_tokens(5), greedy(3))
        [answer] = await read(stream)
        stream.abort()
        assert answer.finish_reason == "length"
        assert stream.finish_reasons == ["length"]

    loop.run(abort_late())


@pytest.mark.smoke
def test_a_timeout_ends_a_request_and_no_other(loop, client):
    async def time_out() -> None:
        other = ask(client, random_tokens(5), greedy(5))
        stream = ask(client, random_tokens(9), greedy(400, n=12), timeout=0.05)
        with pytest.raises(RequestTimedOut, match=r"longer than 0\.05 s"):
            await read(stream)
        await read(other)
        in_time = ask(client, random_tokens(5), greedy(2), timeout=1000)
        await read(in_time)

    loop.run(time_out())


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([1, 512], greedy(), "prompt holds token id 512, must be between 0 and 511"),
        ([1], greedy(stop_token_ids=(999,)), "stop_token_ids holds token id 999"),
        ([1], greedy(logit_bias={700: 1.0}), "logit_bias holds token id 700"),
        ([3] * 512, greedy(), r"prompt has 512 tokens, must be below max_model_len \(512\)"),
    ],
)
def test_the_engine_s_refusal_reaches_the_reader(loop, client, prompt, params, message):
    async def refuse() -> None:
        stream = ask(client, prompt, params)
        with pytest.raises(InvalidRequest, match=message):
            await stream.accepted()
        with pytest.raises(InvalidRequest, match=message):
            await read(stream)
        await generate(client, [1, 2, 3], greedy(2))

    loop.run(refuse())


def test_ids_that_clients_choose_need_not_differ(loop, client, llm):
    prompts = random_prompts(3)
    expected = llm.generate(prompts, greedy(9))

    async def all_at_once():
        return await asyncio.gather(*(generate(client, prompt, greedy(9)) for prompt in prompts))

    found = [answers[0].token_ids for answers in loop.run(all_at_once())]
    assert found == [completion.outputs[0].token_ids for completion in expected]


def test_times_add_up_and_are_told(loop, client):
    client.observers.append(recorder := Recorder())

    async def several() -> list:
        streams = [ask(client, random_tokens(60, seed), greedy(10, n=2)) for seed in range(20)]
        for stream in streams:
            await read(stream)
        return streams

    streams = loop.run(several())
    for stream in streams:
        timing = stream.timing
        assert timing.queue + timing.prefill + timing.decode == pytest.approx(timing.total, abs=1e-9)
        assert timing.arrival < timing.started < timing.first_token < timing.finished <= time.perf_counter()
    assert len(recorder.finished) == len(recorder.firsts) == 20
    assert sorted(first.timing.ttft for first in recorder.firsts) == pytest.approx(
        sorted(stream.timing.first_token - stream.timing.arrival for stream in streams)
    )
    for stream in recorder.finished:
        assert (stream.request.request_id, stream.num_prompt_tokens, stream.num_output_tokens) == ("test", 60, 20)
        assert stream.finish_reasons == ["length", "length"]
        assert len(stream.gaps) == 18
        assert sum(stream.gaps) <= 2 * (stream.timing.finished - stream.timing.first_token)
        assert stream.error is None
    assert sum(record.num_finished for record in recorder.records) == 40
    computed = sum(record.num_prompt_tokens + record.num_cached_tokens for record in recorder.records)
    assert computed >= 20 * 60
    assert any(record.kind == "prefill" and record.num_finished == 0 for record in recorder.records)


def test_an_observer_that_fails_breaks_nothing(loop, client):
    class Broken(EngineObserver):
        def on_step(self, record, finished):
            raise ZeroDivisionError

        def on_request_finished(self, stream):
            raise ZeroDivisionError

    client.observers += [Broken(), recorder := Recorder()]
    [answer] = loop.run(generate(client, [1, 2], greedy(4)))
    assert len(answer.token_ids) == 4
    assert len(recorder.finished) == 1


def test_an_idle_engine_does_not_wake_up(loop, client):
    loop.run(generate(client, [1, 2], greedy(4)))
    loop.run(client.inspect())
    pid = client.info.pid

    def activity() -> list[str]:
        """What each of its threads does, and how often it has begun to."""
        statuses = sorted(Path(f"/proc/{pid}/task").glob("*/status"))
        lines = [line for status in statuses for line in status.read_text().splitlines()]
        return [line for line in lines if line.startswith("State") or "ctxt_switches" in line]

    seen = [activity()]

    def has_settled() -> bool:
        seen.append(activity())
        return seen[-1] == seen[-2] and "State:\tR (running)" not in seen[-1]

    loop.run(until(has_settled))
    before = seen[-1]
    ours = time.process_time()
    while time.process_time() < ours + 0.3:
        pass
    assert activity() == before


def test_the_sockets_are_private(loop, client):
    directory = Path(client._supervisor._process._directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name for path in directory.iterdir()} == {"to-engine", "to-front"}


def test_a_full_queue_says_when_to_come_back(loop, directory):
    async def overload() -> None:
        async with running_client(directory, max_queued_requests=5, max_queued_tokens=100) as client:
            streams = [ask(client, [1, 2], greedy(3)) for _ in range(5)]
            with pytest.raises(Overloaded, match="5 requests are waiting") as error:
                ask(client, [1], greedy(3))
            assert 1 <= error.value.retry_after <= 60
            for stream in streams:
                await read(stream)
            long = ask(client, [3] * 400, greedy(1))  # alone it may be longer than the queue
            with pytest.raises(Overloaded, match="400 prompt tokens are waiting"):
                ask(client, [1], greedy(3))
            long.abort()
            assert client.num_waiting == 0
            await generate(client, [1, 2], greedy(3))

    asyncio.run(overload())


def test_ten_thousand_queued_requests_are_served_or_given_up(directory):
    async def queue() -> None:
        async with running_client(directory, max_queued_requests=10_000) as client:
            streams = [ask(client, [index % 500, 7], greedy(2)) for index in range(10_000)]
            with pytest.raises(Overloaded):
                ask(client, [1], greedy(2))
            for stream in streams[100:]:
                stream.abort()
            for stream in streams[:100]:
                [answer] = await read(stream)
                assert len(answer.token_ids) == 2

    asyncio.run(queue())


def test_draining_loses_nothing_and_takes_nothing(directory, llm):
    prompts = random_prompts(20)
    expected = [completion.outputs[0].token_ids for completion in llm.generate(prompts, greedy(30))]

    async def drain() -> None:
        async with running_client(directory, {"max_num_seqs": 4}) as client:
            client.observers.append(recorder := Recorder())
            streams = [ask(client, prompt, greedy(30)) for prompt in prompts]
            draining = asyncio.create_task(client.drain())
            await asyncio.sleep(0)
            assert client.is_ready()[0] is False
            with pytest.raises(NotReady, match="finishing its last requests") as error:
                ask(client, [1], greedy(1))
            assert error.value.retry_after > 0
            assert await draining
            assert recorder.states == ["draining"]
            assert [(await read(stream))[0].token_ids for stream in streams] == expected
            assert await client.drain()

    asyncio.run(drain())


def test_a_drain_that_takes_too_long_aborts_the_rest(directory):
    async def drain() -> None:
        async with running_client(directory) as client:
            streams = [ask(client, random_tokens(5, seed), LONG) for seed in range(3)]
            await anext(streams[0])
            assert not await client.drain(timeout=0)
            for stream in streams:
                [answer] = await read(stream)
                assert answer.finish_reason == "abort"

    asyncio.run(drain())


def test_stopping_leaves_no_process_and_no_file(directory):
    async def stop() -> tuple[int, str]:
        async with running_client(directory) as client:
            return client.info.pid, client._supervisor._process._directory

    pid, sockets = asyncio.run(stop())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not os.path.exists(sockets)
