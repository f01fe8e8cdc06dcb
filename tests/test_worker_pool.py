"""A pool with prefill and decode workers answers as one process does, also when workers die or are added."""

import asyncio
import fcntl
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.client.engine_supervisor import RestartPolicy
from dispec.serving.client.errors import EngineDied, InvalidRequest, NotReady
from dispec.serving.cluster import worker_pool
from dispec.serving.cluster.autoscaler import Autoscaler
from dispec.serving.cluster.autoscaling import Observation, ScalingLimits
from dispec.serving.cluster.worker import ROLES
from dispec.serving.cluster.worker_pool import WorkerPool
from tests.engine_clients import (
    Recorder,
    ask,
    assert_empty,
    assert_same,
    generate,
    many_requests,
    read,
    until,
)
from tests.engine_clients import directory as directory
from tests.engine_clients import llm as llm
from tests.engine_clients import one_thread_each as one_thread_each
from tests.small_engine import OPTIONS, greedy, make, random_prompts, random_tokens

SMALL_STEPS = {"max_num_seqs": 16, "max_num_batched_tokens": 32}  # so that there is something to interrupt


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@asynccontextmanager
async def running_pool(
    directory: Path, engine: dict[str, Any] | None = None, restarts: RestartPolicy | None = None, **counts: int
) -> AsyncIterator[WorkerPool]:
    """Run a pool, and check that the test left no requests or blocks in it."""
    options = OPTIONS | {"model": str(directory), "kv_transfer_lease": 2.0} | (engine or {})
    limits = {"max_queued_requests": 1000, "max_queued_tokens": 1_000_000, "stall_seconds": 60.0, "restarts": restarts}
    pool = WorkerPool(options, **{"num_prefill": 1, "num_decode": 1} | counts, **limits)
    try:
        await pool.start()
        yield pool
        await until_empty(pool)
        assert (pool.load, pool.num_running, pool.num_waiting) == (0, 0, 0)
    finally:
        await pool.stop()


async def until_empty(pool: WorkerPool) -> None:
    """Wait until no request and no block is left: blocks are freed when the receiver has read them."""
    while (await pool.inspect()).num_used_blocks or pool.load:
        await asyncio.sleep(0.01)
    assert_empty(await pool.inspect())


@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
def test_64_concurrent_requests_are_answered_as_in_one_process(loop, directory, llm, transport):
    if transport == "nixl":
        pytest.importorskip("nixl_cu12")
    requests = many_requests(llm)
    expected = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])

    async def all_at_once():
        engine = SMALL_STEPS | {"kv_transfer": transport}
        async with running_pool(directory, engine) as pool:
            recorder = Recorder()
            pool.observers.append(recorder)
            answers = await asyncio.gather(*(generate(pool, prompt, params) for prompt, params in requests))
            return answers, recorder

    answers, recorder = loop.run(all_at_once())
    reasons = assert_same(expected, answers)
    assert reasons >= {("length", type(None)), ("stop", str), ("stop", int)}
    assert len(recorder.finished) == len(recorder.firsts) == 64
    for stream in recorder.finished:
        assert stream.error is None
        assert stream.timing.first_token <= stream.timing.finished
    tokens = sum(len(answer.token_ids) for each in answers for answer in each)
    assert sum(stream.num_output_tokens for stream in recorder.finished) == tokens
    # The prompts were computed once: what moved was not computed again.
    prompts = sum(len(prompt) for prompt, _ in requests)
    assert sum(record.num_prompt_tokens for record in recorder.records) <= prompts + 64 * 4


def test_workers_with_a_quantised_cache(loop, directory):
    prompts, params = random_prompts(8), greedy(12)
    llm = make(directory, kv_cache_dtype="fp8")
    expected = [each.outputs[0].token_ids for each in llm.generate(prompts, params)]

    async def all_at_once():
        async with running_pool(directory, {"kv_cache_dtype": "fp8"}) as pool:
            recorder = Recorder()
            pool.observers.append(recorder)
            return await asyncio.gather(*(generate(pool, prompt, params) for prompt in prompts)), recorder

    answers, recorder = loop.run(all_at_once())
    # A rounding error of float32 may move a code to its neighbour, which may change a sequence's tokens.
    assert sum(own[0].token_ids != tokens for own, tokens in zip(answers, expected, strict=True)) <= 1
    assert sum(record.num_prompt_tokens for record in recorder.records) <= sum(map(len, prompts))


