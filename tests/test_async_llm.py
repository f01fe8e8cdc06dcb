"""`AsyncLLM`: outputs are those of `LLM`, in one batch; what is cancelled, aborted or closed holds up nothing."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from dispec import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from dispec.engine.api.shared_engine import SharedEngine
from tests.small_engine import OPTIONS, greedy, mixed_params, random_prompts
from tests.tiny_llm import directory as directory
from tests.tiny_llm import llm as llm

PATIENCE = 120  # seconds after which something counts as never coming


@pytest.fixture
def async_llm(directory: Path) -> Iterator[AsyncLLM]:
    made = AsyncLLM(directory, **OPTIONS)
    yield made
    made.close()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch off the type checks of the tests, which refuse wrong arguments before our checks do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def shared(llm: AsyncLLM) -> SharedEngine:
    return llm._thread.shared


async def settled(llm: AsyncLLM) -> None:
    """Wait for the commands given so far, and check that nothing is left in the engine."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def command(engine: SharedEngine) -> list[Any]:
        engine.engine.scheduler.check()
        left = (engine.engine.has_work, len(engine._places))
        loop.call_soon_threadsafe(done.set_result if left == (False, 0) else done.set_exception, *_result(left))
        return []

    llm._thread.submit(command)
    await asyncio.wait_for(done, PATIENCE)


def _result(left: tuple[bool, int]) -> tuple[Any]:
    return (None,) if left == (False, 0) else (AssertionError(f"left in the engine: {left}"),)


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    found = [output async for output in outputs]
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    return found[-1]


