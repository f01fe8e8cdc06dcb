"""Reference-counted blocks of the KV cache, found again by their tokens. Pure bookkeeping, no tensors.

A full block has a hash, keyed, of its parent's hash and its own tokens: the hash stands for a whole prefix. A freed
block keeps its hash and its contents until it is allocated again, the least recently used first. A sequence frees its
last block first, so a prefix outlives its continuations.
"""

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Series

PADDING_BLOCK = 0


class BlockPool:
    """Allocates block numbers 1 … num_blocks - 1; block 0 takes the writes of padding tokens.

    key: of the hashes, up to 64 bytes. None draws one: clients can then not make two prefixes collide. A `cache_salt`
        also hides from other clients, by the time of an answer, that a prefix is cached.
    """

    def __init__(self, num_blocks: int, block_size: int, key: bytes | None = None) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}, must be at least 2 (one is reserved for padding)")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key = os.urandom(32) if key is None else key
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to allocate first
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}  # blocks by their hashes

    @property
    def num_usable(self) -> int:
        """Number of blocks without the padding block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, those that still hold a prefix included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Number of blocks with a hash, in use or free."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def hash_seed(self, cache_salt: str | None) -> bytes:
        """Return the parent hash of a sequence's first block: sequences share blocks only under the same salt."""
        salt = b"" if cache_salt is None else b"salt " + cache_salt.encode()
        return hashlib.blake2b(salt, digest_size=16, key=self._key).digest()

    def hash_block(self, parent: bytes, token_ids: Series[int]) -> bytes:
        """Return the 128-bit hash of a block after `parent` that holds `token_ids` (BLAKE2b, RFC 7693)."""
        return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16, key=self._key).digest()

    def find_cached(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest prefix of `hashes` that is cached."""
        blocks = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """Return the number of the blocks without a reference: sharing them takes them from `num_free`."""
        return sum(self._references[block] == 0 for block in blocks)

    def is_shared(self, block: int) -> bool:
        """Return whether the block has several references, so that no sequence may write to it."""
        return self._references[block] > 1

    def is_private(self, block: int) -> bool:
        """Return whether a block in use has one reference and no hash, so that writing to it changes nothing else."""
        return self._references[block] == 1 and self._hashes[block] is None

    def allocate(self, count: int) -> list[int]:
        """Return `count` free blocks, each with one reference. Raises RuntimeError if there are fewer."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks requested, {len(self._free)} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self.forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def register(self, block: int, block_hash: bytes) -> int:
        """Cache a full block that the caller references under its hash, once its contents are written.

        Returns the block of that hash: if another block has it already, the caller's reference moves to that one.
        """
        known = self._cached.setdefault(block_hash, block)
        if known == block:
            self._hashes[block] = block_hash
        else:
            self.share((known,))
            self.free((block,))
        return known

    def forget(self, block: int) -> None:
        """Remove the hash, if there is one, of a block that is about to be written to."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block] = None

    def free(self, blocks: Series[int]) -> None:
        """Remove one reference of each block, the last block first; a block without references is free."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)  # it holds no cached prefix

    def check(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Prove that references, free blocks and hashes agree, and that `tables` hold exactly the references.

        tables: all block tables, if given. Raises AssertionError.
        """
        assert PADDING_BLOCK not in self._free, "the padding block is free"
        assert self._references[PADDING_BLOCK] == 0, "the padding block is referenced"
        for block in range(1, self.num_blocks):
            references = self._references[block]
            assert references >= 0, f"block {block} has {references} references"
            assert (references == 0) == (block in self._free), f"block {block}: {references} references, free or not"
        cached = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert cached == self._cached, "hashes and blocks differ"
        if tables is not None:
            counted = [0] * self.num_blocks
            for table in tables:
                for block in table:
                    counted[block] += 1
            assert counted == self._references, "block tables and reference counts differ"
