"""GET /v1/models, /model_info, /server_info and /version."""

from litestar import Request, get
from litestar.params import FromPath
from litestar.types import ASGIApp

from dispec.serving.api.context import ApiContext, context_of
from dispec.serving.api.http_responses import JsonResponse
from dispec.serving.api.openapi import describe
from dispec.serving.api.response_bodies import Model, ModelList


@get("/v1/models", **describe(None, ModelList, tag="Models"))
async def models(request: Request) -> ASGIApp:
    """The model, under each of its names."""
    context = context_of(request)
    return JsonResponse(ModelList([_model(context, name) for name in context.model().names]))


@get("/v1/models/{model_id:path}", **describe(None, Model, tag="Models"))
async def model(request: Request, model_id: FromPath[str]) -> ASGIApp:
    """The model of a name that requests may use."""
    context = context_of(request)
    served = context.model()
    # Litestar reads "/v1/models//srv/model" as "/v1/models/srv/model": a name that is a path loses its first slash.
    name = str(model_id)
    if name not in (*served.names, served.info.model):
        name = name.removeprefix("/")
    served.check_name(name)
    return JsonResponse(_model(context, name))


@get("/model_info", **describe(None, None, tag="Models"))
async def model_info(request: Request) -> ASGIApp:
    """The loaded model."""
    served = context_of(request).model()
    info = served.info
    return JsonResponse(
        {
            "model_path": info.model,
            "tokenizer_path": info.directory or "",
            "served_model_name": served.name,
            "is_generation": True,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "weights_format": info.weights_format,
            "vocab_size": info.vocab_size,
            "max_model_len": info.max_model_len,
            "weight_bytes": info.weight_bytes,
            "preferred_sampling_params": dict(served.defaults),
        }
    )


@get("/server_info", **describe(None, None, tag="Models"))
async def server_info(request: Request) -> ASGIApp:
    """The engine's resolved options, and its state."""
    context = context_of(request)
    served = context.model()
    info = served.info
    return JsonResponse(
        {
            "version": context.version,
            "state": context.client.state,
            "model_path": info.model,
            "served_model_name": served.name,
            "device": info.device,
            "dtype": info.dtype,
            "weights_format": info.weights_format,
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
    return JsonResponse({"version": context_of(request).version})


def _model(context: ApiContext, name: str) -> Model:
    info = context.model().info
    return Model(name, int(context.started), info.max_model_len, info.model)
