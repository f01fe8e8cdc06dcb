"""What puller and source say to each other, once each knows that the other has the secret.

The puller connects to the source. It asks what is ready beyond a place (a long poll: the answer comes when there is
news), reads what it is told of, and says when it is done. Every question may be repeated, and an answer that comes
twice or late changes nothing. A place is a block's number within its transfer.
"""

from typing import Annotated

import msgspec

from dispec.engine.transfer.interface import MAX_PAYLOAD_BYTES, Identifier

CHECKSUM_BYTES = 8
MAX_PLACES = 4096  # in one answer
MAX_HEADER_BYTES = 256 << 10

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Places = Annotated[int, msgspec.Meta(ge=1, le=MAX_PLACES)]


class Ask(msgspec.Struct, tag=True, frozen=True):
    """What is ready from place `beyond` on? has_end: the asker knows the number of places and has the payload."""

    transfer_id: Identifier
    beyond: Count
    has_end: bool


class Read(msgspec.Struct, tag=True, frozen=True):
    """Send the blocks of `count` places, over this connection."""

    transfer_id: Identifier
    read_id: Count
    first: Count
    count: Places


class Done(msgspec.Struct, tag=True, frozen=True):
    """The puller reads nothing more of this transfer."""

    transfer_id: Identifier


class OpenMemory(msgspec.Struct, tag=True, frozen=True):
    """Let the asker read the source's pages by itself. metadata: of the asker, where the transport has some."""

    transport: Annotated[str, msgspec.Meta(max_length=16)]
    metadata: bytes


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The source's own `blocks` that hold the places from `first` on, and their checksums, 8 bytes each.

    total: of places in the transfer, once it is complete and the answer reaches its end.
    payload_bytes: that follow this message; None where it was not asked for or is not there.
    Without any of it, it says that the source is still there.
    """

    transfer_id: Identifier
    first: Count
    blocks: Annotated[list[Count], msgspec.Meta(max_length=MAX_PLACES)]
    checksums: Annotated[bytes, msgspec.Meta(max_length=MAX_PLACES * CHECKSUM_BYTES)]
    total: Count | None = None
    payload_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD_BYTES)] | None = None


class Data(msgspec.Struct, tag=True, frozen=True):
    """The bytes of a read follow: every layer's keys, then its values, each of all blocks in order."""

    read_id: Count
    num_bytes: Count


class Gone(msgspec.Struct, tag=True, frozen=True):
    """The transfer was withdrawn, has expired or was released: nothing more of it can be had."""

    transfer_id: Identifier
    reason: Annotated[str, msgspec.Meta(max_length=2048)]


class Memory(msgspec.Struct, tag=True, frozen=True):
    """How to read the source's pages; `problem` says why it cannot be."""

    metadata: bytes
    problem: Annotated[str, msgspec.Meta(max_length=2048)] | None = None


def checksums_of(ready: Ready) -> list[bytes]:
    """One for each block."""
    return [ready.checksums[at : at + CHECKSUM_BYTES] for at in range(0, len(ready.checksums), CHECKSUM_BYTES)]


def contradiction(ready: Ready) -> str | None:
    """What in an answer does not fit the rest of it; None if all does."""
    if len(ready.checksums) != CHECKSUM_BYTES * len(ready.blocks):
        return f"the source sent {len(ready.checksums)} bytes of checksums for {len(ready.blocks)} blocks"
    if ready.payload_bytes is not None and ready.total is None:
        return "the source sent a payload before the end"
    return None


FromPuller = Ask | Read | Done | OpenMemory
FromSource = Ready | Data | Gone | Memory

decode_from_puller = msgspec.msgpack.Decoder(FromPuller).decode
decode_from_source = msgspec.msgpack.Decoder(FromSource).decode
encode = msgspec.msgpack.Encoder().encode
