"""A model over a paged cache without an engine: a test says which tokens to compute and gets the logits of each."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from dispec.layers import model
from dispec.layers.config import ModelConfig
from dispec.layers.types import Batch, KVCache, Weights
from dispec.ops.kv_cache import scale_rows

Forward = Callable[[Weights, ModelConfig, Batch, KVCache], Tensor]


class PagedModel:
    """Sequences with shuffled block tables in a cache whose unwritten slots are NaN.

    cache_dtype: of keys and values, None for that of the weights.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        prompts: list[list[int]],
        block_size: int = 16,
        forward: Forward = model.forward,
        seed: int = 0,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.weights, self.config, self.prompts, self.block_size, self.forward = (
            weights,
            config,
            prompts,
            block_size,
            forward,
        )
        self.computed = [0] * len(prompts)
        blocks_each = [-(-len(prompt) // block_size) for prompt in prompts]
        numbers = list(range(1, sum(blocks_each) + 4))
        random.Random(seed).shuffle(numbers)
        self.tables = [[numbers.pop() for _ in range(count)] for count in blocks_each]
        shape = (config.num_layers, sum(blocks_each) + 4, config.num_kv_heads)
        dtype = cache_dtype or weights.final_norm.dtype
        rows = config.head_dim + scale_rows(dtype)
        # All ones are NaN in every floating-point type, and in the scales of int8.
        self.kv_cache = KVCache(
            *(
                torch.full((*shape, *page), -1, dtype=torch.int8).repeat_interleave(dtype.itemsize, -1).view(dtype)
                for page in ((rows, block_size), (block_size, rows))
            )
        )

    def compute(self, counts: dict[int, int], query_len: int | None = None) -> list[Tensor]:
        """Compute the next `counts[s]` tokens of each sequence s in one step; return their logits by sequence."""
        width = max(2, *(len(table) for table in self.tables))
        token_ids, positions, slots, starts, contexts, tables = [], [], [], [0], [], []
        for sequence, count in counts.items():
            first = self.computed[sequence]
            table = self.tables[sequence]
            for position in range(first, first + count):
                token_ids.append(self.prompts[sequence][position])
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            self.computed[sequence] = first + count
            starts.append(len(token_ids))
            contexts.append(first + count)
            tables.append(table + [0] * (width - len(table)))
        batch = Batch(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            logits_indices=torch.arange(len(token_ids)),
            query_len=query_len,
        )
        with torch.inference_mode():
            logits = self.forward(self.weights, self.config, batch, self.kv_cache)
        return list(logits.split(list(counts.values())))
