"""Work that all ranks of a tensor-parallel model do together, as messages from the first rank to the others."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import msgspec

from dispec.engine.execution.input_buffers import StepShape
from dispec.engine.execution.kv_cache_memory import KVPlan


class AllocateCache(msgspec.Struct, tag=True):
    """Allocate a KV cache and the buffers of steps, in place of earlier ones."""

    plan: KVPlan
    max_num_batched_tokens: int


class CopyBlocks(msgspec.Struct, tag=True):
    """Copy blocks, each from the first of a pair to the second."""

    blocks: tuple[tuple[int, int], ...]


class RunStep(msgspec.Struct, tag=True):
    """Run the model on a step's inputs. is_compiled: with compiled functions."""

    shape: StepShape
    inputs: bytes
    is_compiled: bool


class ComputeLogits(msgspec.Struct, tag=True):
    """Compute the logits of hidden states, [R, E] in the weights' dtype."""

    hidden: bytes


Message = AllocateCache | CopyBlocks | RunStep | ComputeLogits


@runtime_checkable
class Ranks(Protocol):
    """The other ranks (`engine.distributed.tensor_parallel`). They execute messages in order."""

    @property
    def is_broken(self) -> bool:
        """Whether a rank has failed, so that nothing can be computed any more."""

    def check(self) -> None:
        """Raise TensorParallelError if a rank has failed: results of steps since then may be wrong."""

    def send(self, message: Message) -> None:
        """Send a message to every other rank."""

    def together(self, message: Message) -> AbstractContextManager[None]:
        """Send a message for the time of a computation of this rank that takes part in the same sums.

        If the computation fails, the other ranks may wait in a sum: the model is broken, and TensorParallelError is
        raised.
        """
