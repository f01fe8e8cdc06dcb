"""Steps as recorded CUDA graphs.

A step that decodes is one compiled function, recorded for each bucket of sequences: a replay takes the host a fraction
of what the compiler's own replaying does, which looks at every weight each time. A ragged step is compiled layer by
layer, and the host takes 15 to 20 ms to launch the kernels of 28 layers: as long as an H100 computes 3,000 tokens of a
model of 1.5 B parameters. Steps of fewer tokens are therefore padded to one of a few sizes and replayed as a graph of
the same compiled layers, which costs no further compilation. So are steps that verify as many guesses of each sequence,
a graph for each number of guesses and bucket of sequences.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engine.step_inputs import StepShape

# Hidden states of all tokens, unless the step is uniform; logits and argmax of the rows.
Outputs = tuple[Tensor | None, Tensor, Tensor]

# Sizes that ragged steps are padded to, at most half as large again as the step from 32 tokens on. Past the last one
# the device is the slower of the two, and the host launches the kernels of one layer while it runs those of another.
TOKEN_SIZES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def ragged_shapes(max_tokens: int, sequences: int, blocks: int, max_num_seqs: int, num_drafts: int) -> list[StepShape]:
    """Shapes to record for ragged steps of up to `max_tokens`; each has rows for guesses, if there are any."""
    sizes = [size for size in TOKEN_SIZES if size < max_tokens]
    if max_tokens <= TOKEN_SIZES[-1]:
        sizes.append(max_tokens)
    return [
        StepShape(size, sequences, blocks, max(max_num_seqs, min(size, max_num_seqs * (1 + num_drafts))), None)
        for size in sizes
    ]


class StepGraphs:
    """Graphs of steps by their shape.

    All return the same tensors: a replay overwrites what the one before it returned, so whatever uses that must have
    been launched by then.
    """

    def __init__(self, shapes: Iterable[StepShape]) -> None:
        self._shapes = sorted(shapes, key=lambda shape: (shape.tokens, shape.rows))
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._outputs: tuple[Tensor, Tensor, Tensor] | None = None

    def record(self, prepare: Callable[[StepShape], Callable[[], Outputs]], hidden_like: Tensor) -> None:
        """Record every shape. `prepare` writes the inputs of a step of padding and returns what launches it.
        hidden_like: rows of the size and type of hidden states."""
        pool = torch.cuda.graph_pool_handle()
        for shape in reversed(self._shapes):  # the largest first, whose memory the others then reuse
            launch = prepare(shape)
            outputs = launch()
            if self._outputs is None:
                # One set for all, or each graph would keep logits of its own.
                _, logits, chosen = outputs
                rows = max(each.rows for each in self._shapes)
                tokens = max((each.tokens for each in self._shapes if each.query_len is None), default=0)
                self._outputs = (
                    hidden_like.new_empty(tokens, hidden_like.shape[1]),
                    logits.new_empty(rows, logits.shape[1]),
                    chosen.new_empty(rows),
                )
            del outputs
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden, *of_rows = launch()
                for kept, output in zip(self._outputs[1:], of_rows, strict=True):
                    kept[: len(output)].copy_(output)
                if hidden is not None and shape.query_len is None:
                    self._outputs[0][: len(hidden)].copy_(hidden)
            self._graphs[shape] = graph

    def padded(self, shape: StepShape) -> StepShape:
        """The smallest recorded shape that has room for a step; its own shape if there is none."""
        return next((wide for wide in self._shapes if wide in self._graphs and _fits(shape, wide)), shape)

    def replay(self, shape: StepShape) -> Outputs | None:
        """Launch the graph of a shape, if it was recorded."""
        if shape not in self._graphs:
            return None
        assert self._outputs is not None
        self._graphs[shape].replay()
        hidden, logits, chosen = self._outputs
        states = hidden[: shape.tokens] if shape.query_len is None else None
        return states, logits[: shape.rows], chosen[: shape.rows]


def _fits(shape: StepShape, wide: StepShape) -> bool:
    """Of uniform steps only the number of sequences can be padded."""
    if shape.query_len != wide.query_len:
        return False
    return shape.tokens <= wide.tokens and shape.sequences <= wide.sequences and shape.rows <= wide.rows
