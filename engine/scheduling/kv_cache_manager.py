"""The KV cache blocks of sequences: cached prefixes are shared, new blocks allocated, filled blocks registered."""

from collections.abc import Iterable
from collections.abc import Sequence as Series

from dispec.engine.scheduling.block_pool import BlockPool
from dispec.engine.scheduling.sequence import Sequence, new_block_table


class KVCacheManager:
    """Owns the block tables of sequences, and the blocks that transfers to and from other engines hold.

    enable_prefix_caching: look for prefixes in the cache, and register the blocks that sequences fill.
    """

    def __init__(self, pool: BlockPool, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self.enable_prefix_caching = enable_prefix_caching
        self._pinned: dict[Sequence, list[int]] = {}  # blocks that other engines may be reading
        self._remote_blocks: dict[Sequence, list[int]] = {}  # block tables that a transfer may be writing to

    @property
    def holds_remote_blocks(self) -> bool:
        """Whether a transfer to or from another engine holds blocks: they become free without a step here."""
        return bool(self._pinned or self._remote_blocks)

    def check_fits(self, sequence: Sequence) -> None:
        """Raise ValueError if the whole pool could not hold the sequence at its longest."""
        num_blocks = self.pool.num_blocks_for(sequence.max_len)
        if num_blocks > self.pool.num_usable:
            raise ValueError(
                f"a sequence of {sequence.max_len} tokens needs {num_blocks} KV blocks, the cache has"
                f" {self.pool.num_usable}: raise kv_cache_memory or lower max_model_len"
            )

    def admit(self, sequence: Sequence, num_running: int) -> bool:
        """Give a sequence without blocks the cached prefix of its tokens; False if the rest does not fit now.

        The rest must fit as a whole, and each of `num_running` sequences be able to grow once: fewer preemptions.
        """
        pool, num_tokens = self.pool, len(sequence.token_ids)
        cached = self.find_prefix(sequence)
        # A prompt that is cached as a whole still computes its last token: its logits give the next one.
        num_computed = min(len(cached) * pool.block_size, num_tokens - 1)
        needs_copy = num_computed < len(cached) * pool.block_size and not pool.num_unreferenced(cached[-1:])
        num_new = pool.num_blocks_for(num_tokens) - len(cached) + needs_copy
        num_free = pool.num_free - pool.num_unreferenced(cached)
        if num_new + num_running > num_free and (num_running or self.holds_remote_blocks):
            return False
        pool.share(cached)
        sequence.block_table = new_block_table(cached)
        sequence.num_computed_tokens = sequence.draft.num_computed_tokens = num_computed
        sequence.num_registered_blocks = num_computed // pool.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_computed
        return True

    def grow(self, sequence: Sequence, num_tokens: int, copies: dict[Sequence, tuple[int, int]]) -> bool:
        """Allocate blocks for `num_tokens` more tokens; False, with nothing changed, if there are too few free ones.

        A shared block that the sequence writes to is replaced by a copy: `copies` gets (source, destination).
        """
        pool, table, num_computed = self.pool, sequence.block_table, sequence.num_computed_tokens
        first = num_computed // pool.block_size
        if num_computed + num_tokens <= len(table) * pool.block_size and pool.is_private(table[first]):
            return True
        # After rejected draft tokens the table has more blocks than are needed.
        num_new = max(0, pool.num_blocks_for(num_computed + num_tokens) - len(table))
        continues_block = first < len(table)
        needs_copy = continues_block and pool.is_shared(table[first])
        if num_new + needs_copy > pool.num_free:
            return False
        if needs_copy:
            source, [destination] = table[first], pool.allocate(1)
            pool.free((source,))
            table[first] = destination
            copies[sequence] = source, destination
        elif continues_block and first >= len(sequence.block_hashes):
            # The sequence that it forked from may have filled the block; the sequence's own hash stays valid.
            pool.forget(table[first])
        if num_new:
            table.extend(pool.allocate(num_new))
        return True

    def fork(self, parent: Sequence, fork: Sequence) -> None:
        """Share the blocks of the parent's prompt. The fork computes the prompt's last token again."""
        pool, num_tokens = self.pool, parent.num_prompt_tokens
        fork.block_table = parent.block_table[: pool.num_blocks_for(num_tokens)]
        pool.share(fork.block_table)
        fork.block_hashes = parent.block_hashes[: num_tokens // pool.block_size]
        fork.num_computed_tokens = fork.num_cached_tokens = num_tokens - 1
        fork.num_registered_blocks = fork.num_computed_tokens // pool.block_size
        fork.draft.num_computed_tokens = min(parent.draft.num_computed_tokens, fork.num_computed_tokens)

    def register(self, sequence: Sequence, num_tokens: int, new_token_ids: Series[int] = ()) -> None:
        """Let other sequences find the blocks that the first `num_tokens` tokens have filled.

        new_token_ids: tokens that follow the sequence's and are not appended yet.
        """
        if not self.enable_prefix_caching:
            return
        self._hash_blocks(sequence, num_tokens, new_token_ids)
        table, num_full = sequence.block_table, num_tokens // self.pool.block_size
        for index in range(sequence.num_registered_blocks, num_full):
            table[index] = self.pool.register(table[index], sequence.block_hashes[index])
        sequence.num_registered_blocks = num_full

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Count only the first `num_tokens` tokens as computed, and forget the hashes of blocks with tokens that the
        sequence does not have."""
        sequence.num_computed_tokens = num_tokens
        del sequence.block_hashes[len(sequence.token_ids) // self.pool.block_size :]
        sequence.num_registered_blocks = min(sequence.num_registered_blocks, num_tokens // self.pool.block_size)

    def free(self, sequence: Sequence) -> None:
        """Free a sequence's block table."""
        self.pool.free(sequence.block_table)
        sequence.block_table = new_block_table()

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of the sequence's tokens, as far as the sequence may use them."""
        if not self.enable_prefix_caching:
            return []
        limit = len(sequence.token_ids)
        num_prompt_logprobs = len(sequence.prompt_logprobs)
        if sequence.params.prompt_logprobs is not None and num_prompt_logprobs < sequence.num_prompt_tokens - 1:
            limit = num_prompt_logprobs  # cached tokens have no logits
        self._hash_blocks(sequence, limit)
        return self.pool.find_cached(sequence.block_hashes[: limit // self.pool.block_size])

    def reserve_remote(self, sequence: Sequence, num_running: int) -> tuple[int, list[int]] | None:
        """Reserve blocks for a prompt that another engine computes, if there is room as in `admit`.

        Returns the number of leading blocks that are cached here, and the block table. The blocks stay reserved until
        `take_remote` or `free_remote`, even if the sequence ends: a transfer may write to them.
        """
        num_blocks, cached = self.pool.num_blocks_for(sequence.num_prompt_tokens), self.find_prefix(sequence)
        if num_blocks - len(cached) + num_running > self.pool.num_free - self.pool.num_unreferenced(cached):
            return None
        self.pool.share(cached)
        table = self._remote_blocks[sequence] = cached + self.pool.allocate(num_blocks - len(cached))
        sequence.num_cached_tokens = len(cached) * self.pool.block_size
        return len(cached), table

    def take_remote(self, sequence: Sequence, choices: Series[Sequence]) -> None:
        """Share the blocks reserved for a sequence, now filled, among `choices`; without choices they are freed."""
        table = self._remote_blocks.pop(sequence)
        for choice in choices:
            choice.block_table = new_block_table(table)
            self.pool.share(table)
            # Without an output token yet, the last prompt token is computed again: its logits give the first one.
            choice.num_computed_tokens = min(sequence.num_prompt_tokens, len(choice.token_ids) - 1)
            choice.num_registered_blocks = choice.draft.num_computed_tokens = 0
            choice.num_cached_tokens = sequence.num_cached_tokens
            self.register(choice, choice.num_computed_tokens)
        self.pool.free(table)

    def free_remote(self, sequence: Sequence) -> None:
        """Free the blocks reserved for a sequence, if any: no transfer writes to them any more."""
        self.pool.free(self._remote_blocks.pop(sequence, []))

    def pin(self, sequence: Sequence) -> list[int]:
        """Pin each block of a sequence's prompt from when it is filled until `unpin`.

        Returns the list of pinned blocks, which grows as steps are committed.
        """
        return self._pinned.setdefault(sequence, [])

    def unpin(self, sequence: Sequence) -> None:
        """Free a sequence's pinned blocks, and pin no further ones."""
        self.pool.free(self._pinned.pop(sequence))

    def pin_filled(self, sequence: Sequence, num_tokens: int) -> None:
        """Pin the blocks that the first `num_tokens` tokens have filled, if the sequence's blocks are to be pinned.

        The last block of the prompt need not be full.
        """
        pinned = self._pinned.get(sequence)
        if pinned is None:
            return
        num_prompt_tokens = sequence.num_prompt_tokens
        is_whole = num_tokens >= num_prompt_tokens
        count = self.pool.num_blocks_for(num_prompt_tokens) if is_whole else num_tokens // self.pool.block_size
        new = sequence.block_table[len(pinned) : count]
        self.pool.share(new)
        pinned.extend(new)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove that every block in use is in a block table of `sequences`, or held by a transfer.

        Raises AssertionError.
        """
        tables = [sequence.block_table for sequence in sequences]
        self.pool.check([*tables, *self._remote_blocks.values(), *self._pinned.values()])

    def _hash_blocks(self, sequence: Sequence, num_tokens: int, new_token_ids: Series[int] = ()) -> None:
        """Hash the full blocks among the first `num_tokens` of the sequence's tokens and the new ones after them."""
        hashes, size = sequence.block_hashes, self.pool.block_size
        for index in range(len(hashes), num_tokens // size):
            parent = hashes[-1] if hashes else self.pool.hash_seed(sequence.cache_salt)
            first, last = index * size, (index + 1) * size
            num_new = max(0, last - len(sequence.token_ids))
            hashes.append(self.pool.hash_block(parent, sequence.token_ids[first:last] + list(new_token_ids[:num_new])))
