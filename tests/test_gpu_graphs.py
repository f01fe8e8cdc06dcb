"""One engine on a CUDA device: every step replays a recorded graph, and nothing is compiled after the start."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispec import LLM, SamplingParams
from tests.gpu_engine import (
    NEEDS_CUDA,
    count_launches,
    decoding,
    expect_replayed,
    finish,
    greedy,
    make,
    num_graphs,
    num_sampler_graphs,
    prompts,
    unchecked,
)
from tests.small_engine import mixed_params

__all__ = ["unchecked"]
pytestmark = NEEDS_CUDA


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(request: pytest.FixtureRequest, unchecked: None) -> Iterator[LLM]:
    with make(dtype=request.param) as found:
        assert found.engine.runner.is_compiled
        yield found


def test_decoding_is_one_graph_and_prefill_another(llm: LLM) -> None:
    llm.generate(prompts(20), mixed_params(20))
    assert num_graphs() == 2 + num_sampler_graphs(llm.engine)
    expect_replayed()


def test_a_run_compiles_nothing(llm: LLM) -> None:
    """Many batch sizes and prompt lengths, every sampling feature."""
    before = num_graphs()
    for count in (1, 2, 3, 5, 8, 13, 16, 20):
        llm.generate(prompts(count), mixed_params(count, max_tokens=1 + count % 7))
    for length in (1, 31, 32, 33, 127, 255, 256, 257, 600):
        params = SamplingParams(temperature=0.7, max_tokens=3, ignore_eos=True, prompt_logprobs=2, logprobs=2, n=2)
        llm.generate([[(7 * token + length) % 1024 for token in range(length)]], params)
    assert num_graphs() == before
    expect_replayed()


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_a_decode_step_launches_one_graph(llm: LLM, count: int) -> None:
    with decoding(llm.engine, count):
        assert len(llm.engine._launched) == 1, "no step is queued ahead"
        assert count_launches(llm.engine, 10) == 10
        assert all(record.kind == "decode" for record in list(llm.engine.records)[-9:])


def test_a_prefill_step_launches_one_graph(llm: LLM) -> None:
    engine = llm.engine
    for prompt in prompts(3, longest=60):
        engine.add(prompt, greedy(4))
    assert count_launches(engine, 1) == 1
    finish(engine)


def test_a_mixed_step_launches_one_graph(llm: LLM) -> None:
    engine = llm.engine
    with decoding(engine, 3):
        engine.add(prompts(1)[0], greedy(4))
        assert count_launches(engine, 1) == 1
        engine.step()
        assert "mixed" in [record.kind for record in list(engine.records)[-2:]]


def test_other_threads_replay_the_same_graphs(llm: LLM) -> None:
    """The current device belongs to a thread, and graphs were recorded in another one."""
    given = prompts(6)
    params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=20, ignore_eos=True) for index in range(6)]

    def answer(index: int) -> list[int]:
        return llm.generate([given[index]], params[index])[0].outputs[0].token_ids

    expected = [answer(index) for index in range(6)]
    before = num_graphs()
    with ThreadPoolExecutor(1) as another:
        assert list(another.map(answer, range(6))) == expected
    with ThreadPoolExecutor(4) as several:  # batches of every size, whose sums bfloat16 may round differently
        found = list(several.map(answer, [*range(6)] * 4))
    assert num_graphs() == before
    expect_replayed()
    assert [len(tokens) for tokens in found] == [20] * 24
    assert llm.engine.options.dtype == "bfloat16" or found == expected * 4
    assert not llm.engine.has_work
