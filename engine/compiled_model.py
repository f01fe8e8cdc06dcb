"""The model as the runner calls it, eager or compiled, and what the compiler must be told about tensors."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from engine.default_model import cache_directory
from layers import model
from layers.config import ModelConfig
from layers.sampling import greedy
from layers.types import Batch, KVCache, Weights


class Feedback(NamedTuple):
    """Where a step finds the tokens that the step before it chose: see `StepInputs.token_source`."""

    source: Tensor
    chosen: Tensor


class ModelFunctions(NamedTuple):
    """The model's composition, compiled or not. `whole` runs a uniform step in one call, where there is one."""

    embed: Callable[..., Any]
    block: Callable[..., Tensor]
    head: Callable[..., tuple[Tensor, Tensor]]
    whole: Callable[..., tuple[Tensor, Tensor]] | None


def choose_compile_cache() -> None:
    """Keep compiled code in the user's cache directory, unless TORCHINDUCTOR_CACHE_DIR names another.

    Inductor writes its default, a temporary directory, into that variable as soon as anybody asks for it.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_directory() / f"inductor-torch-{torch.__version__}")


def mark_static(*values: object) -> None:
    """Tell CUDA graphs that tensors never move: weights, KV cache. Without it every replay copies them."""
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def eager_functions(config: ModelConfig) -> ModelFunctions:
    """The model of a config, nothing of it compiled. Hidden states are [T, E], logits [R, V], chosen tokens [R]."""

    def resolve(batch: Batch, feedback: Feedback | None) -> Batch:
        if feedback is None:
            return batch
        row = feedback.source.long() - 1
        chosen = feedback.chosen[row.clamp(min=0)].to(batch.token_ids.dtype)
        return batch._replace(token_ids=torch.where(row < 0, batch.token_ids, chosen))

    def embed(weights: Weights, batch: Batch, feedback: Feedback | None) -> Any:
        return model.embed(weights, config, resolve(batch, feedback))

    def block(x: Tensor, w: Any, batch: Batch, rotation: Any, kv: Any) -> Tensor:
        return model.block(x, w, config, batch, rotation, kv)

    def head(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        logits = model.logits(x, weights, config)
        return logits, greedy(logits)

    def whole(weights: Weights, batch: Batch, kv_cache: KVCache, feedback: Feedback | None) -> tuple[Tensor, Tensor]:
        logits = model.forward(weights, config, resolve(batch, feedback), kv_cache)
        return logits, greedy(logits)

    return ModelFunctions(embed, block, head, whole)


def compiled_functions(eager: ModelFunctions, is_cuda: bool) -> ModelFunctions:
    """The same, to be compiled when first called; on CUDA `whole` replays as CUDA graphs, on CPU there is none."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    whole = None
    if is_cuda:
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None
        assert eager.whole is not None
        whole = torch.compile(eager.whole, mode="reduce-overhead", fullgraph=True)
    embed, block, head = (torch.compile(function, fullgraph=True) for function in eager[:3])
    return ModelFunctions(embed, block, head, whole)


def mark_dynamic(*tensors: Tensor | int | None) -> None:
    """Tell the compiler that first dimensions vary, those of size 1 excepted, which are graphs of their own."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
