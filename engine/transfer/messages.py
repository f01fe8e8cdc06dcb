"""Messages between puller and source after the handshake, in msgpack.

The puller connects. It queries which blocks are ready from an index on (a long poll: the answer comes when more are
ready), reads them, and reports when it is done. Each request may be repeated: an answer that comes twice or late
changes nothing. An index is a block's number within its transfer, a block number its place in the source's cache.
"""

from typing import Annotated

import msgspec

from dispec.engine.transfer.interface import MAX_PAYLOAD_BYTES, Identifier

CHECKSUM_BYTES = 8
MAX_BLOCKS = 4096  # in one message
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (256 << 10)

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Checksum = Annotated[bytes, msgspec.Meta(min_length=CHECKSUM_BYTES, max_length=CHECKSUM_BYTES)]
Reason = Annotated[str, msgspec.Meta(max_length=2048)]
TransportName = Annotated[str, msgspec.Meta(max_length=16)]


class QueryBlocks(msgspec.Struct, tag=True, frozen=True):
    """Ask which blocks are ready from index `first` on. has_payload: the puller has the payload already."""

    transfer_id: Identifier
    first: Count
    has_payload: bool


class ReadBlocks(msgspec.Struct, tag=True, frozen=True):
    """Ask for the bytes of `count` blocks from index `first` on."""

    transfer_id: Identifier
    read_id: Count
    first: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]


class PullDone(msgspec.Struct, tag=True, frozen=True):
    """The puller reads nothing more of this transfer."""

    transfer_id: Identifier


class OpenMemory(msgspec.Struct, tag=True, frozen=True):
    """Ask for a handle to read the source's KV cache directly."""

    transport: TransportName


class BlocksReady(msgspec.Struct, tag=True, frozen=True):
    """Block numbers in the source's cache from index `first` on, and their checksums. Without any: a sign of life.

    total: number of blocks of the transfer, once it is complete and this message reaches its end. payload: then too,
    unless the puller has it.
    """

    transfer_id: Identifier
    first: Count
    blocks: Annotated[list[Count], msgspec.Meta(max_length=MAX_BLOCKS)] = []
    checksums: Annotated[list[Checksum], msgspec.Meta(max_length=MAX_BLOCKS)] = []
    total: Count | None = None
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD_BYTES)] | None = None

    def __post_init__(self) -> None:
        if len(self.checksums) != len(self.blocks):
            raise ValueError(f"{len(self.checksums)} checksums for {len(self.blocks)} blocks")
        if self.payload is not None and self.total is None:
            raise ValueError("a payload before the end of the transfer")


class BlockData(msgspec.Struct, tag=True, frozen=True):
    """The bytes of a read follow: each layer's keys, then each layer's values, each of all blocks in order."""

    read_id: Count
    num_bytes: Count


class TransferEnded(msgspec.Struct, tag=True, frozen=True):
    """The transfer was withdrawn, released or has expired: nothing more of it can be read."""

    transfer_id: Identifier
    reason: Reason


class MemoryHandle(msgspec.Struct, tag=True, frozen=True):
    """What a transport needs to read the source's KV cache; problem: why it cannot be read."""

    metadata: bytes = b""
    problem: Reason | None = None


FromPuller = QueryBlocks | ReadBlocks | PullDone | OpenMemory
FromSource = BlocksReady | BlockData | TransferEnded | MemoryHandle

decode_from_puller = msgspec.msgpack.Decoder(FromPuller).decode
decode_from_source = msgspec.msgpack.Decoder(FromSource).decode
encode = msgspec.msgpack.Encoder().encode
