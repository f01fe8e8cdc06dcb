"""Service-level objectives: the order of waiting requests, load shedding, and its metrics."""

import asyncio
import math
import random

import pytest

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler import Scheduler
from dispec.engine.scheduling.scheduler_output import ModelRunnerOutput
from dispec.engine.scheduling.sequence import Sequence
from dispec.serving.client.admission import Admission
from dispec.serving.client.errors import Overloaded
from dispec.serving.client.slo import Slo, can_meet_ttft, parse_slo, slack
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.engine_clients import Recorder, ask, generate, read, running_client, until
from tests.engine_clients import directory as directory
from tests.engine_clients import one_thread_each as one_thread_each
from tests.small_engine import greedy, random_tokens

pytestmark = pytest.mark.smoke

FAST = Slo("fast", 0.5, 0.05)


def test_a_class_is_read_from_its_option():
    assert parse_slo("chat:ttft=0.5,itl=0.05") == Slo("chat", 0.5, 0.05)
    assert parse_slo("batch:itl=1") == Slo("batch", math.inf, 1.0)
    for wrong in (
        "chat",
        "chat:",
        ":ttft=1",
        "chat:ttft=0",
        "chat:ttft=x",
        "chat:tpot=1",
        "chat:ttft=nan",
        'a"b:ttft=1',
    ):
        with pytest.raises(ValueError, match="slo is "):
            parse_slo(wrong)
    with pytest.raises(ValueError, match="slo is 'other', must be one of 'fast'"):
        ServerSettings(slo=(FAST,)).find_slo("other")
    with pytest.raises(ValueError, match="twice"):
        ServerSettings(slo=(FAST, FAST))


def test_a_request_meets_its_targets_by_its_first_token_and_the_mean_of_its_gaps():
    assert FAST.is_met(0.5, [0.08, 0.01])
    assert FAST.is_met(0.5, [])
    assert not FAST.is_met(0.5, [0.06, 0.05])
    assert not FAST.is_met(0.6, [0.01])
    assert not FAST.is_met(None, [])


def test_least_slack_goes_first_and_no_request_starves():
    """Random arrivals of three classes at an overloaded scheduler: sequences start in the order of their latest start,
    and only those that arrived before its latest start overtake a waiting sequence."""
    rng = random.Random(1)
    scheduler = Scheduler(BlockPool(65, 4), 2, 8, enable_prefix_caching=False)
    slos = [FAST, Slo("slow", 3.0), None]
    begun: list[Sequence] = []
    for number in range(120):
        slo = rng.choice(slos)
        prompt = [1] * rng.randint(1, 8)
        sequence = Sequence(
            number, prompt, SamplingParams(max_tokens=1), 0, frozenset(), len(prompt) + 1, number / 10,
            slack=slack(slo, len(prompt), 100.0),
        )  # fmt: skip
        scheduler.add(sequence)
        if number % 3 == 0:
            ready = [*scheduler.waiting]
            step = scheduler.schedule()
            chosen = [scheduled.sequence for scheduled in step.scheduled_sequences if scheduled.start == 0]
            assert chosen == ready[: len(chosen)]
            latest = [one.arrival_time + one.slack for one in ready]
            assert latest == sorted(latest)
            begun += chosen
            scheduler.commit(
                step,
                ModelRunnerOutput(
                    {scheduled.sequence.id: [2] for scheduled in step.scheduled_sequences if scheduled.samples}
                ),
            )
    for late in begun:
        before = begun[: begun.index(late)]
        overtakers = [other for other in before if other.arrival_time > late.arrival_time]
        assert all(other.arrival_time < late.arrival_time + late.slack for other in overtakers)
    assert any(begun.index(a) > begun.index(b) for a in begun for b in begun if a.arrival_time < b.arrival_time)


def test_a_missed_target_is_predicted():
    assert can_meet_ttft(FAST, 100, 1000.0)
    assert not can_meet_ttft(FAST, 501, 1000.0)
    assert can_meet_ttft(FAST, 10**6, 0.0)  # the throughput is not known yet
    admission = Admission(10, 10**6)
    admission.enter("a", 300, 5.0)
    admission.enter("b", 50, 9.0)
    assert admission.num_tokens_ahead(5.0) == 300
    admission.leave("a", started=True)
    assert admission.num_tokens_ahead(100.0) == 50


def test_late_requests_are_rejected_at_arrival_or_when_their_time_has_passed(directory):
    async def overload():
        engine = {"max_num_seqs": 2, "max_num_batched_tokens": 32}
        async with running_client(directory, engine, has_slos=True) as client:
            recorder, metrics = Recorder(), Metrics("m")
            client.observers += [recorder, metrics]
            await generate(client, random_tokens(200), greedy(2))  # now the rate is known
            rate = client.prefill_tokens_per_second
            hopeless = Slo("hopeless", 400 / rate / 2, 1.0)
            with pytest.raises(Overloaded, match="cannot come within"):
                ask(client, random_tokens(400), greedy(2), slo=hopeless)
            assert client.load == 0
            running = [ask(client, random_tokens(5, seed), greedy(400)) for seed in range(2)]
            await until(lambda: client.num_waiting == 0)
            late = ask(client, random_tokens(5, 7), greedy(2), slo=Slo("late", 0.05, 1.0))
            with pytest.raises(Overloaded, match=r"waited for 0\.05 s"):
                await read(late)
            for stream in running:
                stream.abort()
            await generate(client, random_tokens(5), greedy(4), slo=Slo("easy", 1000.0, 1000.0))
            await generate(client, random_tokens(5), greedy(4), slo=Slo("hard", 1000.0, 1e-9))
            return metrics.render().decode()

    shown = asyncio.run(overload())
    counted = {
        (line.split('slo="')[1].split('"')[0], line.split('outcome="')[1].split('"')[0])
        for line in shown.splitlines()
        if line.startswith("dispec_slo_requests_total{") and line.endswith(" 1.0")
    }
    assert counted == {("hopeless", "shed"), ("late", "shed"), ("easy", "met"), ("hard", "missed")}