def run(main: Callable[[], Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(main(), PATIENCE)

    return asyncio.run(limited())


def test_requests_of_many_tasks_run_in_one_batch(async_llm: AsyncLLM, llm: LLM) -> None:
    prompts = random_prompts(12)
    params = [replace(one, n=1 + index % 3) for index, one in enumerate(mixed_params(12))]
    expected = llm.generate(prompts, params)

    async def main() -> list[RequestOutput]:
        calls = (last(async_llm.generate(prompt, one)) for prompt, one in zip(prompts, params, strict=True))
        found = await asyncio.gather(*calls)
        await settled(async_llm)
        return found

    for ours, other in zip(run(main), expected, strict=True):
        assert ours.prompt_token_ids == other.prompt_token_ids
        for output, wanted in zip(ours.outputs, other.outputs, strict=True):
            assert (output.token_ids, output.text, output.finish_reason) == (
                wanted.token_ids,
                wanted.text,
                wanted.finish_reason,
            )
            assert (output.logprobs is None) == (wanted.logprobs is None)
    assert max(record.num_sequences for record in shared(async_llm).engine.records) > 12


def test_the_three_kinds_of_outputs(async_llm: AsyncLLM, llm: LLM) -> None:
    (expected,) = llm.generate("the quick", greedy(12))

    async def read(kind: RequestOutputKind | None) -> list[RequestOutput]:
        return [one async for one in async_llm.generate("the quick", greedy(12, output_kind=kind), "mine")]

    wanted = expected.outputs[0]
    for kind in (None, RequestOutputKind.CUMULATIVE):
        found = run(lambda kind=kind: read(kind))
        for one in found:
            output = one.outputs[0]
            assert output.token_ids == wanted.token_ids[: len(output.token_ids)]
            assert wanted.text.startswith(output.text)
        assert (found[-1].outputs[0].token_ids, found[-1].outputs[0].text) == (wanted.token_ids, wanted.text)
    found = run(lambda: read(RequestOutputKind.DELTA))
    assert len(found) == 12
    assert [token for one in found for token in one.outputs[0].token_ids] == wanted.token_ids
    assert "".join(one.outputs[0].text for one in found) == wanted.text
    (only,) = run(lambda: read(RequestOutputKind.FINAL_ONLY))
    assert (only.request_id, only.prompt, only.outputs[0].token_ids) == ("mine", "the quick", wanted.token_ids)


def test_a_slow_reader_of_cumulative_outputs_skips_some(async_llm: AsyncLLM, llm: LLM) -> None:
    async def main() -> list[RequestOutput]:
        slow = async_llm.generate("the quick", greedy(5))
        found = [await anext(slow)]
        await last(async_llm.generate("Es war", greedy(40)))  # ends after the slow one's request
        return found + [one async for one in slow]

    found = run(main)
    assert len(found) == 2
    assert found[-1].outputs[0].token_ids == llm.generate("the quick", greedy(5))[0].outputs[0].token_ids


def test_chat(async_llm: AsyncLLM, llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (expected,) = llm.chat(messages, greedy(6))
    found = run(lambda: last(async_llm.chat(messages, greedy(6))))
    assert (found.prompt, found.prompt_token_ids) == (expected.prompt, expected.prompt_token_ids)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    bare = run(lambda: last(async_llm.chat(messages, greedy(6), add_generation_prompt=False)))
    assert bare.prompt_token_ids == llm.chat_prompt(messages, add_generation_prompt=False)
    assert bare.prompt_token_ids != found.prompt_token_ids
    with pytest.raises(ValueError, match=r"^chat has no enable_thinkin: did you mean chat_template_kwargs="):
        async_llm.chat(messages, enable_thinkin=True)


def test_what_leaves_early_is_aborted(async_llm: AsyncLLM, llm: LLM) -> None:
    """A cancelled task, a closed generator and a loop that is left; another request goes on."""
    (expected,) = llm.generate("the quick", greedy(60))

    async def main() -> RequestOutput:
        other = asyncio.create_task(last(async_llm.generate("the quick", greedy(60))))
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in async_llm.generate("Es war", greedy(400)):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        closed = async_llm.generate("Es war", greedy(400))
        await anext(closed)
        await closed.aclose()
        async for _ in async_llm.generate("Es war", greedy(400)):
            break
        gc.collect()
        found = await other
        await asyncio.sleep(0)  # the collected generator closes in a task of its own
        await settled(async_llm)
        return found

    assert run(main).outputs[0].token_ids == expected.outputs[0].token_ids


def test_abort_ends_a_request_with_what_it_has(async_llm: AsyncLLM, llm: LLM) -> None:
    (expected,) = llm.generate("the quick", greedy(400))

    async def main() -> list[RequestOutput]:
        found = []
        async for output in async_llm.generate("the quick", greedy(400, n=2), "mine"):
            if not found:
                await async_llm.abort(["mine", "unknown"])
            found.append(output)
        await settled(async_llm)
        return found

    end = run(main)[-1]
    assert end.finished
    assert end.outputs[0].token_ids
    for output in end.outputs:
        assert (output.finish_reason, output.stop_reason) == ("abort", None)
        assert len(output.token_ids) < 400
        assert output.token_ids == expected.outputs[0].token_ids[: len(output.token_ids)]


def test_a_refused_request_costs_the_others_nothing(async_llm: AsyncLLM, llm: LLM) -> None:
    (expected,) = llm.generate("the quick", greedy(30))

    async def main() -> RequestOutput:
        outputs = async_llm.generate("the quick", greedy(30), "mine")
        first = await anext(outputs)
        assert not first.finished
        with pytest.raises(ValueError, match=r"^request_id is 'mine', which another request has that still runs$"):
            await anext(async_llm.generate("Es war", greedy(3), "mine"))
        with pytest.raises(ValueError, match=r"^prompt holds token id 1000000"):
            await anext(async_llm.generate([10**6], greedy(3)))
        return await last(outputs)

    assert run(main).outputs[0].token_ids == expected.outputs[0].token_ids


def test_ids_of_callers_and_ids_made_here_do_not_meet(async_llm: AsyncLLM, llm: LLM) -> None:
    (expected,) = llm.generate("the quick", greedy(30))

    async def main() -> list[RequestOutput]:
        ids = [None if index % 3 == 2 else f"request-{index}" for index in range(9)]
        found = await asyncio.gather(*(last(async_llm.generate("the quick", greedy(30), one)) for one in ids))
        for output, one in zip(found, ids, strict=True):
            assert one in (None, output.request_id)
        return found

    found = run(main)
    assert len({output.request_id for output in found}) == 9
    assert all(output.outputs[0].token_ids == expected.outputs[0].token_ids for output in found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(["a", "b"]), "^prompt holds 2 prompts, generate of AsyncLLM takes one"),
        (lambda llm: llm.generate("a", params=3), r"^generate has no params: did you mean sampling_params\?$"),
        (lambda llm: llm.generate("a", max_tokens=3), r"did you mean sampling_params=SamplingParams\(max_tokens="),
        (lambda llm: AsyncLLM("x", max_seqs=3), r"^AsyncLLM has no max_seqs: did you mean max_num_seqs\?$"),
        (lambda llm: AsyncLLM("no such model"), "no such model"),
    ],
)
def test_wrong_arguments_are_named_at_once(
    async_llm: AsyncLLM, unchecked: None, call: Callable[[AsyncLLM], object], message: str
) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        call(async_llm)
    assert threading.active_count() == before


def test_an_engine_that_fails_tells_every_caller(
    async_llm: AsyncLLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of order")

    async def main() -> None:
        outputs = [async_llm.generate(prompt, greedy(50)) for prompt in random_prompts(3)]
        for one in outputs:
            await anext(one)
        with monkeypatch.context() as broken:
            broken.setattr(shared(async_llm).engine, "step", fail)
            for one in outputs:
                with pytest.raises(RuntimeError, match=r"^the engine failed: RuntimeError: out of order$"):
                    await last(one)
        await settled(async_llm)
        found = await last(async_llm.generate("the quick", greedy(4)))
        assert found.outputs[0].token_ids == llm.generate("the quick", greedy(4))[0].outputs[0].token_ids

    run(main)


def test_a_request_that_fails_alone_is_told_to_its_owner(
    async_llm: AsyncLLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = llm.generate([7, 7, 7], greedy(12))
    launch = shared(async_llm).engine.runner.launch

    def faulty(step: Any, *rest: Any) -> Any:
        if any(scheduled.sequence.token_ids[:2] == [1, 1] for scheduled in step.scheduled_sequences):
            raise ValueError("not this one")
        return launch(step, *rest)

    monkeypatch.setattr(shared(async_llm).engine.runner, "launch", faulty)

    async def main() -> RequestOutput:
        guilty = asyncio.create_task(last(async_llm.generate([1, 1], greedy(12))))
        found = await last(async_llm.generate([7, 7, 7], greedy(12)))
        with pytest.raises(RuntimeError, match=r"^the engine failed: ValueError: not this one$"):
            await guilty
        await settled(async_llm)
        return found

    assert run(main).outputs[0].token_ids == expected.outputs[0].token_ids


def test_several_event_loops(async_llm: AsyncLLM, llm: LLM) -> None:
    prompts = random_prompts(4)
    expected = [one.outputs[0].token_ids for one in llm.generate(prompts, greedy(20))]

    def answer(prompt: list[int]) -> list[int]:
        return run(lambda: last(async_llm.generate(prompt, greedy(20)))).outputs[0].token_ids

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, prompts)) == expected


def test_close_ends_what_runs_and_refuses_more(directory: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(directory, **OPTIONS) as llm:
            assert (await llm.get_tokenizer()) is llm.tokenizer
            half_read = llm.generate("the quick", greedy(400))
            await anext(half_read)
            without_news = greedy(400, output_kind=RequestOutputKind.FINAL_ONLY)
            waiting = asyncio.create_task(last(llm.generate("the quick", without_news)))
            await last(llm.generate("Es war", greedy(4)))  # that one has begun
        with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
            await waiting
        with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
            await last(half_read)
        with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
            await last(llm.generate("the quick", greedy(4)))
        llm.close()
        llm.shutdown()

    run(main)


def test_one_that_is_collected_ends_its_thread(directory: Path) -> None:
    llm = AsyncLLM(directory, **OPTIONS)
    thread = next(one for one in threading.enumerate() if one.name == "dispec-engine" and one.is_alive())
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


SCRIPT = """
import asyncio, sys
from dispec import AsyncLLM, SamplingParams
from tests.small_engine import OPTIONS

llm = AsyncLLM(sys.argv[1], **OPTIONS)

async def main():
    async for output in llm.generate("the quick", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)):
        pass
    print(output.finished)

asyncio.run(main())
"""


def test_a_program_that_does_not_close_it_ends(directory: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (found.returncode, found.stdout) == (0, "True\n"), found.stderr


def test_a_kind_of_another_type_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"^output_kind is 3, must be a RequestOutputKind$"):
        SamplingParams(**{"output_kind": 3})
