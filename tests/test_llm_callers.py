"""Several callers of one `LLM`: iterators read in turns, threads, and what is dropped half-read."""

import ctypes
import gc
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.engine.api.fair_lock import FairLock
from dispec.engine.api.interrupts import deferred_interrupt
from tests.checkpoints import save_tiny
from tests.small_engine import alone, greedy, make, mixed_params, random_prompts, random_tokens, tokens_of

PATIENCE = 120  # seconds, after which a thread is taken to wait for ever


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    save_tiny(path, "qwen3")
    return path


@pytest.fixture
def llm(directory) -> LLM:
    return make(directory)


def is_idle(llm: LLM) -> bool:
    llm.engine.scheduler.check()
    pool = llm.engine.scheduler.pool
    return not llm.engine.has_work and pool.num_free == pool.num_usable and not llm._shared._places


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_streams_read_in_turns_each_get_their_own(llm):
    prompts, params = random_prompts(3), [greedy(20), *mixed_params(5)[1:3]]
    expected = alone(llm, prompts, params)
    streams = [llm.stream(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    found: list[list[int]] = [[] for _ in streams]
    texts = [""] * len(streams)
    while not all(len(tokens) == 20 for tokens in found):
        for index, stream in enumerate(streams):
            piece = next(stream)
            found[index] += piece.outputs[0].token_ids
            texts[index] += piece.outputs[0].text
            last = piece
    assert found == expected
    assert texts == [llm.tokenizer.decode(tokens) for tokens in expected]
    assert last.finished
    assert [next(stream, None) for stream in streams] == [None] * 3
    assert is_idle(llm)


def test_answers_inside_a_half_read_stream(llm):
    prompt, others = random_tokens(20), random_prompts(4)
    (expected,) = alone(llm, [prompt], greedy(30))
    expected_others = alone(llm, others, greedy(12))
    stream = llm.stream(prompt, greedy(30))
    tokens = [next(stream).outputs[0].token_ids[0] for _ in range(3)]
    assert [one.outputs[0].token_ids for one in llm.generate(others, greedy(12))] == expected_others
    tokens += next(stream).outputs[0].token_ids
    assert (
        llm.generate(others[0], greedy(40))[0].outputs[0].token_ids[:12] == expected_others[0]
    )  # ends after the stream's
    tokens += tokens_of(stream)
    assert tokens == expected
    assert is_idle(llm)


def test_a_stop_string_and_the_several_choices_of_a_stream_that_another_call_steps(llm):
    whole = llm.generate("the quick", greedy(40))[0].outputs[0].text
    stop = whole[len(whole) // 2 :][:4]
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=15, ignore_eos=True)
    expected = [llm.generate("the quick", one)[0] for one in (greedy(40, stop=(stop,)), params)]
    streams = [llm.stream("the quick", one) for one in (greedy(40, stop=(stop,)), params)]
    begun = [next(stream) for stream in streams]
    llm.generate("Es war", greedy(60))
    for stream, first, complete in zip(streams, begun, expected, strict=True):
        pieces = [first, *stream]
        assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        for index, choice in enumerate(complete.outputs):
            own = [output for piece in pieces for output in piece.outputs if output.index == index]
            assert [token for piece in own for token in piece.token_ids] == choice.token_ids
            assert "".join(piece.text for piece in own) == choice.text
            assert own[-1].finish_reason == choice.finish_reason
    assert is_idle(llm)


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"speculative_model": "ngram"}])
def test_threads_that_generate_stream_and_chat(directory, options):
    llm = make(directory, **options)
    prompts, params = random_prompts(12), mixed_params(12)
    expected = alone(llm, prompts, params)
    question = [{"role": "user", "content": "hi"}]
    answer = llm.chat(question, greedy(20))[0].outputs[0].token_ids

    def generate(index: int) -> bool:
        return llm.generate(prompts[index], params[index])[0].outputs[0].token_ids == expected[index]

    def generate_all(_: int) -> bool:
        return [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)] == expected

    def stream(index: int) -> bool:
        return tokens_of(llm.stream(prompts[index], params[index])) == expected[index]

    def chat(_: int) -> bool:
        return llm.chat(question, greedy(20))[0].outputs[0].token_ids == answer

    def leave(index: int) -> bool:
        pieces = llm.stream(prompts[index], params[index])
        got = [next(pieces).outputs[0].token_ids[0] for _ in range(3)]
        pieces.close()
        return got == expected[index][:3]

    with ThreadPoolExecutor(4) as pool:
        work = [generate, stream, leave, generate_all, chat] * 4
        found = [pool.submit(do, index % 12) for index, do in enumerate(work)]
        assert all(future.result(PATIENCE) for future in found)
    assert is_idle(llm)


