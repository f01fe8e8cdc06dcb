"""The part of a model that a rank has under tensor parallelism (Megatron-LM, arXiv:1909.08053).

Attention heads, the MLP's columns and the vocabulary are split over the ranks; every rank has all norms. A layer takes
two sums over the ranks, one after attention and one after the MLP. A rank's parts follow from the weights'
declaration, which names what each dimension counts.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dispec.layers.config import ModelConfig, Shard

Axis = Literal["query_heads", "kv_heads", "intermediate", "vocabulary", "once"]

_MLP_TILE = 64  # columns of the MLP that stay in one rank where there are enough: what kernels read at once


class Part(NamedTuple):
    """Elements `start` to `stop` of a dimension, as the first of the rank's `size` elements; the others are zero."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Sharding:
    """The parts of one rank. `config` is the whole model's."""

    config: ModelConfig
    shard: Shard

    def local_config(self) -> ModelConfig:
        """Return the rank's model: its own heads and columns, the whole hidden size and vocabulary."""
        config = self.config
        return replace(
            config,
            num_heads=self.part("query_heads", config.num_heads).size,
            num_kv_heads=self.part("kv_heads", config.num_kv_heads).size,
            intermediate_size=self.part("intermediate", config.intermediate_size).size,
            shard=self.shard,
        )

    def part(self, axis: Axis | None, whole: int) -> Part:
        """Return the rank's part of a dimension of `whole` elements."""
        config, (rank, size) = self.config, (self.shard.rank, self.shard.size)
        if axis is None:
            return Part(0, whole, whole)
        if axis == "once":  # a bias that is added to a sum over the ranks
            return Part(0, whole if rank == 0 else 0, whole)
        if axis == "vocabulary":
            rows = self.shard.vocab_rows(whole)
            start = min(whole, rank * rows)
            return Part(start, min(whole, start + rows), rows)
        if axis == "intermediate":
            unit = _MLP_TILE if whole % _MLP_TILE == 0 and whole >= _MLP_TILE * size else 1
            start, stop = (unit * edge for edge in _even(whole // unit, size, rank))
            return Part(start, stop, stop - start)
        heads = self._query_heads() if axis == "query_heads" else self._kv_heads()
        unit = whole // (config.num_heads if axis == "query_heads" else config.num_kv_heads)
        return Part(heads[0] * unit, heads[1] * unit, (heads[1] - heads[0]) * unit)

    def _kv_heads(self) -> tuple[int, int]:
        """Return the first and the end of the rank's key/value heads: even shares of whole heads, or with more ranks
        than heads one that several ranks share."""
        if self.shard.size <= self.config.num_kv_heads:
            return _even(self.config.num_kv_heads, self.shard.size, self.shard.rank)
        head, _, _ = self._sharers()
        return head, head + 1

    def _query_heads(self) -> tuple[int, int]:
        """Return the first and the end of the rank's query heads: all of its key/value heads, or its share of them."""
        queries = self.config.num_heads // self.config.num_kv_heads
        if self.shard.size <= self.config.num_kv_heads:
            first, last = self._kv_heads()
            return first * queries, last * queries
        head, place, sharers = self._sharers()
        first, last = _even(queries, sharers, place)
        return head * queries + first, head * queries + last

    def _sharers(self) -> tuple[int, int, int]:
        """Return the rank's key/value head, its place among the ranks that share the head, and their number."""
        for head in range(self.config.num_kv_heads):
            first, last = _even(self.shard.size, self.config.num_kv_heads, head)
            if first <= self.shard.rank < last:
                return head, self.shard.rank - first, last - first
        raise AssertionError(f"rank {self.shard.rank} of {self.shard.size}")


def check_can_shard(config: ModelConfig, size: int) -> None:
    """Raise ValueError if a model has too few heads or columns for `size` ranks."""
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
    """Return the first and the end of a rank's even share of `count` elements; lower ranks have one more."""
    each, more = divmod(count, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)
