"""The scheduler's rules one by one: order and memory. `tests/test_scheduler_traces.py` mixes them."""

from collections.abc import Iterable

import pytest

from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.scheduler_output import SchedulerOutput
from dispec.engine.scheduling.sequence import Sequence
from tests.fake_engine import SIZE, FakeEngine, alone, computed, tokens

pytestmark = pytest.mark.smoke


def order_of_first_work(steps: Iterable[SchedulerOutput]) -> list[Sequence]:
    return list(dict.fromkeys(scheduled.sequence for step in steps for scheduled in step.scheduled_sequences))


class TestOrder:
    def test_lower_priorities_go_first_and_equal_ones_as_they_came(self) -> None:
        engine = FakeEngine(max_num_seqs=1)
        added = [engine.add(tokens(5), priority=priority) for priority in (1, 0, 1, 0, -1)]
        assert order_of_first_work(engine.run()) == [added[index] for index in (4, 1, 3, 0, 2)]

    def test_sequences_that_arrive_together_run_in_order_of_adding(self) -> None:
        engine = FakeEngine(max_num_seqs=1)
        added = [engine.add(tokens(5), arrival_time=0) for _ in range(4)]
        assert order_of_first_work(engine.run()) == added

    @pytest.mark.parametrize(("waited", "goes_first"), [(59.0, False), (61.0, True)])
    def test_waiting_makes_up_for_priority(self, waited: float, goes_first: bool) -> None:
        engine = FakeEngine(max_num_seqs=1, priority_aging=60)
        old = engine.add(tokens(5), priority=1, arrival_time=0)
        new = engine.add(tokens(5), priority=0, arrival_time=waited)
        assert order_of_first_work(engine.run()) == ([old, new] if goes_first else [new, old])

    def test_running_sequences_go_on_beside_admitted_ones(self) -> None:
        engine = FakeEngine(max_num_seqs=4, max_num_batched_tokens=4)
        first = engine.add(tokens(4), max_tokens=20, priority=5)
        engine.step()
        for index in range(20):
            engine.add(tokens(3, index % 8), max_tokens=1, priority=-5)
            assert first.finish_reason or computed(engine.step())[first.id] == 1

    @pytest.mark.parametrize("overlaps", [False, True])
    def test_decodes_are_in_every_step_beside_a_long_prompt(self, overlaps: bool) -> None:
        engine = FakeEngine(num_blocks=3000, max_num_batched_tokens=512, max_prefill_chunk=256)
        short = [engine.add(tokens(5, index), max_tokens=100) for index in range(3)]
        engine.step(overlaps)
        long = engine.add(tokens(6000, 5), max_tokens=1)
        steps = [engine.step(overlaps) for _ in range(24)]
        for step in steps:
            assert {sequence.id for sequence in short} < set(computed(step))
        assert [computed(step)[long.id] for step in steps] == [253] * 23 + [6000 - 23 * 253]
        assert steps[-1].scheduled_sequences[-1].samples

    def test_a_chunk_takes_what_the_decodes_leave_of_the_budget(self) -> None:
        engine = FakeEngine(max_num_seqs=3, max_num_batched_tokens=10)
        engine.add(tokens(8), max_tokens=9)
        engine.step()
        first, second = engine.add(tokens(20, 1)), engine.add(tokens(20, 2))
        assert list(computed(engine.step()).values()) == [1, 9]
        assert list(computed(engine.step()).values()) == [1, 9]
        assert computed(engine.step()) == {0: 1, first.id: 2, second.id: 7}

    def test_prompts_beside_decodes_share_one_chunk(self) -> None:
        engine = FakeEngine(num_blocks=3000, max_num_batched_tokens=512, max_prefill_chunk=64)
        prompts = [engine.add(tokens(200, index), max_tokens=9) for index in range(3)]
        assert computed(engine.step()) == {prompt.id: 64 for prompt in prompts}  # nothing decodes yet
        decodes = [engine.add(tokens(5, 3 + index), max_tokens=9, priority=-1) for index in range(2)]
        engine.step()
        assert computed(engine.step()) == {decode.id: 1 for decode in decodes} | {prompts[0].id: 62}
        assert computed(engine.step()) == {decode.id: 1 for decode in decodes} | {prompts[0].id: 10, prompts[1].id: 52}

    def test_prompts_have_half_a_chunk_beside_many_decodes(self) -> None:
        engine = FakeEngine(max_num_seqs=8, max_prefill_chunk=5)
        decodes = [engine.add(tokens(3, index), max_tokens=9) for index in range(6)]
        while len(computed(step := engine.step())) < 6 or step.num_tokens > 6:
            pass
        prompt = engine.add(tokens(7, 7))
        assert computed(engine.step()) == {decode.id: 1 for decode in decodes} | {prompt.id: 3}

    @pytest.mark.parametrize("overlaps", [False, True])
    def test_a_lone_prompt_takes_larger_chunks(self, overlaps: bool) -> None:
        engine = FakeEngine(max_num_batched_tokens=12, max_prefill_chunk=4, max_lone_prefill_chunk=10)
        first = engine.add(tokens(50), max_tokens=1)
        assert [computed(engine.step(overlaps)) for _ in range(2)] == [{first.id: 10}] * 2
        second = engine.add(tokens(6, 1), max_tokens=2)
        # The second prompt runs beside the first one, and decodes beside it.
        steps = [computed(engine.step(overlaps)) for _ in range(3)]
        assert steps == [{first.id: 4, second.id: 4}, {first.id: 4, second.id: 2}, {first.id: 3, second.id: 1}]
        if overlaps:
            engine.step(overlaps)  # commits the second one's end
        assert computed(engine.step(overlaps)) == {first.id: 10}

    def test_prompts_under_way_go_on_in_order_of_rank(self) -> None:
        engine = FakeEngine(max_num_seqs=2, max_num_batched_tokens=4, max_prefill_chunk=3)
        low = engine.add(tokens(20), priority=9)
        engine.step()
        high = engine.add(tokens(20, 1))
        assert computed(engine.step()) == {low.id: 3, high.id: 1}
        assert computed(engine.step()) == {low.id: 1, high.id: 3}


