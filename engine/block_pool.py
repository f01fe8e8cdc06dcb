"""Reference-counted blocks of the KV cache. Pure bookkeeping: it never touches a tensor."""

from collections import deque
from collections.abc import Iterable

PADDING_BLOCK = 0


class BlockPool:
    """Hands out block numbers 1 … num_blocks - 1; block 0 takes the writes of padding tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 2 (one is reserved for padding)")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(1, num_blocks))
        self._references = [0] * num_blocks

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can own in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Raises RuntimeError if there are not so many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks in use."""
        for block in blocks:
            self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give one reference of each block back; the last one frees it."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Prove that the books balance, and against the block tables of all living sequences if given.

        Raises AssertionError with what is wrong.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert PADDING_BLOCK not in free, "the padding block is free"
        assert self._references[PADDING_BLOCK] == 0, "the padding block is referenced"
        for block in range(1, self.num_blocks):
            references = self._references[block]
            assert references >= 0, f"block {block} has {references} references"
            assert (references == 0) == (block in free), f"block {block} has {references} references, free: {free}"
        if tables is not None:
            counted = [0] * self.num_blocks
            for table in tables:
                for block in table:
                    counted[block] += 1
            assert counted == self._references, "block tables and reference counts differ"
