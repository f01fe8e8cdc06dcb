"""The simulated cluster loses nothing, follows the real scheduler, and gets faster where it must."""

import json
from dataclasses import replace

import pytest

from dispec.bench.cluster import Cluster, Host, Machine, StepCost
from dispec.bench.cluster_measure import Steps, slowdown
from dispec.bench.cluster_sim import MACHINES, splits, summary
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


def test_one_worker_takes_what_its_steps_take():
    (outcome,) = Cluster(SMALL, 0, 1).run([Request(1.0, list(range(100)), [1, 2, 3])])
    assert outcome.times == pytest.approx([1 + 0.01 + 0.1, 1.11 + 0.011, 1.121 + 0.011])


def test_a_handed_over_request_waits_for_its_link():
    """100 tokens are four blocks of 32 kB at 1 MB/s, of which all are of the last chunk."""
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


def test_the_same_seed_is_the_same_trace_and_the_same_times():
    runs = [Cluster(SMALL, 1, 2).run(make_trace("bursty", 40, 4.0, 60, 10, seed=3)) for _ in range(2)]
    assert [one.times for one in runs[0]] == [one.times for one in runs[1]]


def test_prompts_elsewhere_keep_answers_from_waiting():
    trace = make_trace("poisson", 200, 1.2, 2000, 100, seed=0)
    machine = MACHINES["cpu-smollm2"]
    both, apart = (summary(Cluster(machine, *split).run(trace), 5.0, 0.05) for split in ((0, 4), (3, 1)))
    assert apart["itl"]["p99"] < both["itl"]["p99"] / 3


def on_one_host(split, trace, **host):
    fixed = {"num_cores": 2, "num_threads": 1}
    return Cluster(SMALL, *split, Host(**fixed | host)).run(trace)


@pytest.mark.parametrize("split", [(0, 1), (0, 3), (1, 1), (2, 3)])
def test_a_shared_machine_loses_nothing_either(split):
    trace = make_trace("poisson", 60, 5.0, 100, 20, seed=1)
    costs = {"contention": 1.3, "front_token": 1e-3, "front_request": 3e-3}
    for outcome in on_one_host(split, trace, num_threads=2, **costs):
        assert len(outcome.times) == len(outcome.request.answer)
        assert outcome.times == sorted(outcome.times)


def test_a_shared_machine_where_nothing_is_in_the_way_is_like_many():
    trace = make_trace("poisson", 60, 5.0, 100, 20, seed=1)
    for split in ((0, 1), (1, 2)):
        for one, other in zip(Cluster(SMALL, *split).run(trace), on_one_host(split, trace), strict=True):
            assert other.times == pytest.approx(one.times)


def test_workers_are_in_each_others_way_only_while_both_compute():
    """Two prompts of 0.11 s each; the second begins 0.05 s after the first, which is then half as fast."""
    trace = [Request(0.0, list(range(100)), [1]), Request(0.05, list(range(500, 600)), [1])]
    first, second = on_one_host((0, 2), trace, contention=2.0)
    assert first.times == pytest.approx([0.05 + 2 * 0.06])
    assert second.times == pytest.approx([0.17 + (0.11 - 0.06)])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_front_delays_a_step_if_there_is_no_core_for_it(num_threads):
    (outcome,) = on_one_host((0, 1), [Request(0.0, [1, 2], [1, 2, 3])], num_threads=num_threads, front_token=0.004)
    assert outcome.times[0] == pytest.approx(0.012 + 0.004)
    taken = 0.004 if num_threads == 2 else 0.0
    assert outcome.gaps == pytest.approx([0.011 + taken] * 2)


def test_a_request_is_read_before_it_is_queued():
    (outcome,) = on_one_host((0, 1), [Request(1.0, [1, 2], [1])], front_request=0.5)
    assert outcome.ttft == pytest.approx(0.5 + 0.012)


def test_steps_vary_as_they_were_seen_to():
    machine = replace(SMALL, spread=(1.0, 3.0))
    (outcome,) = Cluster(machine, 0, 1).run([Request(0.0, [1, 2], [1] * 200)])
    assert {round(gap, 9) for gap in outcome.gaps} == {0.011, 0.033}
    assert 60 < sum(gap > 0.02 for gap in outcome.gaps) < 140


def test_a_line_is_found_again_and_what_varies_about_it():
    rows = [(1.0, p, d, c) for p in (0.0, 100.0) for d in (1.0, 8.0) for c in (100.0, 4000.0) for _ in range(4)]
    cost = StepCost(0.01, 0.001, 0.002, 1e-6)
    exact = [sum(a * b for a, b in zip(row, cost, strict=True)) for row in rows]
    assert Steps(rows, [0] * len(rows), exact).cost() == pytest.approx(cost)
    shapes = [int(row[2] * 10000 + row[3]) for row in rows]
    noisy = [second * (1.5 if number % 4 == 3 else 1.0) for number, second in enumerate(exact)]
    spread = Steps(rows, shapes, noisy).spread()
    assert len(spread) == 101
    assert (spread[0], spread[50], spread[100]) == pytest.approx((1.0, 1.0, 1.5))
    slower = Steps(rows, shapes, [1.2 * second for second in exact])
    assert slowdown(Steps(rows, shapes, exact), [slower, slower]) == pytest.approx(1.2)


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
