"""The model as the runner calls it, eager or compiled, and what the compiler must be told about tensors."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def first_cause(error: BaseException) -> str:
    """What went wrong, in one line: the compiler wraps it, and its own first line says nothing."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def warn_eager(reason: str) -> None:
    """Say once that nothing will be compiled."""
    warnings.warn(
        f"compilation failed, running eagerly and slower: {reason}"
        " (is a C++ compiler installed? `dispec env-check` tells; --compile off silences this)",
        RuntimeWarning,
        stacklevel=3,
    )


def mark_static(*values: object) -> None:
    """Tell CUDA graphs that tensors never move: weights, KV cache. Without it every replay copies them."""
    for tensor in torch.utils._pytree.tree_leaves(values):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=False)


def eager_functions(
    config: ModelConfig, vocab_size: int | None = None, head_tokens: Tensor | None = None
) -> ModelFunctions:
    """The model of a config, nothing of it compiled. Hidden states are [T, E], logits [R, V], chosen tokens [R].

    Where V shall be another than the model's, logits are cut, or filled up with -inf. head_tokens: which tokens the
    rows of the head stand for, if not for all in order; the others' logits are -inf.
    """
    size = vocab_size or config.vocab_size
    more = size - config.vocab_size

    def fit(logits: Tensor) -> Tensor:
        if head_tokens is not None:
            return logits.new_full((len(logits), size), -torch.inf).index_copy_(1, head_tokens, logits)
        return torch.nn.functional.pad(logits, (0, more), value=-torch.inf) if more else logits

    def resolve(batch: Batch, feedback: Feedback | None) -> Batch:
        if feedback is None:
            return batch
        row = feedback.source.long() - 1
        chosen = feedback.chosen[row.clamp(min=0)].to(batch.token_ids.dtype)
        return batch._replace(token_ids=torch.where(row < 0, batch.token_ids, chosen))

    def embed(weights: Weights, batch: Batch, feedback: Feedback | None) -> Any:
        if more > 0:  # padding of the larger vocabulary, which no tokenizer knows
            batch = batch._replace(token_ids=batch.token_ids.clamp(max=config.vocab_size - 1))
        return model.embed(weights, config, resolve(batch, feedback))

    def block(x: Tensor, w: Any, batch: Batch, rotation: Any, kv: Any) -> Tensor:
        return model.block(x, w, config, batch, rotation, kv)

    def head(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        logits = fit(model.logits(x, weights, config))
        return logits, greedy(logits)

    def whole(weights: Weights, batch: Batch, kv_cache: KVCache, feedback: Feedback | None) -> tuple[Tensor, Tensor]:
        logits = fit(model.forward(weights, config, resolve(batch, feedback), kv_cache))
        return logits, greedy(logits)

    return ModelFunctions(embed, block, head, whole)


def compiled_functions(eager: ModelFunctions, *, with_whole: bool = False, replays: bool = False) -> ModelFunctions:
    """The same, to be compiled when first called.

    replays: whether the compiler has `whole` replay as CUDA graphs. Its own bookkeeping then looks at every weight in
    each call, 1.8 ms for 28 layers; whoever records the compiled function once can do without.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    whole = None
    if with_whole:
        torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None
        assert eager.whole is not None
        whole = torch.compile(eager.whole, mode="reduce-overhead" if replays else None, fullgraph=True)
    embed, block, head = (torch.compile(function, fullgraph=True) for function in eager[:3])
    return ModelFunctions(embed, block, head, whole)


def mark_dynamic(*tensors: Tensor | int | None) -> None:
    """Tell the compiler that first dimensions vary, those of size 1 excepted, which are graphs of their own."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
