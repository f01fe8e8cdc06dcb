"""stub"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec


class Ticket(msgspec.Struct):
    engine_id: str
    transfer_id: str
    host: str
    port: int


class Pulled(NamedTuple):
    transfer_id: str
    payload: bytes


class PullFailed(NamedTuple):
    transfer_id: str
    reason: str


class Released(NamedTuple):
    transfer_id: str
    was_expired: bool


Event = Pulled | PullFailed | Released


@runtime_checkable
class Transfers(Protocol):
    def publish(self, transfer_id: str, blocks: Sequence[int], *, payload: bytes | None = None) -> None: ...
    def withdraw(self, transfer_id: str, reason: str) -> None: ...
    def pull(self, ticket: Ticket, skip: int, blocks: Sequence[int]) -> None: ...
    def poll(self) -> list[Event]: ...
    def fileno(self) -> int: ...
    def release(self, transfer_id: str) -> None: ...
    def close(self) -> None: ...
