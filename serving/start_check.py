"""Checks before a server starts any process: options and models with which no engine could start."""

from collections.abc import Mapping
from typing import Any

from dispec.engine.loading.model_source import check_draft, check_model
from dispec.engine.options import EngineOptions
from dispec.layers.config import ModelConfig
from dispec.serving.cluster.worker_pool import worker_options
from dispec.serving.settings import ServerSettings


def check_start(settings: ServerSettings, engine_options: Mapping[str, Any]) -> None:
    """Raise ValueError, in the engine's own words, for options or a model with which an engine cannot start.

    The checks need neither torch nor large files; the engine process does the others.
    """
    moves_kv = settings.disaggregate or settings.role != "both"
    if moves_kv and engine_options.get("tensor_parallel_size", 1) != 1:
        why = "disaggregate" if settings.disaggregate else f"role {settings.role!r}"
        size = engine_options["tensor_parallel_size"]
        raise ValueError(
            f"tensor_parallel_size is {size}, must be 1 with {why}: an engine of several ranks moves no KV"
        )
    if settings.disaggregate and (port := engine_options.get("kv_transfer_port")):
        raise ValueError(
            f"kv_transfer_port is {port}, must be left out with disaggregate: each engine needs a port of its own"
        )
    if settings.disaggregate:
        engine_options = worker_options(engine_options)
    options = EngineOptions(**engine_options)
    without_weights = options.load_format == "dummy"
    if not isinstance(options.model, ModelConfig):
        check_model(options.model, without_weights=without_weights, quantization=options.quantization)
    if options.speculative_model is not None and not isinstance(options.speculative_model, ModelConfig):
        check_draft(options.speculative_model, without_weights=without_weights)
