"""Events and options of KV transfer. No torch, so that the server process can import it."""

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

Transport = Literal["shm", "cuda_ipc", "nixl", "tcp"]
TRANSPORTS: tuple[Transport, ...] = ("shm", "cuda_ipc", "nixl", "tcp")  # in the order that "auto" prefers

MAX_ID_CHARACTERS = 256
MAX_PAYLOAD_BYTES = 16 << 20
MIN_SECRET_BYTES = 16

Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARACTERS)]


class RemoteBlocks(msgspec.Struct, frozen=True):
    """Handle of a transfer at its source. Routers pass it on to the engine that pulls."""

    engine_id: Identifier
    transfer_id: Identifier
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


@dataclass(frozen=True)
class Pulled:
    """All blocks are in place and their checksums match. payload: the source's bytes, passed through."""

    transfer_id: str
    payload: bytes


@dataclass(frozen=True)
class PullFailed:
    """The pull writes to its blocks no more; their contents are undefined."""

    transfer_id: str
    reason: str


@dataclass(frozen=True)
class Released:
    """Published blocks belong to the engine again. was_expired: no puller acknowledged them within the lease."""

    transfer_id: str
    was_expired: bool


Event = Pulled | PullFailed | Released


@dataclass(frozen=True)
class TransferOptions:
    """Settings of one engine process's transfers. `EngineOptions` checks those that users set.

    engine_id: unique to this process; a process that had its address before has another one.
    host, port: to listen on; port 0 takes a free one.
    secret: shared by all peers; None only on loopback. It authenticates and does not encrypt.
    transports: those allowed, in order of preference.
    lease_seconds: how long published blocks are kept without a message from their puller.
    connect_seconds: limit for a connection and its handshake.
    stall_seconds: silence within an exchange after which a peer counts as lost.
    pull_seconds: time without progress after which a pull fails, time in the source's queue included.
    max_connections, max_handshakes: limits of this source; a handshake is a connection not yet authenticated.
    read_bytes: size of one read request.
    """

    engine_id: str
    host: str = "127.0.0.1"
    port: int = 0
    secret: str | None = None
    transports: tuple[Transport, ...] = TRANSPORTS
    lease_seconds: float = 60
    connect_seconds: float = 5
    stall_seconds: float = 20
    pull_seconds: float = 120
    max_connections: int = 64
    max_handshakes: int = 8
    read_bytes: int = 8 << 20

    @property
    def secret_bytes(self) -> bytes:
        """The secret, or nothing, which peers without one share."""
        return (self.secret or "").encode()


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address or "localhost". Other names may resolve to any address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
