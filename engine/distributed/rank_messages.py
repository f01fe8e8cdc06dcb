"""What the first rank of a tensor-parallel model sends to the others, over their standard input.

The first line is a `JoinGroup` as JSON. Frames follow: the lengths of a message and of its payload, the message as
msgpack, the payload as it is.
"""

import struct
from typing import IO, Any

import msgspec

from dispec.engine.execution.input_buffers import StepShape
from dispec.engine.execution.kv_cache_memory import KVPlan
from dispec.layers.config import ModelConfig

_LENGTHS = struct.Struct("<II")


class JoinGroup(msgspec.Struct):
    """Join the process group and load a rank's part of the weights.

    options: the fields of `EngineOptions`, with the follower's own device.
    config: of the model, where the options name no checkpoint.
    port: of the store at which the ranks meet.
    num_threads: of torch, in the follower.
    """

    options: dict[str, Any]
    config: ModelConfig | None
    rank: int
    port: int
    num_threads: int


class AllocateCache(msgspec.Struct, tag=True):
    """Allocate a KV cache and the buffers of steps, in place of earlier ones."""

    plan: KVPlan
    max_num_batched_tokens: int


class CopyBlocks(msgspec.Struct, tag=True):
    """Copy blocks, each from the first of a pair to the second."""

    blocks: tuple[tuple[int, int], ...]


class RunStep(msgspec.Struct, tag=True):
    """Run the model on the payload, a step's inputs. is_compiled: with compiled functions."""

    shape: StepShape
    is_compiled: bool


class ComputeLogits(msgspec.Struct, tag=True):
    """Compute the logits of the payload, hidden states."""


Message = AllocateCache | CopyBlocks | RunStep | ComputeLogits
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_frame(message: Message, payload: bytes) -> bytes:
    """Return the bytes of a message and its payload."""
    encoded = msgspec.msgpack.encode(message)
    return _LENGTHS.pack(len(encoded), len(payload)) + encoded + payload


def read_frame(pipe: IO[bytes]) -> tuple[Message, bytes] | None:
    """Return the next message and its payload; None at the end of the pipe."""
    lengths = pipe.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    message_length, payload_length = _LENGTHS.unpack(lengths)
    message, payload = pipe.read(message_length), pipe.read(payload_length)
    return (_decoder.decode(message), payload) if len(payload) == payload_length else None
