"""What is served: /v1/models, /tokenizer_info, /model_info, /server_info, /version."""

import json
from typing import Any

from litestar import Request, get
from litestar.params import FromPath
from litestar.types import ASGIApp

from dispec.serving.api.openapi import describe
from dispec.serving.api.protocol_answers import Model, ModelList
from dispec.serving.api.service import ApiContext, service_of
from dispec.serving.api.streaming import JsonAnswer
from dispec.serving.api.tokenizer_configuration import tokenizer_configuration


@get("/v1/models", **describe(None, ModelList, tag="Models"))
async def models(request: Request) -> ASGIApp:
    """The model, under each name that it may be called by."""
    return JsonAnswer(ModelList(_models(service_of(request))))


@get("/v1/models/{model_id:path}", **describe(None, Model, tag="Models"))
async def model(request: Request, model_id: FromPath[str]) -> ASGIApp:
    """The model, by any name that requests may call it."""
    service = service_of(request)
    served = service.model()
    # A name that is a path has lost its first slash: "/v1/models//srv/model" is brought to "/v1/models/srv/model".
    name = str(model_id)
    if name not in (*served.names, served.info.model):
        name = name.removeprefix("/")
    served.check_name(name)
    return JsonAnswer(_model(service, name))


@get("/tokenizer_info", **describe(None, None, tag="Tokenizer"))
async def tokenizer_info(request: Request) -> ASGIApp:
    """The tokenizer's configuration as tokenizer_config.json has it, its chat template among it, and its sizes."""
    served = service_of(request).model()
    return JsonAnswer(json.dumps(tokenizer_configuration(served.prompts.tokenizer, served.info)).encode())


@get("/model_info", **describe(None, None, tag="Models"))
async def model_info(request: Request) -> ASGIApp:
    """The model that is loaded."""
    served = service_of(request).model()
    info = served.info
    return JsonAnswer(
        {
            "model_path": info.model,
            "tokenizer_path": info.directory or "",
            "served_model_name": served.name,
            "is_generation": True,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "vocab_size": info.vocab_size,
            "max_model_len": info.max_model_len,
            "weight_bytes": info.weight_bytes,
            "preferred_sampling_params": dict(served.defaults),
        }
    )


@get("/server_info", **describe(None, None, tag="Models"))
async def server_info(request: Request) -> ASGIApp:
    """The engine's options as they turned out, and its state."""
    service = service_of(request)
    served = service.model()
    info = served.info
    return JsonAnswer(
        {
            "version": service.version,
            "state": service.client.state,
            "model_path": info.model,
            "served_model_name": served.name,
            "device": info.device,
            "dtype": info.dtype,
            "compile": info.compile,
            "is_compiled": info.is_compiled,
            "compiled_seconds": info.compiled_seconds,
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "block_size": info.block_size,
            "num_blocks": info.num_blocks,
            "max_total_num_tokens": info.num_blocks * info.block_size,
            "kv_cache_bytes": info.kv_cache_bytes,
            "start_seconds": info.phase_seconds,
            "tp_size": 1,
            "dp_size": 1,
        }
    )


@get("/version", **describe(None, None, tag="Models"))
async def show_version(request: Request) -> ASGIApp:
    """The version of DiSpec."""
    answer: dict[str, Any] = {"version": service_of(request).version}
    return JsonAnswer(answer)


def _models(service: ApiContext) -> list[Model]:
    return [_model(service, name) for name in service.model().names]


def _model(service: ApiContext, name: str) -> Model:
    info = service.model().info
    return Model(name, int(service.started), info.max_model_len, info.model)