def test_a_half_read_stream_of_one_thread_holds_up_no_other(llm):
    prompts = random_prompts(2)
    expected = alone(llm, prompts, greedy(25))
    begun, answered = threading.Event(), threading.Event()
    tokens: list[int | None] = []

    def read() -> None:
        stream = llm.stream(prompts[0], greedy(25))
        tokens.extend(next(stream).outputs[0].token_ids)
        begun.set()
        answered.wait(PATIENCE)
        tokens.extend(tokens_of(stream))

    reader = in_thread(read)
    assert begun.wait(PATIENCE)
    assert llm.generate(prompts[1], greedy(25))[0].outputs[0].token_ids == expected[1]
    answered.set()
    reader.join(PATIENCE)
    assert tokens == expected[0]


def test_a_stream_may_be_read_by_another_thread_than_began_it(llm):
    (expected,) = alone(llm, [[5, 6, 7]], greedy(10))
    stream = llm.stream([5, 6, 7], greedy(10))
    tokens = next(stream).outputs[0].token_ids
    in_thread(lambda: tokens.extend(tokens_of(stream))).join(PATIENCE)
    assert tokens == expected


def test_a_prompt_that_is_refused_costs_other_callers_nothing(llm):
    (expected,) = alone(llm, [[5, 6, 7]], greedy(10))
    stream = llm.stream([5, 6, 7], greedy(10))
    tokens = next(stream).outputs[0].token_ids
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt holds token id"):
        llm.generate([[1], [10**6]], greedy(4))
    assert len(llm._shared._places) == 1
    tokens += tokens_of(stream)
    assert tokens == expected


def test_a_stream_that_is_collected_amid_a_step_is_aborted_after_it(llm, monkeypatch):
    """The collector runs at any allocation, also in the thread that holds the engine."""
    step = llm.engine.step
    stream = llm.stream([9, 8], greedy(50))
    cycle: list = [stream]
    cycle.append(cycle)
    next(stream)
    del stream, cycle

    def step_and_collect(**_) -> list:
        gc.collect()
        return step()

    monkeypatch.setattr(llm.engine, "step", step_and_collect)
    done = []
    caller = in_thread(lambda: done.extend(llm.generate([1, 2], greedy(6))))
    caller.join(PATIENCE)
    assert len(done) == 1
    assert len(done[0].outputs[0].token_ids) == 6
    assert is_idle(llm)


def test_an_engine_that_fails_tells_each_caller(llm, monkeypatch):
    streams = [llm.stream([index + 1], greedy(9)) for index in range(2)]
    for stream in streams:
        next(stream)

    def fail(**_) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as broken:
        broken.setattr(llm.engine, "step", fail)
        for stream in streams:
            with pytest.raises(RuntimeError, match=r"^out of order$"):
                list(stream)
    assert is_idle(llm)
    assert len(llm.generate([3], greedy(4))[0].outputs[0].token_ids) == 4


