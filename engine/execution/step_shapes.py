"""The shapes that compiled steps are padded to, so that few graphs serve all of them."""

from dispec.engine.execution.execution_plan import ExecutionPlan
from dispec.engine.execution.input_buffers import StepShape

# Tokens of ragged steps: at most half as large again as the step from 32 on, at most an eighth from 4096 on, where a
# step is long enough for its padding to be felt.
_TOKENS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_PER_DOUBLING = 8

# What a step is traced with. The compiler would unify two sizes that are equal, and specialise on a size of 1.
TRACED_DECODE = StepShape(tokens=6, sequences=3, blocks=5, rows=6, query_len=2)
TRACED_PREFILL = StepShape(tokens=19, sequences=3, blocks=5, rows=2, query_len=None)


def sequence_sizes(max_num_seqs: int) -> list[int]:
    """Sequences of uniform steps: fine steps where one more costs much, coarse ones later."""
    sizes = [2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max(2, max_num_seqs)]


def token_sizes(max_num_tokens: int) -> list[int]:
    """Tokens of ragged steps, up to the largest step's."""
    sizes = list(_TOKENS)
    while sizes[-1] < max_num_tokens:
        base = sizes[-1]
        sizes += range(base + base // _PER_DOUBLING, 2 * base + 1, base // _PER_DOUBLING)
    return [size for size in sizes if size < max_num_tokens] + [max(2, max_num_tokens)]


class StepShapes:
    """Chooses the shape in which a step runs.

    max_blocks: of a sequence. max_query_len: as in `ExecutionPlan`.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_drafts: int,
        max_blocks: int,
        max_query_len: int,
    ) -> None:
        self._plan = plan
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_num_seqs * (1 + max_num_drafts)
        self._sequences = sequence_sizes(max_num_seqs)
        self._tokens = token_sizes(max_num_batched_tokens)
        self._max_blocks = max_blocks
        self._query_lens = range(1, max_query_len + 1)

    @property
    def largest(self) -> StepShape:
        """A shape that has room for every step, traced ones included."""
        sequences = self._sequences[-1]
        tokens = max(self._tokens[-1], sequences * max(self._query_lens, default=1), TRACED_PREFILL.tokens)
        return StepShape(
            tokens=tokens,
            sequences=max(sequences, TRACED_PREFILL.sequences),
            blocks=max(self._max_blocks, TRACED_PREFILL.blocks),
            # A uniform step that is compiled has a row for each token.
            rows=max(self._max_rows, tokens if self._plan.compile != "off" else 0, TRACED_DECODE.rows),
            query_len=None,
        )

    def recorded(self) -> list[StepShape]:
        """All shapes of padded steps, the largest first: the memory of its graph serves the smaller ones."""
        shapes = [self._uniform(size, query_len) for query_len in self._query_lens for size in self._sequences]
        shapes += [self._ragged(size) for size in self._tokens]
        return sorted(shapes, key=lambda shape: (shape.tokens, shape.rows), reverse=True)

    def of(self, exact: StepShape, *, is_compiled: bool) -> StepShape:
        """The shape in which a step of the exact shape runs."""
        if is_compiled and self._plan.replays:
            if exact.query_len is not None:
                size = next(size for size in self._sequences if size >= exact.sequences)
                return self._uniform(size, exact.query_len)
            return self._ragged(next(size for size in self._tokens if size >= exact.tokens))
        if not is_compiled:
            return exact._replace(blocks=self._max_blocks) if self._plan.device == "cuda" else exact
        # A size of 1 would be another graph to the compiler.
        sequences = max(2, exact.sequences)
        if exact.query_len is not None:
            tokens = sequences * exact.query_len
            return StepShape(tokens, sequences, max(2, exact.blocks), tokens, exact.query_len)
        return StepShape(max(2, exact.tokens), sequences, max(2, exact.blocks), max(2, exact.rows), None)

    def _uniform(self, sequences: int, query_len: int) -> StepShape:
        tokens = sequences * query_len
        return StepShape(tokens, sequences, self._max_blocks, tokens, query_len)

    def _ragged(self, tokens: int) -> StepShape:
        rows = max(2, self._max_num_seqs, min(tokens, self._max_rows))
        return StepShape(tokens, self._sequences[-1], self._max_blocks, rows, None)
