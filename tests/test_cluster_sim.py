"""The simulated cluster loses no token, follows the real scheduler, and predicts the effect of its parameters."""

import json

import pytest

from dispec.bench.cluster import Cluster, Machine, StepCost
from dispec.bench.cluster_sim import MACHINES, fit_cost, splits, summary
from dispec.bench.cluster_trace import Request, make_trace, read_trace

SMALL = Machine(StepCost(0.01, 0.001, 0.001, 0.0), kv_bytes=1000, num_blocks=129, max_num_seqs=8, bandwidth=1e6)


@pytest.mark.parametrize("split", [(0, 1), (0, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["poisson", "bursty", "multi-turn"])
def test_every_request_gets_all_its_tokens_once_in_order(kind, split):
    trace = make_trace(kind, 60, 5.0, 100, 20, seed=1)
    cluster = Cluster(SMALL, *split)
    for outcome in cluster.run(trace):
        assert len(outcome.times) == len(outcome.request.answer)
        assert outcome.times == sorted(outcome.times)
        assert outcome.times[0] > outcome.request.arrival
    for worker in (*cluster._prefill, *cluster._decode):
        worker.scheduler.check()
        assert worker.scheduler.pool.num_free == worker.scheduler.pool.num_usable
        assert worker.load == 0


def test_a_request_takes_the_time_of_its_steps():
    (outcome,) = Cluster(SMALL, 0, 1).run([Request(1.0, list(range(100)), [1, 2, 3])])
    assert outcome.times == pytest.approx([1 + 0.01 + 0.1, 1.11 + 0.011, 1.121 + 0.011])


def test_a_request_that_moves_waits_for_the_link():
    """100 tokens are four blocks of 32 kB at 1 MB/s, all of them of the last chunk."""
    (outcome,) = Cluster(SMALL, 1, 1).run([Request(0.0, list(range(100)), [1, 2, 3])])
    first, second, third = outcome.times
    assert first == pytest.approx(0.11)
    assert second - first == pytest.approx(0.128 + SMALL.latency + 0.011)
    assert third - second == pytest.approx(0.011)


def test_a_shared_prefix_is_neither_computed_nor_sent_again():
    prompt = list(range(128))
    early, late = Cluster(SMALL, 1, 1).run([Request(0.0, prompt, [1, 2]), Request(9.0, prompt + [5] * 10, [3, 4])])
    assert (early.num_cached_tokens, late.num_cached_tokens) == (0, 128)
    assert late.ttft < early.ttft / 3
    assert late.gaps[0] < early.gaps[0] / 3


def test_the_same_seed_gives_the_same_trace_and_the_same_times():
    runs = [Cluster(SMALL, 1, 2).run(make_trace("bursty", 40, 4.0, 60, 10, seed=3)) for _ in range(2)]
    assert [one.times for one in runs[0]] == [one.times for one in runs[1]]


def test_prefill_workers_keep_prompts_from_delaying_tokens():
    trace = make_trace("poisson", 200, 1.2, 2000, 100, seed=0)
    machine = MACHINES["cpu-smollm2"]
    both, apart = (summary(Cluster(machine, *split).run(trace), 5.0, 0.05) for split in ((0, 4), (3, 1)))
    assert apart["itl"]["p99"] < both["itl"]["p99"] / 3


def test_a_fit_of_exact_steps_gives_their_cost():
    rows = [(1.0, p, d, c) for p in (0.0, 100.0) for d in (1.0, 8.0) for c in (100.0, 4000.0)]
    cost = StepCost(0.01, 0.001, 0.002, 1e-6)
    seconds = [sum(a * b for a, b in zip(row, cost, strict=True)) for row in rows]
    assert fit_cost(rows, seconds) == pytest.approx(cost)


def test_a_trace_from_a_file(tmp_path):
    lines = [
        {"arrival": 2.0, "prompt_tokens": 50, "output_tokens": 3, "session": "a"},
        {"arrival": 1.0, "prompt_tokens": 30, "output_tokens": 2, "session": "a"},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_trace(path, 0)
    assert (first.arrival, len(first.prompt), len(second.prompt), len(second.answer)) == (1.0, 30, 50, 3)
    assert second.prompt[:30] == first.prompt
    path.write_text('{"arrival": 1}')
    with pytest.raises(ValueError, match="line 1"):
        read_trace(path, 0)


def test_splits_are_of_all_workers():
    for workers in (1, 2, 7, 100):
        found = splits(workers)
        assert found[0] == (0, workers)
        assert all(sum(split) == workers for split in found)
        assert len(found) <= 14