def test_prefill_steps_hold_the_lock_that_decode_workers_look_at(loop, directory, llm):
    prompt, params = random_prompts(1)[0], greedy(6)
    expected = llm.generate([prompt], params)[0].outputs[0].token_ids

    def waits_for_a_lock(pid: int) -> bool:
        lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        return any(words[1] == "->" and words[2] == "FLOCK" and words[5] == str(pid) for words in lines)

    async def with_the_lock_taken():
        async with running_pool(directory) as pool:
            pids = [worker.client.info.pid for worker in pool.workers]
            opened = [{path.resolve() for path in Path(f"/proc/{pid}/fd").iterdir()} for pid in pids]
            path = next(path for path in set.intersection(*opened) if path.name == "cores")
            with path.open() as cores:
                fcntl.flock(cores, fcntl.LOCK_EX)
                answering = asyncio.create_task(generate(pool, prompt, params))
                await until(lambda: waits_for_a_lock(pids[0]))
            return (await answering)[0].token_ids

    assert loop.run(with_the_lock_taken()) == expected


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_is_killed_costs_no_request(loop, directory, llm, role):
    prompts = random_prompts(24) + [random_tokens(300, seed) for seed in range(4)]
    params = [
        SamplingParams(temperature=index % 2, seed=index, max_tokens=60, ignore_eos=True, logprobs=0)
        for index in range(28)
    ]
    expected = llm.generate(prompts, params)

    async def with_a_killing():
        async with running_pool(directory, SMALL_STEPS) as pool:
            streams = [ask(pool, prompt, param) for prompt, param in zip(prompts, params, strict=True)]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: sum(stream.timing.first_token is not None for stream in streams) >= 6)
            victim = next(worker for worker in pool.workers if worker.role == role)
            os.kill(victim.client.info.pid, signal.SIGKILL)
            answers = await asyncio.gather(*reading)
            await until(lambda: victim.client.state == "ready")
            again = await generate(pool, prompts[3], params[3])
            return answers, again

    answers, again = loop.run(with_a_killing())
    assert_same(expected, answers)
    assert_same(expected[3:4], [again])


def test_a_request_fails_when_all_workers_are_dead(loop, directory):
    async def kill_all():
        async with running_pool(directory) as pool:
            stream = ask(pool, random_tokens(20), greedy(400))
            await until(lambda: stream.timing.first_token is not None)
            for worker in pool.workers:
                os.kill(worker.client.info.pid, signal.SIGKILL)
            with pytest.raises(EngineDied):
                await read(stream)
            await until(lambda: pool.is_ready()[0])
            assert len((await generate(pool, [1, 2, 3], greedy(4)))[0].token_ids) == 4

    loop.run(kill_all())


def test_aborted_requests_leave_nothing(loop, directory):
    async def give_up():
        rng = random.Random(1)
        async with running_pool(directory, SMALL_STEPS, num_prefill=2, num_decode=2) as pool:
            streams = [
                ask(pool, prompt, greedy(200, n=1 + index % 3)) for index, prompt in enumerate(random_prompts(40))
            ]
            for stream in streams:
                for _ in range(rng.randint(0, 8)):
                    await asyncio.sleep(0)
                if rng.random() < 0.7:
                    stream.abort()
            kept = [stream for stream in streams if not stream.has_ended]
            for stream in kept[:-3]:
                await until(lambda stream=stream: stream.timing.first_token is not None)
                stream.abort()
            for stream in kept[-3:]:
                assert all(len(answer.token_ids) == 200 for answer in await read(stream))

    loop.run(give_up())


