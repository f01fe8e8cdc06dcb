"""The other ranks of a tensor-parallel model, as the model runner sees them."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from dispec.engine.execution.input_buffers import StepShape


@runtime_checkable
class Ranks(Protocol):
    """Has every other rank compute what this rank computes (`engine.distributed.tensor_parallel`).

    An exception inside of one of the context managers leaves the ranks in unknown states: it becomes a
    TensorParallelError, `is_broken` becomes True, and nothing is computed afterwards.
    """

    @property
    def is_broken(self) -> bool:
        """Whether a rank has failed."""

    def copy_blocks(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Copy KV cache blocks, each from the first of a pair to the second."""

    def step(self, shape: StepShape, inputs: bytes, *, is_compiled: bool) -> AbstractContextManager[None]:
        """Run the model on step inputs. is_compiled: with compiled functions."""

    def head(self, hidden: bytes) -> AbstractContextManager[None]:
        """Compute the logits of hidden states, [R, E] in the weights' dtype."""
