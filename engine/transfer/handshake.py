"""Who connects, and who answers: each proves that it has the secret before it is told anything.

Challenge and response with HMAC-SHA256 (RFC 2104) over both sides' fresh nonces; the roles are in what is signed, so
that no answer can be reflected, and so is what each says of itself, so that it cannot be changed. The secret never goes
over the wire. It is authentication and not encryption: who can read the network can read the blocks.
"""

import hmac
import secrets
from typing import Annotated, Any

import msgspec

from dispec.engine.transfer.interface import Identifier
from dispec.engine.transfer.messages import encode
from dispec.engine.transfer.wire import Connection

PROTOCOL_VERSION = 2
NONCE_BYTES = 32
MAX_GREETING_BYTES = 512  # that anybody may send
MAX_HELLO_BYTES = 64 << 10  # that a peer may say of itself

Bytes32 = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]


class Hello(msgspec.Struct, frozen=True):
    """What a process says of itself.

    layer_bytes: of one block in one layer's keys, and in its values; num_blocks: in each of them.
    host_id, user_id: the running kernel and the user, so that two on one machine find out.
    unix_name: of the abstract socket where the memory's descriptor can be had; empty where there is none.
    """

    engine_id: Identifier
    fingerprint: Annotated[str, msgspec.Meta(max_length=1024)]
    num_layers: Positive
    num_blocks: Positive
    layer_bytes: Positive
    device: Annotated[str, msgspec.Meta(max_length=16)]
    transports: Annotated[list[Annotated[str, msgspec.Meta(max_length=16)]], msgspec.Meta(max_length=8)]
    host_id: Annotated[str, msgspec.Meta(max_length=64)]
    user_id: int
    unix_name: Annotated[str, msgspec.Meta(max_length=64)] = ""
    lease_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    version: int = PROTOCOL_VERSION

    @property
    def block_bytes(self) -> int:
        """Of a block in all layers."""
        return 2 * self.num_layers * self.layer_bytes


class _Version(msgspec.Struct):
    """What every version of a hello has."""

    version: int


class _Greeting(msgspec.Struct, tag="dispec-transfer"):
    nonce: Bytes32


class _Challenge(msgspec.Struct, tag=True):
    nonce: Bytes32
    proof: Bytes32


class _Answer(msgspec.Struct, tag=True):
    proof: Bytes32
    hello: bytes


class _Welcome(msgspec.Struct, tag=True):
    proof: Bytes32
    hello: bytes


class _Refusal(msgspec.Struct, tag=True):
    reason: Annotated[str, msgspec.Meta(max_length=2048)]


_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_version = msgspec.msgpack.Decoder(_Version).decode


class Refused(ConnectionError):
    """The peer, or this side, does not want to go on; the message says why."""


def greet(connection: Connection, secret: bytes, hello: Hello) -> Hello:
    """The puller's side. Raises Refused, or ConnectionError if the other side does not answer in time."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.send(_Greeting(nonce))
    challenge = connection.receive(msgspec.msgpack.Decoder(_Challenge | _Refusal).decode, MAX_HELLO_BYTES)
    if isinstance(challenge, _Refusal):
        raise Refused(f"the source refused: {challenge.reason}")
    nonces = nonce + challenge.nonce
    _check(challenge.proof, secret, b"source", nonces, b"", "the source does not have our secret")
    said = encode(hello)
    connection.send(_Answer(_prove(secret, b"puller", nonces, said), said))
    welcome = connection.receive(msgspec.msgpack.Decoder(_Welcome | _Refusal).decode, MAX_HELLO_BYTES)
    if isinstance(welcome, _Refusal):
        raise Refused(f"the source refused: {welcome.reason}")
    _check(welcome.proof, secret, b"welcome", nonces, welcome.hello, "the source's welcome is forged")
    return _read_hello(welcome.hello)


def welcome(connection: Connection, secret: bytes, hello: Hello) -> Hello:
    """The source's side. Raises Refused, after telling the puller, or ConnectionError.

    Who does not have the secret costs one frame of 512 bytes in, one of some 64 KiB after it, and two hashes.
    """
    greeting = connection.receive(msgspec.msgpack.Decoder(_Greeting).decode, MAX_GREETING_BYTES)
    nonce = secrets.token_bytes(NONCE_BYTES)
    nonces = greeting.nonce + nonce
    connection.send(_Challenge(nonce, _prove(secret, b"source", nonces, b"")))
    answer = connection.receive(msgspec.msgpack.Decoder(_Answer).decode, MAX_HELLO_BYTES)
    try:
        _check(answer.proof, secret, b"puller", nonces, answer.hello, "the puller does not have our secret")
        peer = _read_hello(answer.hello)
        if difference := incompatible(hello, peer):
            raise Refused(difference)
    except Refused as refused:
        connection.send(_Refusal(str(refused)))
        raise
    said = encode(hello)
    connection.send(_Welcome(_prove(secret, b"welcome", nonces, said), said))
    return peer


def incompatible(source: Hello, puller: Hello) -> str | None:
    """Why blocks of one are of no use to the other; None if they are."""
    for name, mine, theirs in (
        ("fingerprint", source.fingerprint, puller.fingerprint),
        ("number of layers", source.num_layers, puller.num_layers),
        ("bytes of a block", source.block_bytes, puller.block_bytes),
    ):
        if mine != theirs:
            return f"{name} differs: the source has {_short(mine)}, the puller {_short(theirs)}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 256 else text[:253] + "..."


def _read_hello(said: bytes) -> Hello:
    """Return a peer's hello. Raises Refused if it cannot be read, or is of another version, which has other fields."""
    try:
        if (version := _decode_version(said).version) != PROTOCOL_VERSION:
            raise Refused(f"protocol version is {version}, must be {PROTOCOL_VERSION}")
        return _decode_hello(said)
    except ValueError as error:
        raise Refused(f"a hello that cannot be read: {error}") from None


def _prove(secret: bytes, role: bytes, nonces: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, b"dispec-transfer 1 " + role + b"\0" + nonces + said, "sha256")


def _check(proof: bytes, secret: bytes, role: bytes, nonces: bytes, said: bytes, otherwise: str) -> None:
    if not hmac.compare_digest(proof, _prove(secret, role, nonces, said)):
        raise Refused(otherwise)
