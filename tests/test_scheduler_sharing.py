"""Which blocks sequences share: prefixes that are in the cache, and prompts of several choices."""

import random

import pytest

from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.sequence import Status
from tests.fake_engine import SIZE, FakeEngine, alone, computed, tokens

pytestmark = pytest.mark.smoke


class TestSharing:
    def test_a_prompt_that_is_there_entirely_computes_one_token_in_place(self) -> None:
        engine = FakeEngine()
        engine.add(tokens(2 * SIZE))
        engine.run()
        again = engine.add(tokens(2 * SIZE))
        step = engine.step()
        assert (computed(step), step.copies, step.num_cached_tokens) == ({again.id: 1}, (), 2 * SIZE - 1)

    def test_a_prompt_whose_last_block_is_in_use_copies_it(self) -> None:
        engine = FakeEngine()
        first = engine.add(tokens(2 * SIZE), max_tokens=9)
        engine.step()
        again = engine.add(tokens(2 * SIZE))
        step = engine.step()
        assert computed(step)[again.id] == 1
        [(source, copy)] = step.copies
        assert (source, first.block_table[1]) == (first.block_table[1], again.block_table[1])  # one again, once written
        assert copy not in again.block_table

    def test_a_block_that_is_written_again_is_found_meanwhile(self) -> None:
        engine = FakeEngine()
        engine.add(tokens(2 * SIZE))
        engine.run()
        again, same, longer = (engine.add(tokens(length)) for length in (2 * SIZE, 2 * SIZE, 3 * SIZE))
        step = engine.step()
        assert computed(step) == {again.id: 1, same.id: 1, longer.id: SIZE}
        assert len(step.copies) == 1
        assert again.block_table[:2] == same.block_table[:2] == longer.block_table[:2]

    def test_prompts_admitted_together_share_once_they_are_computed(self) -> None:
        engine = FakeEngine()
        for _ in range(2):
            engine.add(tokens(2 * SIZE + 1), max_tokens=2)
        assert engine.step().num_tokens == 2 * (2 * SIZE + 1)
        assert engine.num_used == 2 + 2

    def test_nothing_is_found_before_it_is_computed(self) -> None:
        engine = FakeEngine()
        engine.add(tokens(3 * SIZE))
        engine.step(overlaps=True)
        engine.add(tokens(3 * SIZE))
        assert engine.step(overlaps=True).num_cached_tokens == 0

    def test_blocks_that_accepted_draft_tokens_have_filled_are_found_again(self) -> None:
        found = []
        for drafts in (None, random.Random(1)):
            engine = FakeEngine(drafts=drafts)
            first = engine.add(tokens(6), max_tokens=40)
            engine.run()
            again = engine.add(first.token_ids)
            engine.run()
            found.append(again.num_cached_tokens)
        assert found == [(6 + 40 - 1) // SIZE * SIZE] * 2

    def test_a_second_turn_computes_only_what_is_new(self) -> None:
        engine = FakeEngine()
        first = engine.add(tokens(9), max_tokens=10)
        engine.run()
        second = engine.add(first.token_ids + tokens(3))
        step = engine.step()
        assert second.num_cached_tokens == step.num_cached_tokens == 16  # 18 tokens were computed, in 4 full blocks
        assert step.num_tokens == 22 - 16

    def test_salts_separate(self) -> None:
        engine = FakeEngine()
        for salt, found in ((None, 0), ("a", 0), ("b", 0), ("a", 8), (None, 8)):
            sequence = engine.add(tokens(9), max_tokens=1, cache_salt=salt)
            engine.run()
            assert sequence.num_cached_tokens == found

    def test_keys_separate_pools(self) -> None:
        pools = [BlockPool(4, SIZE, key) for key in (b"one", b"one", b"two", None, None)]
        names = [pool.hash_block(pool.hash_seed(None), tokens(SIZE)) for pool in pools]
        assert names[0] == names[1]
        assert len(set(names)) == 4

    def test_a_name_stands_for_all_before_it(self) -> None:
        engine = FakeEngine()
        engine.add(tokens(9, 0), max_tokens=1)
        engine.run()
        other = engine.add([7, *tokens(9, 0)[1:]], max_tokens=1)
        engine.run()
        assert other.num_cached_tokens == 0

    def test_prompt_logprobs_read_no_prefix_and_leave_theirs(self) -> None:
        engine = FakeEngine()
        asks = engine.add(tokens(9), max_tokens=1, prompt_logprobs=0)
        engine.run()
        asks_as_well = engine.add(tokens(9), max_tokens=1, prompt_logprobs=0)
        does_not = engine.add(tokens(9), max_tokens=1)
        engine.run()
        assert [sequence.num_cached_tokens for sequence in (asks, asks_as_well, does_not)] == [0, 0, 8]

    def test_nothing_is_shared_where_that_is_off(self) -> None:
        engine = FakeEngine(enable_prefix_caching=False)
        for _ in range(2):
            engine.add(tokens(9), max_tokens=1)
            assert engine.run()[0].num_cached_tokens == 0
        assert engine.pool.num_cached == 0


class TestForks:
    @pytest.mark.parametrize("length", [1, SIZE - 1, 2 * SIZE, 2 * SIZE + 1])
    @pytest.mark.parametrize("caches", [False, True])
    def test_the_prompt_is_computed_once_and_its_last_block_copied_on_write(self, length: int, caches: bool) -> None:
        engine = FakeEngine(enable_prefix_caching=caches)
        first = engine.add(tokens(length), max_tokens=2, n=4)
        prompt_blocks = engine.pool.num_blocks_for(length)
        assert computed(engine.step()) == {first.id: length}
        assert engine.num_used == prompt_blocks
        assert all(sequence.block_table == first.block_table for sequence in first.choices)
        step = engine.step()
        assert computed(step) == dict.fromkeys((sequence.id for sequence in first.choices), 1)
        # The one that writes last keeps the block; of a full block, the parent writes to the next.
        assert len(step.copies) == 3
        assert [sequence.output_token_ids for sequence in first.choices] == [
            alone(sequence)[: 1 + (sequence is first)] for sequence in first.choices
        ]
        engine.run()
        assert [sequence.output_token_ids for sequence in first.choices] == [alone(each) for each in first.choices]

    def test_full_blocks_stay_shared(self) -> None:
        engine = FakeEngine(enable_prefix_caching=False)
        first = engine.add(tokens(10 * SIZE + 1), max_tokens=3, n=4)
        engine.step()
        engine.step()
        assert engine.num_used == 10 + 4
        assert len({tuple(sequence.block_table[:10]) for sequence in first.choices}) == 1

    def test_forks_beyond_max_num_seqs_wait_and_find_the_prompt(self) -> None:
        engine = FakeEngine(max_num_seqs=2)
        first = engine.add(tokens(9), n=4)
        engine.step()
        assert [sequence.status for sequence in first.choices] == [Status.RUNNING] * 2 + [Status.WAITING] * 2
        engine.run()
        assert [sequence.num_cached_tokens for sequence in first.choices] == [0, 8, 8, 8]

    @pytest.mark.parametrize("steps", [0, 1, 2])
    @pytest.mark.parametrize("overlaps", [False, True])
    def test_they_go_on_without_the_parent(self, steps: int, overlaps: bool) -> None:
        engine = FakeEngine(max_num_batched_tokens=8)
        first, *others = engine.add(tokens(20), n=3).choices
        assert engine.scheduler.num_waiting == 3
        for _ in range(steps):
            engine.step(overlaps)
        engine.scheduler.finish(first, "abort")
        engine.scheduler.check()
        assert engine.scheduler.num_waiting == 2
        engine.run(overlaps)
        assert first.output_token_ids == []
        assert [sequence.output_token_ids for sequence in others] == [alone(sequence) for sequence in others]
        assert engine.num_used == 0

    def test_a_parent_that_lost_its_blocks_meanwhile_has_none_to_share(self) -> None:
        engine = FakeEngine()
        parent, fork = engine.add(tokens(9), n=2).choices
        step = engine.scheduler.schedule()
        result = engine.model.run(step)
        engine.scheduler._preempt(parent)
        engine.scheduler.commit(step, result)
        assert fork.status is Status.WAITING
        engine.run()
        assert [sequence.output_token_ids for sequence in (parent, fork)] == [alone(parent), alone(fork)]

    def test_what_a_fork_computes_can_be_found(self) -> None:
        engine = FakeEngine()
        fork = engine.add(tokens(SIZE + 1), max_tokens=3 * SIZE, n=2).choices[1]
        engine.run()
        next_turn = engine.add(fork.token_ids, max_tokens=1)
        engine.run()
        assert next_turn.num_cached_tokens == 4 * SIZE

    def test_one_that_waits_for_the_prompt_can_be_aborted(self) -> None:
        engine = FakeEngine()
        first, second, third = engine.add(tokens(20), n=3).choices
        engine.scheduler.finish(second, "abort")
        engine.run()
        assert (second.finish_reason, second.output_token_ids) == ("abort", [])
        assert [sequence.output_token_ids for sequence in (first, third)] == [alone(first), alone(third)]

    def test_a_block_that_the_parent_filled_is_not_found_with_what_a_fork_wrote(self) -> None:
        """The parent's next token is on its way to the last block of the prompt when the forks come to share it."""
        engine = FakeEngine(num_blocks=8)
        prompt = tokens(2 * SIZE - 1)
        parent, fork = engine.add(prompt, max_tokens=2, n=2).choices
        engine.step(overlaps=True)
        engine.step(overlaps=True)  # the parent's last, and the forks
        while engine.in_flight:
            engine.scheduler.commit(*engine.in_flight.popleft())
        engine.run()
        assert [each.output_token_ids for each in (parent, fork)] == [alone(parent), alone(fork)]
        for sequence in (parent, fork):
            next_turn = engine.add(sequence.token_ids, max_tokens=3)
            engine.run()
            assert next_turn.output_token_ids == alone(next_turn)

    def test_one_that_has_more_blocks_than_it_needs_still_needs_one_to_copy_to(self) -> None:
        """As after rejected draft tokens, when no block is free and another sequence holds the one to write to."""
        engine = FakeEngine(num_blocks=4)
        sequence = engine.add(tokens(2))
        pool = engine.scheduler.pool
        sequence.block_table, sequence.num_computed_tokens = pool.allocate(2), 2
        pool.share(sequence.block_table[:1])
        taken = pool.allocate(pool.num_free)
        assert not engine.scheduler.kv_cache.grow(sequence, 1, {})
        pool.free(taken)
        copies: dict = {}
        assert engine.scheduler.kv_cache.grow(sequence, 1, copies)
        assert list(copies) == [sequence]
