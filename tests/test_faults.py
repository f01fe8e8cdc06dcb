"""What becomes of requests when the engine process is killed, stopped, broken, starved, or left alone."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.client import engine_process
from dispec.serving.client.engine_supervisor import RestartPolicy
from dispec.serving.client.errors import EngineDied, EngineFailed, NotReady
from tests import faulty_service
from tests.checkpoints import save_tiny
from tests.commands import ROOT
from tests.engine_clients import Recorder, ask, generate, new_client, read, running_client, until
from tests.engine_clients import directory as directory
from tests.engine_clients import llm as llm
from tests.engine_clients import one_thread_each as one_thread_each
from tests.small_engine import BLOCK_SIZE, OPTIONS, greedy, mixed_params, random_prompts, random_tokens

LONG = greedy(400)


@pytest.fixture
def faulty_engine(monkeypatch):
    monkeypatch.setattr(engine_process, "_ENGINE_MODULE", "tests.faulty_service")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def has_gone(pid: int) -> bool:
    """Whether a process has ended, its exit code read or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def expect_death(streams, match: str) -> None:
    for stream in streams:
        with pytest.raises(EngineDied, match=match) as error:
            await read(stream)
        assert error.value.hint


def test_killing_the_engine_fails_what_is_under_way_and_restarts_it(directory, llm, caplog):
    prompt = random_tokens(9)
    expected = llm.generate([prompt], greedy(8))[0].outputs[0].token_ids

    async def kill_twice() -> None:
        async with running_client(directory, restarts=RestartPolicy(max_restarts=1)) as client:
            client.observers.append(recorder := Recorder())
            first_pid = client.info.pid
            streams = [ask(client, random_tokens(5, seed), replace(LONG, n=2)) for seed in range(3)]
            queued = ask(client, prompt, LONG)
            await anext(streams[0])
            os.kill(first_pid, signal.SIGKILL)
            await expect_death([*streams, queued], "SIGKILL")
            assert client.state == "restarting"
            assert client.is_ready()[0] is False
            assert client.load == 0
            with pytest.raises(NotReady, match="being restarted"):
                ask(client, prompt, LONG)
            with pytest.raises(NotReady):
                await client.inspect()
            assert {tuple(stream.finish_reasons) for stream in recorder.finished} == {("error", "error"), ("error",)}
            await until(lambda: client.state == "ready")
            assert client.is_ready() == (True, "ready")
            assert client.info.pid != first_pid
            assert (await generate(client, prompt, greedy(8)))[0].token_ids == expected
            stream = ask(client, prompt, LONG)
            await anext(stream)
            os.kill(client.info.pid, signal.SIGKILL)
            await expect_death([stream], "SIGKILL")
            assert client.state == "dead"
            assert recorder.states == ["restarting", "ready", "dead"]
            with pytest.raises(NotReady, match="dead"):
                ask(client, prompt, LONG)
            assert await client.drain()

    with caplog.at_level(logging.WARNING):
        asyncio.run(kill_twice())
    told = [record.getMessage() for record in caplog.records]
    assert any("the engine died" in line and "(restart 1 of 1)" in line for line in told)
    assert any("after 1 restarts in a row it stays dead" in line for line in told)


def test_an_engine_that_lived_long_after_a_restart_is_restarted_again(directory):
    async def kill_thrice() -> None:
        async with running_client(directory, restarts=RestartPolicy(max_restarts=1, healthy_seconds=0)) as client:
            for _ in range(2):
                pid = client.info.pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda: client.state == "restarting")
                await until(lambda: client.state == "ready")
                assert client.info.pid != pid
                await generate(client, [1, 2], greedy(2))

    asyncio.run(kill_thrice())


def test_dying_while_draining_is_the_end(directory):
    async def kill() -> None:
        async with running_client(directory) as client:
            stream = ask(client, random_tokens(5), LONG)
            await anext(stream)
            draining = asyncio.create_task(client.drain())
            await asyncio.sleep(0)
            os.kill(client.info.pid, signal.SIGKILL)
            assert await draining
            await expect_death([stream], "SIGKILL")
            assert client.state == "dead"

    asyncio.run(kill())


def test_an_engine_that_stands_still_is_not_ready_until_it_moves_again(directory):
    async def stop_and_continue() -> None:
        async with running_client(directory, stall_seconds=0.3) as client:
            pid = client.info.pid
            stream, other = (ask(client, random_tokens(5, seed), LONG) for seed in range(2))
            await anext(stream)
            os.kill(pid, signal.SIGSTOP)
            try:
                await until(lambda: not client.is_ready()[0])
                assert "has not ended a step" in client.is_ready()[1]
                stream.abort()
                other.abort()
                assert client.load == 0
                # No client waits for an answer any more, but the engine is still stopped.
                await until(lambda: not client.is_ready()[0])
                assert client.state == "ready"
            finally:
                os.kill(pid, signal.SIGCONT)
            await until(lambda: client.is_ready()[0])
            await generate(client, [1, 2], greedy(2))

    asyncio.run(stop_and_continue())


