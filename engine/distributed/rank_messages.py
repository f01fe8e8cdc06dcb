"""What the first rank of a tensor-parallel model tells the others, over their standard input.

The first line is a `Join`, as JSON; then come frames: the lengths of a message and of the bytes that come with it, the
message as msgpack, the bytes as they are.
"""

import struct
from typing import IO, Any

import msgspec

from dispec.engine.execution.input_buffers import StepShape
from dispec.engine.execution.kv_cache_memory import KVPlan
from dispec.layers.config import ModelConfig

_LENGTHS = struct.Struct("<II")


class Join(msgspec.Struct):
    """The first line of a follower's standard input, as JSON. `options` are the fields of `EngineOptions`.

    They name the follower's own device. config: the model's, if the options name no checkpoint. port: of the store
    where the ranks meet. num_threads: for its steps.
    """

    options: dict[str, Any]
    config: ModelConfig | None
    rank: int
    port: int
    num_threads: int


class Prepare(msgspec.Struct, tag=True):
    """Make a KV cache and room for steps."""

    plan: KVPlan
    max_num_batched_tokens: int


class Copy(msgspec.Struct, tag=True):
    """Copy blocks, each from the first of a pair to the second."""

    blocks: tuple[tuple[int, int], ...]


class Compute(msgspec.Struct, tag=True):
    """Run the model on the step inputs that come with this. is_compiled: with compiled functions."""

    shape: StepShape
    is_compiled: bool


class Head(msgspec.Struct, tag=True):
    """Compute the logits of hidden states, which come with this."""


Message = Prepare | Copy | Compute | Head
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def framed(message: Message, payload: bytes) -> bytes:
    """A message as it is sent, with what comes with it."""
    encoded = msgspec.msgpack.encode(message)
    return _LENGTHS.pack(len(encoded), len(payload)) + encoded + payload


def receive(pipe: IO[bytes]) -> tuple[Message, bytes] | None:
    """The next message and what comes with it; None at the end."""
    start = pipe.read(_LENGTHS.size)
    if len(start) < _LENGTHS.size:
        return None
    length, more = _LENGTHS.unpack(start)
    message, payload = pipe.read(length), pipe.read(more)
    return (_decoder.decode(message), payload) if len(payload) == more else None
