"""Which part of a model a rank has, under tensor parallelism (Megatron-LM, arXiv:1909.08053).

Attention heads, the MLP's columns and the vocabulary are split over the ranks; a layer then takes two sums over them,
one after attention and one after the MLP. Norms are everybody's. Every rank's part follows from the weights'
declaration, which names what each dimension counts.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dispec.layers.config import ModelConfig, Shard

Axis = Literal["query_heads", "kv_heads", "intermediate", "vocabulary", "once"]

_COLUMNS = 64  # of the MLP, that stay together where there are enough: what kernels read at once


class Part(NamedTuple):
    """Elements `start` to `stop` of a dimension, of which a rank has room for `size`: what is beyond is zero."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Sharding:
    """The parts of one rank. `config` is the whole model's."""

    config: ModelConfig
    shard: Shard

    def local_config(self) -> ModelConfig:
        """The model as this rank sees it: its own heads and columns, the whole hidden size and vocabulary."""
        first, last = self._kv_heads()
        query = self._query_heads()
        columns = self.part("intermediate", self.config.intermediate_size)
        return replace(
            self.config,
            num_heads=query[1] - query[0],
            num_kv_heads=last - first,
            intermediate_size=columns.size,
            shard=self.shard,
        )

    def part(self, axis: Axis | None, whole: int) -> Part:
        """This rank's part of a dimension of `whole` elements."""
        config, (rank, size) = self.config, (self.shard.rank, self.shard.size)
        if axis is None:
            return Part(0, whole, whole)
        if axis == "once":  # what is added to a sum over the ranks, and must be in it once
            return Part(0, whole if rank == 0 else 0, whole)
        if axis == "vocabulary":
            rows = self.shard.vocab_rows(whole)
            start = min(whole, rank * rows)
            return Part(start, min(whole, start + rows), rows)
        if axis == "intermediate":
            unit = _COLUMNS if whole % _COLUMNS == 0 and whole >= _COLUMNS * size else 1
            start, stop = (unit * edge for edge in _even(whole // unit, size, rank))
            return Part(start, stop, stop - start)
        heads = self._query_heads() if axis == "query_heads" else self._kv_heads()
        unit = whole // (config.num_heads if axis == "query_heads" else config.num_kv_heads)
        return Part(heads[0] * unit, heads[1] * unit, (heads[1] - heads[0]) * unit)

    def _kv_heads(self) -> tuple[int, int]:
        """Whole key/value heads with all their query heads, as evenly as they go; one that several ranks share where
        there are more ranks than heads."""
        if self.shard.size <= self.config.num_kv_heads:
            return _even(self.config.num_kv_heads, self.shard.size, self.shard.rank)
        head, _, _ = self._sharers()
        return head, head + 1

    def _query_heads(self) -> tuple[int, int]:
        queries = self.config.num_heads // self.config.num_kv_heads
        if self.shard.size <= self.config.num_kv_heads:
            first, last = self._kv_heads()
            return first * queries, last * queries
        head, place, sharers = self._sharers()
        first, last = _even(queries, sharers, place)
        return head * queries + first, head * queries + last

    def _sharers(self) -> tuple[int, int, int]:
        """This rank's key/value head, its place among the ranks that share it, and how many they are."""
        for head in range(self.config.num_kv_heads):
            first, last = _even(self.shard.size, self.config.num_kv_heads, head)
            if first <= self.shard.rank < last:
                return head, self.shard.rank - first, last - first
        raise AssertionError(f"rank {self.shard.rank} of {self.shard.size}")


def check_can_shard(config: ModelConfig, size: int) -> None:
    """Raises ValueError if a model has too few heads or columns for so many ranks."""
    sharers = -(-size // config.num_kv_heads)
    queries = config.num_heads // config.num_kv_heads
    if sharers > queries:
        raise ValueError(
            f"tensor_parallel_size is {size}: the model has {config.num_kv_heads} key/value heads with {queries} query"
            f" heads each, enough for {config.num_kv_heads * queries} ranks"
        )
    if size > config.intermediate_size:
        raise ValueError(f"tensor_parallel_size is {size}, the model's intermediate_size is {config.intermediate_size}")


def _even(count: int, size: int, rank: int) -> tuple[int, int]:
    """The first and the one after the last of `count` things that a rank has; lower ranks have one more."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)
