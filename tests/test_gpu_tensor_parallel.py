"""Tensor parallelism on two GPUs: the tokens of one, with a graph for each step and a step queued ahead.

A rank that ends is noticed while kernels wait for it.
"""

import os
import select
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.engine.distributed.tensor_parallel import TensorParallelError
from tests.gpu_engine import (
    CONFIG,
    NEEDS_CUDA,
    count_launches,
    decoding,
    expect_close_logprobs,
    expect_replayed,
    finish,
    greedy,
    make,
    prompts,
    token_ids,
    unchecked,
)
from tests.small_engine import mixed_params

__all__ = ["unchecked"]
pytestmark = [*NEEDS_CUDA, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

TWO: dict[str, Any] = {"device": "cuda:0", "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    "speculation",
    [{}, {"speculative_model": "ngram"}, {"speculative_model": replace(CONFIG, num_layers=1)}],
    ids=["plain", "n-grams", "draft model"],
)
def test_two_gpus_answer_as_one_in_float32(speculation: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    given, params = prompts(12), mixed_params(12)
    with make(dtype="float32", enforce_eager=True) as alone:
        expected = token_ids(alone.generate(given, params))
    with make(dtype="float32", **TWO, **speculation) as together:
        if together.engine.speculator is not None:
            together.engine.speculator.is_adaptive = False
        assert token_ids(together.generate(given, params)) == expected
        assert token_ids(together.generate(given, params)) == expected, "with the prompts in the prefix cache"
    assert "skipping cudagraphs" not in capfd.readouterr().err  # of either rank


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_of_two_gpus_is_one_graph_and_overlaps_the_next(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    with make(dtype=dtype, enforce_eager=True) as alone:
        expected = alone.generate(prompts(6), params)
    with make(dtype=dtype, **TWO) as together:
        engine = together.engine
        assert engine.runner.is_compiled
        assert engine.plan.overlaps
        expect_close_logprobs(together.generate(prompts(6), params), expected)
        with decoding(engine, 5):
            assert count_launches(engine, 10) == 10
        expect_replayed()


LARGE = 8 << 30  # bytes of a KV cache that is missed if it is not freed


def expect_a_new_engine_to_work(free_before: int) -> None:
    """free_before: bytes of the second GPU before the engine that failed."""
    assert torch.cuda.mem_get_info(1)[0] > free_before - LARGE // 2
    with make(dtype="bfloat16", enforce_eager=True, **TWO) as together:
        together.generate(prompts(2), greedy(4))


def kill_rank_1(llm: LLM, signal_number: int = signal.SIGKILL) -> None:
    ranks = llm.engine._ranks
    assert ranks is not None
    os.kill(ranks._followers[0].pid, signal_number)


def test_a_rank_that_dies_while_kernels_wait_for_it_is_named() -> None:
    free_before = torch.cuda.mem_get_info(1)[0]
    with make(dtype="bfloat16", kv_cache_memory=LARGE, **TWO) as together:
        together.generate(prompts(2), greedy(4))
        kill_rank_1(together, signal.SIGSTOP)
        together.engine.add([1, 2, 3], greedy(40))
        # The step is launched by this rank alone, and waits for the other one.
        timer = threading.Timer(0.5, kill_rank_1, (together,))
        timer.start()
        with pytest.raises(TensorParallelError, match="rank 1 ended with status -9"):
            finish(together.engine)
        timer.join()
    expect_a_new_engine_to_work(free_before)


def test_a_rank_that_dies_while_nothing_runs_wakes_the_engine() -> None:
    free_before = torch.cuda.mem_get_info(1)[0]
    with make(dtype="bfloat16", kv_cache_memory=LARGE, **TWO) as together:
        together.generate(prompts(2), greedy(4))
        kill_rank_1(together)
        readable, _, _ = select.select(together.engine.wake_ups, [], [], 60)
        assert readable
        with pytest.raises(TensorParallelError, match="rank 1 ended with status -9"):
            together.engine.work_while_idle()
    expect_a_new_engine_to_work(free_before)
