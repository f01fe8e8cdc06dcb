"""What an engine says to its transfers and hears from them. It needs no torch."""

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
    """Where a transfer is to be pulled from. It goes to the puller by way of whoever routes requests."""

    engine_id: Identifier
    transfer_id: Identifier
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


@dataclass(frozen=True)
class Pulled:
    """All blocks are in place and their checksums right. `payload` is the source's own."""

    transfer_id: str
    payload: bytes


@dataclass(frozen=True)
class PullFailed:
    """Nothing more will be written to the pull's blocks, and what they hold is of no use."""

    transfer_id: str
    reason: str


@dataclass(frozen=True)
class Released:
    """Published blocks are the engine's again.

    was_expired: nobody acknowledged the transfer within the lease.
    """

    transfer_id: str
    was_expired: bool


Event = Pulled | PullFailed | Released


@dataclass(frozen=True)
class TransferOptions:
    """How an engine process transfers. Raises ValueError for what cannot be meant.

    engine_id: tells this process from every other, one that had its address before included.
    host, port: to listen on; port 0 is any that is free.
    advertised_host: what tickets say, if not `host`: needed where that is a wildcard such as 0.0.0.0.
    secret: shared by all peers, at least 16 bytes; None only on loopback. It authenticates and does not encrypt.
    transports: those allowed, the preferred ones first. "auto" is shm, cuda_ipc, nixl, tcp.
    lease_seconds: how long published blocks wait for a contact of their puller.
    connect_seconds: for a connection and its handshake.
    stall_seconds: of silence in the middle of something, after which a peer counts as lost.
    pull_seconds: without progress, after which a pull fails; the time in the source's queue counts.
    max_connections: that may be open to this source; max_handshakes: of which not authenticated yet.
    read_bytes: that a puller asks for at once.
    """

    engine_id: str
    host: str = "127.0.0.1"
    port: int = 0
    advertised_host: str | None = None
    secret: bytes | None = None
    transports: tuple[Transport, ...] | Literal["auto"] = "auto"
    lease_seconds: float = 60
    connect_seconds: float = 5
    stall_seconds: float = 20
    pull_seconds: float = 120
    max_connections: int = 64
    max_handshakes: int = 8
    read_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if not 0 < len(self.engine_id) <= MAX_ID_CHARACTERS:
            raise ValueError(f"engine_id has {len(self.engine_id)} characters, must have 1 to {MAX_ID_CHARACTERS}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, must be 0 to 65535")
        if self.secret is None and not is_loopback(self.host):
            raise ValueError(f"host is {self.host}, not a loopback address: that needs a secret")
        if self.secret is not None and len(self.secret) < MIN_SECRET_BYTES:
            raise ValueError(f"secret has {len(self.secret)} bytes, must have at least {MIN_SECRET_BYTES}")
        for name in ("lease_seconds", "connect_seconds", "stall_seconds", "pull_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be more than 0")
        for name in ("max_connections", "max_handshakes", "read_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if unknown := set(self.allowed) - set(TRANSPORTS):
            raise ValueError(f"transports has {sorted(unknown)}, must be of {', '.join(TRANSPORTS)}")
        if not self.allowed:
            raise ValueError("transports is empty")

    @property
    def allowed(self) -> tuple[Transport, ...]:
        """The transports that may be used, the preferred ones first."""
        return TRANSPORTS if self.transports == "auto" else self.transports


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is of this machine alone. Other names may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