def test_an_idle_engine_is_ready_however_long_nothing_happens(directory):
    async def idle() -> None:
        async with running_client(directory, stall_seconds=0) as client:
            assert client.is_ready()[0]
            await generate(client, [1, 2], greedy(2))
            assert client.is_ready()[0]

    asyncio.run(idle())


def test_stopping_does_not_wait_for_an_engine_that_stands_still(directory):
    async def stop() -> None:
        client = new_client(directory)
        await client.start()
        stream = ask(client, random_tokens(5), LONG)
        await anext(stream)
        os.kill(client.info.pid, signal.SIGSTOP)
        await client.stop()
        assert has_gone(client.info.pid)
        await expect_stop(stream)

    async def expect_stop(stream) -> None:
        with pytest.raises(EngineDied, match="the server is stopping"):
            await read(stream)

    asyncio.run(stop())


def test_a_keyboard_interrupt_is_not_for_the_engine(directory):
    async def interrupt() -> None:
        async with running_client(directory) as client:
            stream = ask(client, random_tokens(5), greedy(50))
            await anext(stream)
            os.kill(client.info.pid, signal.SIGINT)
            [answer] = await read(stream)
            assert answer.finish_reason == "length"
            assert os.getsid(client.info.pid) != os.getsid(0)

    asyncio.run(interrupt())


def broken_config(directory: Path, tmp_path: Path) -> Path:
    save_tiny(tmp_path / "broken", "llama")
    (tmp_path / "broken/config.json").write_text("{nothing")
    return tmp_path / "broken"


def unknown_architecture(directory: Path, tmp_path: Path) -> Path:
    save_tiny(tmp_path / "other", "llama")
    config = tmp_path / "other/config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("model", "options", "error", "message", "hint"),
    [
        (lambda *_: Path("/nowhere"), {}, "CheckpointError", "/nowhere", "give a model directory"),
        (broken_config, {}, "CheckpointError", "config.json", "give a model directory"),
        (unknown_architecture, {}, "UnsupportedModelError|CheckpointError", "MambaForCausalLM", "model"),
        (lambda directory, _: directory, {"max_num_seqs": 0}, "InvalidField", "max_num_seqs is 0", "--help"),
        (lambda directory, _: directory, {"kv_cache_memory": 1}, "ValueError", "kv_cache_memory", "--help"),
        (lambda directory, _: directory, {"surprise": 1}, "ValueError", "surprise", "--help"),
    ],
)
def test_an_engine_that_cannot_start_says_why(directory, tmp_path, model, options, error, message, hint):
    async def start() -> None:
        client = new_client(model(directory, tmp_path), options)
        client.observers.append(recorder := Recorder())
        with pytest.raises(EngineDied) as died:
            await client.start()
        assert died.value.error in error.split("|")
        assert message in died.value.message
        assert hint in died.value.hint
        assert all(part in str(died.value) for part in (died.value.error, died.value.message, died.value.hint))
        assert recorder.states == ["dead"]
        with pytest.raises(NotReady):
            ask(client, [1], greedy(1))
        await client.stop()

    asyncio.run(start())


def test_an_engine_killed_while_it_loads(directory):
    async def start() -> None:
        client = new_client(directory)
        starting = asyncio.create_task(client.start())
        await until(lambda: client._supervisor._process is not None)
        assert client.is_ready() == (False, "the model is being loaded")
        os.kill(client._supervisor._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="SIGKILL"):
            await starting
        assert client.state == "dead"

    asyncio.run(start())


def test_a_tokenizer_that_cannot_be_read_ends_the_start(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "model/tokenizer.json").write_text("{}")

    async def start() -> None:
        client = new_client(tmp_path / "model")
        with pytest.raises(EngineDied, match=r"tokenizer\.json"):
            await client.start()
        assert client.state == "dead"
        assert client._supervisor._process is None

    asyncio.run(start())


