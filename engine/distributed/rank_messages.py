"""How messages reach the follower ranks: over their standard input.

The first line is a `JoinGroup` as JSON. Each message that follows is its length and itself, as msgpack.
"""

import struct
from typing import IO, Any

import msgspec

from dispec.engine.execution.ranks import Message
from dispec.layers.config import ModelConfig

_LENGTH = struct.Struct("<I")
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


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


def encode_frame(message: Message) -> bytes:
    """Return a message with its length in front."""
    encoded = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(encoded)) + encoded


def read_message(pipe: IO[bytes]) -> Message | None:
    """Return the next message; None at the end of the pipe."""
    prefix = pipe.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    encoded = pipe.read(length)
    return _decoder.decode(encoded) if len(encoded) == length else None
