"""Mutual authentication of puller and source, before either learns anything of the other.

Challenge and response with HMAC-SHA256 (RFC 2104) over fresh nonces of both sides. The signed bytes include the role,
so that no answer can be reflected, and the sender's `Hello`, so that it cannot be changed. The secret never crosses the
wire. This authenticates and does not encrypt: blocks cross the network in the clear.
"""

import hmac
import secrets
from typing import Annotated, Any

import msgspec

from dispec.engine.transfer.connection import Connection
from dispec.engine.transfer.interface import Identifier
from dispec.engine.transfer.messages import Reason, TransportName, encode

PROTOCOL_VERSION = 4
NONCE_BYTES = 32
MAX_GREETING_BYTES = 512  # read from a peer that has proved nothing
MAX_HELLO_BYTES = 64 << 10

Bytes32 = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]


class Hello(msgspec.Struct, frozen=True):
    """A process's description of itself and its KV cache.

    layer_bytes: of one block in one layer's keys, and again in its values. num_blocks: of the KV cache.
    host_id, user_id: the running kernel and user, which tell whether two processes share a host.
    shared_memory: handle to map the KV cache; None without one.
    """

    engine_id: Identifier
    fingerprint: Annotated[str, msgspec.Meta(max_length=1024)]
    num_layers: Positive
    num_blocks: Positive
    layer_bytes: Positive
    device: Annotated[str, msgspec.Meta(max_length=16)]
    transports: Annotated[list[TransportName], msgspec.Meta(max_length=8)]
    host_id: Annotated[str, msgspec.Meta(max_length=64)]
    user_id: int
    shared_memory: tuple[int, int, int] | None = None
    lease_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    version: int = PROTOCOL_VERSION

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers, keys and values."""
        return 2 * self.num_layers * self.layer_bytes


# The tags of these messages are the same in every version, so that a peer of another one is refused by its number.
class _Greeting(msgspec.Struct, tag="dispec-transfer"):
    nonce: Bytes32


class _Challenge(msgspec.Struct, tag="_Challenge"):
    nonce: Bytes32
    proof: Bytes32


class _SignedHello(msgspec.Struct, tag="_Answer"):
    proof: Bytes32
    hello: bytes


class _Refusal(msgspec.Struct, tag="_Refusal"):
    reason: Reason


class _Version(msgspec.Struct):
    """The field that the hello of every version has."""

    version: int


class HandshakeRefused(ConnectionError):
    """This side or the peer refuses the connection; the message says why."""


def connect(connection: Connection, secret: bytes, hello: Hello) -> Hello:
    """Authenticate as the puller and return the source's hello.

    Raises HandshakeRefused, or ConnectionError if the source does not answer in time.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.send(_Greeting(nonce))
    challenge = _receive(connection, _Challenge)
    nonces = nonce + challenge.nonce
    _check(challenge.proof, secret, b"source", nonces, b"", "the source does not have our secret")
    connection.send(_signed(hello, secret, b"puller", nonces))
    return _verified(_receive(connection, _SignedHello), secret, b"welcome", nonces, "the source's hello is forged")


def accept(connection: Connection, secret: bytes, hello: Hello) -> Hello:
    """Authenticate as the source and return the puller's hello.

    Raises HandshakeRefused after telling the puller, or ConnectionError. A peer without the secret costs one frame of
    512 bytes, one of at most 64 KiB, and two hashes.
    """
    greeting = connection.receive(msgspec.msgpack.Decoder(_Greeting).decode, MAX_GREETING_BYTES)
    nonce = secrets.token_bytes(NONCE_BYTES)
    nonces = greeting.nonce + nonce
    connection.send(_Challenge(nonce, _sign(secret, b"source", nonces, b"")))
    response = connection.receive(msgspec.msgpack.Decoder(_SignedHello).decode, MAX_HELLO_BYTES)
    try:
        peer = _verified(response, secret, b"puller", nonces, "the puller does not have our secret")
        _check_compatible(hello, peer)
    except HandshakeRefused as refused:
        connection.send(_Refusal(str(refused)))
        raise
    connection.send(_signed(hello, secret, b"welcome", nonces))
    return peer


def _receive(connection: Connection, kind: Any) -> Any:
    message = connection.receive(msgspec.msgpack.Decoder(kind | _Refusal).decode, MAX_HELLO_BYTES)
    if isinstance(message, _Refusal):
        raise HandshakeRefused(f"the source refused: {message.reason}")
    return message


def _check_compatible(source: Hello, puller: Hello) -> None:
    """Raise HandshakeRefused if blocks of one cache make no sense in the other."""
    for name, ours, theirs in (
        ("fingerprint", source.fingerprint, puller.fingerprint),
        ("number of layers", source.num_layers, puller.num_layers),
        ("bytes of a block", source.block_bytes, puller.block_bytes),
    ):
        if ours != theirs:
            raise HandshakeRefused(f"{name} differs: the source has {ours!s:.256}, the puller {theirs!s:.256}")


def _signed(hello: Hello, secret: bytes, role: bytes, nonces: bytes) -> _SignedHello:
    encoded = encode(hello)
    return _SignedHello(_sign(secret, role, nonces, encoded), encoded)


def _verified(signed: _SignedHello, secret: bytes, role: bytes, nonces: bytes, problem: str) -> Hello:
    """Decode a peer's hello. Raises HandshakeRefused if it is forged, invalid, or of another protocol version."""
    _check(signed.proof, secret, role, nonces, signed.hello, problem)
    try:
        if (version := msgspec.msgpack.decode(signed.hello, type=_Version).version) != PROTOCOL_VERSION:
            raise HandshakeRefused(f"protocol version is {version}, must be {PROTOCOL_VERSION}")
        return msgspec.msgpack.decode(signed.hello, type=Hello)
    except ValueError as error:
        raise HandshakeRefused(f"a hello is invalid: {error}") from None


def _sign(secret: bytes, role: bytes, nonces: bytes, hello: bytes) -> bytes:
    return hmac.digest(secret, b"dispec-transfer 1 " + role + b"\0" + nonces + hello, "sha256")


def _check(proof: bytes, secret: bytes, role: bytes, nonces: bytes, hello: bytes, problem: str) -> None:
    if not hmac.compare_digest(proof, _sign(secret, role, nonces, hello)):
        raise HandshakeRefused(problem)
