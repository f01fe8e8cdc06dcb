"""`kv_transfer_params`, by which a router sends a request to one worker for its prompt and to another for the rest.

The names are vLLM's, whose routers know them: a request with `do_remote_decode` computes the prompt and one token, and
its answer says where they are; that, sent along with the same request, makes the other worker take them from there.
"""

import secrets
from typing import Any

import msgspec

from dispec.engine.process.messages import EngineInfo
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.http.errors import ApiError
from dispec.serving.settings import Role

_NAME = "kv_transfer_params"


class KVTransferParams(msgspec.Struct):
    """What a router sends, and what it gets to send on. What is not known is ignored."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_engine_id: str | None = None
    remote_block_ids: list[Any] | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    transfer_id: str | None = None


class Transfer(msgspec.Struct):
    """What a request asks for. publish_as, pull: as in `messages.Submit`. answer: to send back, if anything."""

    publish_as: str | None = None
    pull: RemoteBlocks | None = None
    answer: dict[str, Any] | None = None


def transfer(given: Any, info: EngineInfo, role: Role, num_prompts: int) -> Transfer:
    """What `kv_transfer_params` ask of this worker; nothing if they are left out. Raises ApiError."""
    if given is None:
        return Transfer()
    try:
        params = msgspec.convert(given, KVTransferParams)
    except msgspec.ValidationError as error:
        raise _bad(f"{_NAME}: {error}") from None
    if not params.do_remote_decode and not params.do_remote_prefill:
        return Transfer()
    if params.do_remote_decode and params.do_remote_prefill:
        raise _bad(f"{_NAME} asks for do_remote_decode and do_remote_prefill, must ask for one of them")
    if info.engine_id is None:
        raise _bad(f"{_NAME}: this server has no --kv-transfer")
    if num_prompts != 1:
        raise _bad(f"{_NAME} is for one prompt, there are {num_prompts}")
    if params.do_remote_decode:
        if role == "decode":
            raise _bad(f"{_NAME}.do_remote_decode: this worker has --role decode")
        transfer_id = secrets.token_hex(16)
        return Transfer(publish_as=transfer_id, answer=_answer(info, transfer_id))
    if role == "prefill":
        raise _bad(f"{_NAME}.do_remote_prefill: this worker has --role prefill")
    where = {
        "engine_id": params.remote_engine_id,
        "transfer_id": params.transfer_id,
        "host": params.remote_host,
        "port": params.remote_port,
    }
    if None in where.values():
        raise _bad(f"{_NAME} must have remote_engine_id, transfer_id, remote_host and remote_port, as the answer had")
    try:
        return Transfer(pull=msgspec.convert(where, RemoteBlocks))
    except msgspec.ValidationError as error:
        raise _bad(f"{_NAME}: {error}") from None


def _answer(info: EngineInfo, transfer_id: str) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": info.engine_id,
        "remote_block_ids": [],
        "remote_host": info.transfer_host,
        "remote_port": info.transfer_port,
        "transfer_id": transfer_id,
    }


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param=_NAME)