def test_too_little_memory_under_load_loses_nothing(directory, llm):
    block_bytes = 2 * 3 * 3 * 16 * BLOCK_SIZE * 4
    tiny = {"kv_cache_memory": 14 * block_bytes, "max_num_seqs": 8, "max_num_batched_tokens": 32}
    prompts = random_prompts(40, 60)
    params = [replace(each, n=1 + index % 3) for index, each in enumerate(mixed_params(40, max_tokens=50))]
    expected = llm.generate(prompts, params)

    async def starve() -> list:
        async with running_client(directory, tiny) as client:
            client.observers.append(recorder := Recorder())
            requests = zip(prompts, params, strict=True)
            answers = await asyncio.gather(*(generate(client, prompt, param) for prompt, param in requests))
            assert sum(record.num_preempted for record in recorder.records) > 5
            too_long = ask(client, random_tokens(10), greedy(2000))
            assert (await read(too_long))[0].finish_reason == "length"
            return answers

    for completion, answers in zip(expected, asyncio.run(starve()), strict=True):
        assert [answer.token_ids for answer in answers] == [choice.token_ids for choice in completion.outputs]


def test_an_error_in_the_engine_fails_the_request_that_caused_it(directory, llm, faulty_engine):
    prompts = random_prompts(6)
    expected = [completion.outputs[0].token_ids for completion in llm.generate(prompts, greedy(20))]

    async def fail() -> None:
        async with running_client(directory) as client:
            client.observers.append(recorder := Recorder())
            guilty = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, seed=faulty_service.FAILS_ALONE, n=2)
            streams = [ask(client, prompt, greedy(20)) for prompt in prompts]
            failing = ask(client, random_tokens(7), guilty)
            with pytest.raises(EngineFailed, match="RuntimeError: this one cannot be computed"):
                await read(failing)
            assert [(await read(stream))[0].token_ids for stream in streams] == expected
            assert client.state == "ready"
            [failed] = [stream for stream in recorder.finished if stream.error]
            assert failed.finish_reasons == ["error", "error"]
            assert failed.num_output_tokens >= 3

    asyncio.run(fail())


@pytest.mark.parametrize(
    ("seed", "match", "hint"),
    [
        (faulty_service.FAILS_FOR_ALL, "RuntimeError: CUDA error: an illegal memory access", "GPU"),
        (faulty_service.CRASHES, "SIGSEGV", "log"),
    ],
)
def test_an_engine_that_breaks_down_says_so_and_comes_back(directory, faulty_engine, seed, match, hint):
    async def break_down() -> None:
        async with running_client(directory) as client:
            streams = [ask(client, random_tokens(5, index), LONG) for index in range(3)]
            streams.append(ask(client, random_tokens(7), replace(LONG, seed=seed)))
            for stream in streams:
                with pytest.raises(EngineDied, match=match) as died:
                    await read(stream)
                assert hint in died.value.hint
            await until(lambda: client.state == "ready")
            await generate(client, [1, 2], greedy(5))

    asyncio.run(break_down())


_FRONT = """
import asyncio, sys
from pathlib import Path
from tests.engine_clients import ask, new_client
from tests.small_engine import greedy

async def main(directory: str, phase: str) -> None:
    client = new_client(Path(directory))
    starting = asyncio.create_task(client.start())
    while client._supervisor._process is None:
        await asyncio.sleep(0)
    print(client._supervisor._process.pid, client._supervisor._process._directory, flush=True)
    if phase != "loading":
        await starting
    if phase == "busy":
        streams = [ask(client, [1, 2, index], greedy(400)) for index in range(64)]
        await anext(streams[-1])
    print("now", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("phase", ["loading", "idle", "busy"])
def test_the_engine_does_not_outlive_the_front(directory, phase):
    front = subprocess.Popen(
        [sys.executable, "-c", _FRONT, str(directory), phase], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        pid, sockets = front.stdout.readline().split()
        assert front.stdout.readline() == "now\n"
        assert not has_gone(int(pid))
    finally:
        front.kill()
        front.wait()
        front.stdout.close()
    asyncio.run(until(lambda: has_gone(int(pid)) and not os.path.exists(sockets)))


def test_an_engine_directory_in_the_working_directory_is_not_ours(directory, tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)

    async def start() -> None:
        async with running_client(directory) as client:
            await generate(client, [1], greedy(1))

    asyncio.run(start())


def test_options_are_those_of_the_engine(directory):
    async def start() -> None:
        async with running_client(directory, {"max_model_len": 100, "block_size": 32}) as client:
            info = client.info
            assert (info.max_model_len, info.block_size, info.dtype) == (100, 32, OPTIONS["dtype"])
            assert info.num_blocks * info.block_size >= 100
            assert (info.directory, info.is_compiled, info.vocab_size) == (str(directory), False, 512)
            assert {"import", "load"} <= set(info.phase_seconds)

    asyncio.run(start())