class TestMemory:
    def test_a_sequence_that_can_never_fit_is_refused_and_nothing_changes(self) -> None:
        engine = FakeEngine(num_blocks=4)
        engine.max_model_len = 99
        with pytest.raises(ValueError, match=r"a sequence of 17 tokens needs 5 KV blocks, the cache has 4"):
            engine.add(tokens(14), max_tokens=3)
        assert not engine.scheduler.has_work
        fits = engine.add(tokens(14), max_tokens=2)
        engine.run()
        assert fits.output_token_ids == alone(fits)

    @pytest.mark.parametrize(("num_blocks", "is_admitted"), [(4, False), (5, True)])
    @pytest.mark.parametrize("prompt", [tokens(2 * SIZE, 1), tokens(2 * SIZE)])
    def test_an_admitted_sequence_leaves_a_block_to_each_running_one(
        self, num_blocks: int, is_admitted: bool, prompt: list[int]
    ) -> None:
        """A new prompt needs two blocks beside the other's; one that is all in use a copy, when that has grown."""
        engine = FakeEngine(num_blocks)
        shares = prompt == tokens(2 * SIZE)
        engine.add(tokens(2 * SIZE if shares else SIZE + 1), max_tokens=4)
        engine.step()
        engine.add(prompt, max_tokens=1)
        step = engine.step()
        assert step.num_admitted == is_admitted
        assert len(step.copies) == (shares and is_admitted)

    @pytest.mark.parametrize("last", range(3))
    def test_the_victim_is_the_last_in_rank(self, last: int) -> None:
        engine = FakeEngine(num_blocks=9, enable_prefix_caching=False)
        added = []
        for index in range(3):
            added.append(engine.add(tokens(5, index), max_tokens=15, priority=9 * (index == last)))
            engine.step()
        assert engine.scheduler.running == added
        while not engine.step().num_preempted:
            pass
        assert engine.scheduler.waiting == [added[last]]
        assert not added[last].block_table
        engine.run()
        assert [sequence.output_token_ids for sequence in added] == [alone(sequence) for sequence in added]

    def test_a_victim_gives_back_its_part_of_the_budget(self) -> None:
        engine = FakeEngine(max_num_seqs=3, max_num_batched_tokens=8)
        low = engine.add(tokens(29), priority=9)
        for _ in range(4):
            engine.step()
        decodes = engine.add(tokens(3, 1))
        engine.step()
        chunked = engine.add(tokens(40, 2))
        assert computed(engine.step()) == {low.id: 1, decodes.id: 1, chunked.id: 6}
        engine.pool.allocate(engine.pool.num_free)
        step = engine.scheduler.schedule()
        assert (computed(step), step.num_preempted) == ({decodes.id: 1, chunked.id: 7}, 1)

    def test_a_victim_takes_its_copy_with_it(self) -> None:
        engine = FakeEngine(num_blocks=5, max_prefill_chunk=2, enable_prefix_caching=False)
        parent, fork = engine.add(tokens(7), max_tokens=5, n=2, priority=9).choices
        engine.step()
        others = [engine.add(tokens(2, index), max_tokens=5) for index in (1, 2)]
        engine.step()
        engine.scheduler.max_prefill_chunk = 4  # prompts have half of it beside the decodes
        for _ in range(2):
            engine.step()
        assert engine.scheduler.running == [parent, *others, fork]
        step = engine.step()  # the parent copies its last block, then the others need one each
        assert (step.num_preempted, step.copies) == (2, ())
        engine.run()
        for sequence in (parent, fork, *others):
            assert sequence.output_token_ids == alone(sequence)

    def test_the_preempted_finds_its_own_prefix(self) -> None:
        engine = FakeEngine(num_blocks=6)
        first, second = engine.add(tokens(6), max_tokens=14), engine.add(tokens(6, 1), max_tokens=8)
        steps = engine.run()
        assert sum(step.num_preempted for step in steps) == 1
        [again] = [step for step in steps[1:] if step.num_admitted]
        assert again.num_cached_tokens >= SIZE
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
        assert second.output_token_ids == alone(second)

    def test_an_interrupted_prompt_keeps_the_logprobs_it_has(self) -> None:
        engine = FakeEngine(num_blocks=10, max_num_batched_tokens=4, max_num_seqs=2)
        engine.add(tokens(3), max_tokens=30)
        engine.step()
        asked = engine.add(tokens(20, 1), max_tokens=1, prompt_logprobs=0)
        while len(asked.prompt_logprobs) < 9:  # which fill no block
            engine.step()
        victim = engine.scheduler.running[-1]
        engine.scheduler._preempt(victim)
        assert (victim, asked.num_computed_tokens) == (asked, 0)
        before = list(asked.prompt_logprobs)
        assert len(before) == 9
        engine.run()
        assert [entry.token_id for entry in asked.prompt_logprobs] == tokens(20, 1)[1:]
        assert asked.prompt_logprobs[: len(before)] == before

    def test_blocks_are_reused_the_longest_unused_first_and_leaves_before_parents(self) -> None:
        pool = BlockPool(7, SIZE)
        old, new = pool.allocate(3), pool.allocate(2)
        for block in old + new:
            pool.register(block, b"%d" % block)
        pool.free(old)
        pool.free(new)
        [never_used] = pool.allocate(1)
        assert never_used not in old + new
        assert pool.allocate(5) == [*reversed(old), *reversed(new)]
        assert pool.num_cached == 0

    def test_a_block_that_holds_nothing_is_reused_before_a_prefix_is_lost(self) -> None:
        pool = BlockPool(4, SIZE)
        named, nameless = pool.allocate(1), pool.allocate(1)
        pool.register(named[0], b"name")
        pool.free(named)
        pool.free(nameless)
        assert pool.allocate(1) == nameless

    def test_a_prefix_that_is_found_again_is_the_last_to_go(self) -> None:
        engine = FakeEngine(num_blocks=6)
        for first in (0, 1, 0):  # the first prompt again, after another
            engine.add(tokens(2 * SIZE + 1, first), max_tokens=1)
            engine.run()
        engine.add(tokens(2 * SIZE + 1, 2), max_tokens=1)
        engine.run()
        found = [engine.add(tokens(2 * SIZE + 1, first), max_tokens=1) for first in (0, 1)]
        engine.run()
        assert found[0].num_cached_tokens == 2 * SIZE
        assert found[1].num_cached_tokens == SIZE  # its last block went first