def test_a_request_that_fails_alone_is_told_to_its_owner(llm, monkeypatch):
    """Also if another caller runs the step, and all others get their answers."""
    (expected,) = alone(llm, [[7, 7, 7]], greedy(12))
    launch = llm.engine.runner.launch
    guilty = llm.stream([1, 1], greedy(12))
    next(guilty)

    def faulty(step, *rest):
        if any(scheduled.sequence.token_ids[:2] == [1, 1] for scheduled in step.scheduled_sequences):
            raise ValueError("not this one")
        return launch(step, *rest)

    monkeypatch.setattr(llm.engine.runner, "launch", faulty)
    assert llm.generate([7, 7, 7], greedy(12))[0].outputs[0].token_ids == expected
    with pytest.raises(RuntimeError, match="the engine failed: ValueError: not this one"):
        list(guilty)
    assert is_idle(llm)


def test_a_request_that_was_ended_behind_the_back_does_not_spin(llm):
    stream = llm.stream([1, 2], greedy(12))
    next(stream)
    for sequence in list(llm.engine.scheduler.running):
        llm.engine.abort(sequence)
    with pytest.raises(RuntimeError, match="ended by something other than this LLM"):
        list(stream)


def test_another_thread_computes_with_as_many_threads(llm, monkeypatch):
    """OpenMP keeps the number for each thread. Ranks of one machine share its cores by it."""
    loaded = Path("/proc/self/maps")
    runtime = re.search(r"/\S*libgomp\S*", loaded.read_text()) if loaded.exists() else None
    if runtime is None:
        pytest.skip("torch does not use libgomp here")
    omp, step, seen = ctypes.CDLL(runtime.group()), llm.engine.step, set()

    def count(**_) -> list:
        seen.add(omp.omp_get_max_threads())
        return step()

    monkeypatch.setattr(llm.engine, "step", count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 3)
        in_thread(lambda: llm.generate([1, 2], greedy(2))).join(PATIENCE)
    finally:
        torch.set_num_threads(before)
    assert seen == {before + 3}


def test_a_fair_lock_is_passed_on_in_order():
    lock, order = FairLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    lock.acquire()
    threads = []
    for number in range(5):
        threads.append(in_thread(lambda number=number: take(number)))
        while len(lock._waiting) == number:
            os.sched_yield()
    assert not lock.acquire(blocking=False)
    lock.release()
    take(5)  # comes after all that waited, though this thread had it last
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [0, 1, 2, 3, 4, 5]
    assert lock.acquire(blocking=False)


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue():
    lock, held, main = FairLock(), threading.Event(), threading.get_ident()
    done = threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            while not lock._waiting:
                os.sched_yield()
            signal.pthread_kill(main, signal.SIGINT)
            done.wait(PATIENCE)

    holder = in_thread(hold)
    held.wait(PATIENCE)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    assert not lock._waiting
    done.set()
    holder.join(PATIENCE)
    assert lock.acquire(blocking=False)


def test_ctrl_c_waits_for_the_end_of_a_step(llm, monkeypatch, caplog):
    """Nothing of a step is lost by it, to a half-read stream least of all."""
    (expected,) = alone(llm, [[5, 6, 7]], greedy(10))
    stream = llm.stream([5, 6, 7], greedy(10))
    tokens = next(stream).outputs[0].token_ids
    launch = llm.engine.runner.launch

    def interrupted(*step):
        launched = launch(*step)
        signal.raise_signal(signal.SIGINT)
        return launched

    with monkeypatch.context() as broken:
        broken.setattr(llm.engine.runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1, 2], [3]], greedy(10))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    tokens += tokens_of(stream)
    assert tokens == expected
    assert "a step failed" not in caplog.text  # nothing had to be put right again
    assert is_idle(llm)


def test_a_second_ctrl_c_does_not_wait():
    reached = False
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():  # noqa: PT012 (what is reached is the point)
        signal.raise_signal(signal.SIGINT)
        reached = True
        signal.raise_signal(signal.SIGINT)
        reached = False
    assert reached
