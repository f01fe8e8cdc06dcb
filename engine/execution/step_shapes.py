"""The shapes that compiled steps are padded to, so that few graphs serve all steps."""

from dispec.engine.execution.execution_plan import ExecutionPlan
from dispec.engine.execution.input_buffers import StepShape

# Tokens of ragged steps. Padding is at most 50 % from 32 tokens on, and 12.5 % from 4096 on, where it takes time.
_TOKENS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_PER_DOUBLING = 8

# The shapes that steps are traced with. The compiler would unify two equal sizes, and specialise on a size of 1.
TRACED_DECODE = StepShape(num_tokens=6, num_seqs=3, max_blocks_per_seq=5, num_sampled=6, query_len=2)
TRACED_PREFILL = StepShape(num_tokens=19, num_seqs=3, max_blocks_per_seq=5, num_sampled=2, query_len=None)


def sequence_sizes(max_num_seqs: int) -> list[int]:
    """Return the numbers of sequences of uniform steps: close to each other where one more sequence takes more time."""
    sizes = [2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max(2, max_num_seqs)]


def token_sizes(max_num_tokens: int) -> list[int]:
    """Return the numbers of tokens of ragged steps, up to the largest step's."""
    sizes = list(_TOKENS)
    while sizes[-1] < max_num_tokens:
        base = sizes[-1]
        sizes += range(base + base // _PER_DOUBLING, 2 * base + 1, base // _PER_DOUBLING)
    return [size for size in sizes if size < max_num_tokens] + [max(2, max_num_tokens)]


class StepShapes:
    """Chooses the shape in which a step runs.

    max_query_len: as in `ExecutionPlan`.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_draft_tokens: int,
        max_blocks_per_seq: int,
        max_query_len: int,
    ) -> None:
        self._plan = plan
        self._max_num_seqs = max_num_seqs
        self._max_sampled = max_num_seqs * (1 + max_num_draft_tokens)
        self._sequence_sizes = sequence_sizes(max_num_seqs)
        self._token_sizes = token_sizes(max_num_batched_tokens)
        self._max_blocks_per_seq = max_blocks_per_seq
        self._query_lens = range(1, max_query_len + 1)

    @property
    def largest(self) -> StepShape:
        """Return a shape that has room for every step, traced ones included."""
        num_seqs = self._sequence_sizes[-1]
        num_tokens = max(self._token_sizes[-1], num_seqs * max(self._query_lens, default=1), TRACED_PREFILL.num_tokens)
        # A compiled uniform step samples at each token.
        num_sampled = self._max_sampled if self._plan.compile == "off" else max(self._max_sampled, num_tokens)
        return StepShape(
            num_tokens=num_tokens,
            num_seqs=max(num_seqs, TRACED_PREFILL.num_seqs),
            max_blocks_per_seq=max(self._max_blocks_per_seq, TRACED_PREFILL.max_blocks_per_seq),
            num_sampled=max(num_sampled, TRACED_DECODE.num_sampled),
            query_len=None,
        )

    def recorded(self) -> list[StepShape]:
        """Return all shapes of padded steps, the largest first: smaller graphs reuse its memory."""
        shapes = [self._uniform(size, query_len) for query_len in self._query_lens for size in self._sequence_sizes]
        shapes += [self._ragged(size) for size in self._token_sizes]
        return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_sampled), reverse=True)

    def padded(self, exact: StepShape, *, is_compiled: bool) -> StepShape:
        """Return the shape in which a step of the exact shape runs."""
        if not is_compiled:
            is_cuda = self._plan.device == "cuda"
            return exact._replace(max_blocks_per_seq=self._max_blocks_per_seq) if is_cuda else exact
        if self._plan.replays:
            if exact.query_len is None:
                return self._ragged(next(size for size in self._token_sizes if size >= exact.num_tokens))
            num_seqs = next(size for size in self._sequence_sizes if size >= exact.num_seqs)
            return self._uniform(num_seqs, exact.query_len)
        # The compiler would make another graph for a size of 1.
        num_tokens, num_seqs, max_blocks_per_seq, num_sampled = (max(2, size) for size in exact[:4])
        if exact.query_len is not None:
            num_tokens = num_sampled = num_seqs * exact.query_len
        return StepShape(num_tokens, num_seqs, max_blocks_per_seq, num_sampled, exact.query_len)

    def _uniform(self, num_seqs: int, query_len: int) -> StepShape:
        num_tokens = num_seqs * query_len
        return StepShape(num_tokens, num_seqs, self._max_blocks_per_seq, num_tokens, query_len)

    def _ragged(self, num_tokens: int) -> StepShape:
        num_sampled = max(2, self._max_num_seqs, min(num_tokens, self._max_sampled))
        return StepShape(num_tokens, self._sequence_sizes[-1], self._max_blocks_per_seq, num_sampled, None)