def test_the_pool_rejects_what_one_engine_rejects(loop, directory):
    async def refuse():
        async with running_pool(directory) as pool:
            with pytest.raises(InvalidRequest, match="must be between 0"):
                await generate(pool, [10**9 // 2], greedy(4))
            with pytest.raises(InvalidRequest, match="max_model_len"):
                await generate(pool, [1] * 100_000, greedy(4))
            assert len((await generate(pool, [1, 2, 3], greedy(1)))[0].token_ids) == 1
            longest = pool.info.max_model_len - 1
            (answer,) = await generate(pool, random_tokens(longest), greedy(50))
            assert (len(answer.token_ids), answer.finish_reason) == (1, "length")

    loop.run(refuse())


def test_a_pool_grows_and_shrinks_under_load_without_losing_requests(loop, directory, llm):
    prompts = random_prompts(30, longest=60)
    expected = llm.generate(prompts, greedy(80))

    async def scale():
        async with running_pool(directory, SMALL_STEPS) as pool:
            scaler = Autoscaler(
                pool, ScalingLimits(least=1, most=2, cool_down=0.001, grow_seconds=0.0, shrink_seconds=0.0)
            )
            streams = [ask(pool, prompt, greedy(80)) for prompt in prompts[:15]]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            busy, idle = Observation(100, 16, 16, 0.5), Observation(0, 0, 16, 0.0)
            for role in ROLES:
                scaler.act(role, busy, 1.0)
                assert pool.num_desired(role) == 2
            await until(lambda: all(pool.num_ready(role) == 2 for role in ROLES))
            streams = [ask(pool, prompt, greedy(80)) for prompt in prompts[15:]]
            reading += [asyncio.create_task(read(stream)) for stream in streams]
            await until(lambda: all(worker.client.load for worker in pool.workers))
            for role in ROLES:
                scaler.act(role, idle, 2.0)
                assert pool.num_desired(role) == 1
            assert len(pool.workers) == 4, "an engine was stopped with work to do"
            answers = await asyncio.gather(*reading)
            await until(lambda: len(pool.workers) == 2)
            return answers

    assert_same(expected, loop.run(scale()))


def test_a_pool_observes_its_load(loop, directory):
    async def look():
        async with running_pool(directory, SMALL_STEPS) as pool:
            streams = [ask(pool, random_tokens(200, seed), greedy(150)) for seed in range(3)]
            seen = pool.observe("prefill")
            assert (seen.queued, seen.running) == (600, 0)
            await until(lambda: all(stream.timing.first_token is not None for stream in streams))
            await until(lambda: pool.observe("decode").running == 3)
            seen = pool.observe("decode")
            assert (seen.queued, seen.capacity) == (0, 16)
            assert 0 < seen.kv_usage < 1
            assert pool.observe("prefill").capacity > 1
            for stream in streams:
                stream.abort()

    loop.run(look())


def test_an_engine_that_keeps_dying_is_replaced(loop, directory, monkeypatch):
    monkeypatch.setattr(worker_pool, "REPLACE_SECONDS", 0.01)

    async def kill_again_and_again():
        async with running_pool(directory, restarts=RestartPolicy(max_restarts=1)) as pool:
            first = next(worker for worker in pool.workers if worker.role == "decode")
            for _ in range(2):  # the second time it is not started again
                await until(lambda: first.client.state == "ready")
                os.kill(first.client.info.pid, signal.SIGKILL)
                await until(lambda: first.client.state != "ready")
            await until(lambda: first not in pool.workers and pool.num_ready("decode") == 1)
            assert pool.num_ready("prefill") == 1
            assert len((await generate(pool, [1, 2, 3], greedy(4)))[0].token_ids) == 4

    loop.run(kill_again_and_again())


def test_a_pool_without_living_engines_is_dead(loop, directory, monkeypatch):
    monkeypatch.setattr(worker_pool, "REPLACE_SECONDS", 1000.0)

    async def kill_one_after_the_other():
        async with running_pool(directory, restarts=RestartPolicy(max_restarts=0)) as pool:
            pool.observers.append(recorder := Recorder())
            first, second = pool.workers
            os.kill(first.client.info.pid, signal.SIGKILL)
            await until(lambda: first.client.state == "dead")
            assert pool.is_ready()[0]
            assert len((await generate(pool, [1, 2, 3], greedy(4)))[0].token_ids) == 4
            assert recorder.states == []
            os.kill(second.client.info.pid, signal.SIGKILL)
            await until(lambda: pool.state == "dead")
            assert recorder.states == ["dead"]

    with pytest.raises(NotReady):  # from the check for left-over requests: no engine is ready
        loop.run(kill_one_after_the_other())
