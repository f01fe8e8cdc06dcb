"""Reference-counted blocks of the KV cache, found again by what they hold. Pure bookkeeping, no tensors.

A full block has a name: a keyed hash of its parent's name and its own tokens, so that a name stands for a whole
prefix. A freed block keeps its name and its contents until it is handed out again, the longest unused first; a
sequence frees its last block first, so a prefix is never lost before what continues it.
"""

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Series

PADDING_BLOCK = 0


class BlockPool:
    """Hands out block numbers 1 … num_blocks - 1; block 0 takes the writes of padding tokens.

    key: of the hashes, up to 64 bytes; None draws one, so that nobody outside can make two prefixes collide or tell
        from the time of an answer what others asked before (with a `cache_salt`, not even on the same engine).
    """

    def __init__(self, num_blocks: int, block_size: int, key: bytes | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 2 (one is reserved for padding)")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key = os.urandom(32) if key is None else key
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to be used first
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can own in all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those that still hold a prefix included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that a prefix can be found in, in use or free."""
        return len(self._named)

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def hash_seed(self, cache_salt: str | None) -> bytes:
        """The parent of a sequence's first block: sequences share blocks only under the same salt."""
        salt = b"" if cache_salt is None else b"salt " + cache_salt.encode()
        return hashlib.blake2b(salt, digest_size=16, key=self._key).digest()

    def hash_block(self, parent: bytes, token_ids: Series[int]) -> bytes:
        """The 128-bit name of a block after `parent` that holds `token_ids` (BLAKE2b, RFC 7693)."""
        return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16, key=self._key).digest()

    def find_cached(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `names` that is still held."""
        blocks = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody references, so that sharing them takes them from `num_free`."""
        return sum(self._references[block] == 0 for block in blocks)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence references the block, so that none of them may write to it."""
        return self._references[block] > 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference. Raises RuntimeError if there are not so many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self.forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use or that `find` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def register(self, block: int, name: bytes) -> int:
        """Give a full block that the caller references its name, once its contents are written.

        Returns the block that the name stands for: another one if that was there first, in which case the caller's
        reference has moved to it.
        """
        known = self._named.setdefault(name, block)
        if known == block:
            self._names[block] = name
        else:
            self.share((known,))
            self.free((block,))
        return known

    def forget(self, block: int) -> None:
        """Take the name, if there is one, from a block that is about to be written to."""
        name = self._names[block]
        if name is not None:
            del self._named[name]
            self._names[block] = None

    def free(self, blocks: Series[int]) -> None:
        """Give one reference of each block back, the last block first; the last reference frees it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._names[block] is None:
                    self._free.move_to_end(block, last=False)  # it holds nothing that anybody could want

    def check(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Prove that the books balance, and against the block tables of all living sequences if given.

        Raises AssertionError with what is wrong.
        """
        assert PADDING_BLOCK not in self._free, "the padding block is free"
        assert self._references[PADDING_BLOCK] == 0, "the padding block is referenced"
        for block in range(1, self.num_blocks):
            references = self._references[block]
            assert references >= 0, f"block {block} has {references} references"
            assert (references == 0) == (block in self._free), f"block {block}: {references} references, free or not"
        named = {name: block for block, name in enumerate(self._names) if name is not None}
        assert named == self._named, "names and blocks differ"
        if tables is not None:
            counted = [0] * self.num_blocks
            for table in tables:
                for block in table:
                    counted[block] += 1
            assert counted == self._references, "block tables and reference counts differ"
