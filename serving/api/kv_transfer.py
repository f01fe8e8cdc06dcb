"""`kv_transfer_params`, with which a router splits a request between a prefill worker and a decode worker.

The names are vLLM's. A request with `do_remote_decode` computes the prompt and one token, and its response tells where
their blocks are. The router sends that along with the same request to the decode worker, which pulls them.
"""

import secrets
from typing import Any

import msgspec

from dispec.engine.errors import InvalidField
from dispec.engine.process.messages import EngineInfo
from dispec.engine.transfer.interface import RemoteBlocks
from dispec.serving.settings import Role

_NAME = "kv_transfer_params"


class KVTransferParams(msgspec.Struct):
    """The object in a request or a response. Other fields are ignored."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_engine_id: str | None = None
    remote_block_ids: list[Any] | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    transfer_id: str | None = None


class Transfer(msgspec.Struct):
    """The transfer that a request asks for.

    publish_as, pull: as in `messages.Submit`. response: the `kv_transfer_params` of the response.
    """

    publish_as: str | None = None
    pull: RemoteBlocks | None = None
    response: dict[str, Any] | None = None


def read_transfer(given: Any, info: EngineInfo, role: Role, num_prompts: int) -> Transfer:
    """Return the transfer that `kv_transfer_params` ask of this worker. Raises InvalidField."""
    if given is None:
        return Transfer()
    try:
        params = msgspec.convert(given, KVTransferParams)
    except msgspec.ValidationError as error:
        raise _invalid(f"{_NAME}: {error}") from None
    if not params.do_remote_decode and not params.do_remote_prefill:
        return Transfer()
    if params.do_remote_decode and params.do_remote_prefill:
        raise _invalid(f"{_NAME} asks for do_remote_decode and do_remote_prefill, must ask for one of them")
    if info.engine_id is None:
        raise _invalid(f"{_NAME}: this server has no --kv-transfer")
    if num_prompts != 1:
        raise _invalid(f"{_NAME} is for one prompt, there are {num_prompts}")
    if params.do_remote_decode:
        if role == "decode":
            raise _invalid(f"{_NAME}.do_remote_decode: this worker has --role decode")
        transfer_id = secrets.token_hex(16)
        return Transfer(publish_as=transfer_id, response=_response(info, transfer_id))
    if role == "prefill":
        raise _invalid(f"{_NAME}.do_remote_prefill: this worker has --role prefill")
    where = {
        "engine_id": params.remote_engine_id,
        "transfer_id": params.transfer_id,
        "host": params.remote_host,
        "port": params.remote_port,
    }
    if None in where.values():
        raise _invalid(f"{_NAME} must have remote_engine_id, transfer_id, remote_host and remote_port of the response")
    try:
        return Transfer(pull=msgspec.convert(where, RemoteBlocks))
    except msgspec.ValidationError as error:
        raise _invalid(f"{_NAME}: {error}") from None


def _response(info: EngineInfo, transfer_id: str) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": info.engine_id,
        "remote_block_ids": [],
        "remote_host": info.transfer_host,
        "remote_port": info.transfer_port,
        "transfer_id": transfer_id,
    }


def _invalid(message: str) -> InvalidField:
    return InvalidField(_NAME, message)
