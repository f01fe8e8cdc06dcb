"""Compiling in pieces of a graph each, so that an engine can answer between two of them.

A layer is compiled once and called for every layer. Every kind of launch is run once with padding alone, in inputs of
its own, so that what an engine does meanwhile is not disturbed.
"""

import importlib
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from engine import token_chooser
from engine.compiled_model import Feedback, ModelFunctions, compiled_functions, mark_dynamic
from engine.step_inputs import StepInputs, StepShape, carve, fill
from layers.types import LayerKV, Weights

# A ragged step in which no two sizes are equal, lest the compiler take two that happen to be for one.
RAGGED = StepShape(tokens=19, sequences=3, blocks=5, rows=2, query_len=None)
_ONE = StepShape(tokens=1, sequences=1, blocks=5, rows=1, query_len=1)
_SEVERAL = StepShape(tokens=3, sequences=3, blocks=5, rows=3, query_len=1)
_CPU = torch.device("cpu")

# The compiler takes seconds to import, most of them in these; each imports what stands before it.
_IMPORTS = (
    "sympy",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.lowering",
    "torch._inductor.compile_fx",
)


class Compiled(NamedTuple):
    """What came of it: functions whose every graph has been traced."""

    model: ModelFunctions
    chooser: token_chooser.Functions


class ModelParts(NamedTuple):
    """What it takes to run the model's pieces once.

    layer: the pages of any layer. chosen: the tokens of the step before, where steps overlap.
    """

    eager: ModelFunctions
    weights: Weights
    layer: LayerKV
    chosen: Tensor | None


def compile_pieces(
    parts: ModelParts,
    vocab_size: int,
    block_size: int,
    max_num_seqs: int,
    max_num_drafts: int,
    device: torch.device = _CPU,
) -> Generator[None, None, Compiled]:
    """Compile, at each `next` one graph or a part of the compiler itself. Call it in `torch.inference_mode`.

    max_num_seqs, max_num_drafts: of a step. An engine of one sequence has steps of several rows only if it verifies
    draft tokens. On CUDA the layers of uniform steps are not compiled: each has to be one op. Raises any
    exception of the compiler.
    """
    has_many_rows = max_num_seqs * (1 + max_num_drafts) > 1
    for name in _IMPORTS:
        importlib.import_module(name)
        yield
    from torch._inductor import codecache, config, cpu_vec_isa

    # An engine may go from eager to compiled in the middle of an answer: both shall round alike.
    config.emulate_precision_casts = True
    # What the compiler asks of the machine and of itself before it compiles anything; it remembers the answers.
    questions = (cpu_vec_isa.pick_vec_isa,) if device.type == "cpu" else ()
    for question in (*questions, codecache.CacheBase.get_system, codecache.torch_key):
        question()
        yield
    chooser = token_chooser.compiled_functions(device)
    # Of a choice it only matters whether it is of one row or of several.
    for rows in (1, 3) if has_many_rows else (1,):
        inputs = _inputs(StepShape(rows, rows, 2, rows, 1), block_size, device)
        yield from token_chooser.warm_up(chooser, torch.zeros(rows, vocab_size, device=device), inputs.sampling)
    functions = compiled_functions(parts.eager)
    # The number of blocks follows the memory that was free at start: were it in the graphs, no second start would find
    # them in the disk cache.
    mark_dynamic(*parts.layer)
    uniform = (_ONE, _SEVERAL) if max_num_seqs > 1 and device.type == "cpu" else (_ONE,)
    ragged = (RAGGED, RAGGED._replace(rows=1)) if has_many_rows else (RAGGED._replace(rows=1),)
    for shape in (*uniform, *ragged):
        yield from _run_once(functions, parts, shape, _inputs(shape, block_size, device))
    return Compiled(functions, chooser)


def _inputs(shape: StepShape, block_size: int, device: torch.device) -> StepInputs:
    fields = torch.zeros(sum(shape.field_sizes()), dtype=torch.int32)
    fill(carve(fields, shape), (), block_size, {})
    return carve(fields.to(device), shape)


def _run_once(
    functions: ModelFunctions, parts: ModelParts, shape: StepShape, inputs: StepInputs
) -> Generator[None, None, None]:
    batch = inputs.batch
    mark_dynamic(*batch, inputs.token_source)
    torch._dynamo.maybe_mark_dynamic(batch.block_tables, 1)
    feedback = Feedback(inputs.token_source, parts.chosen) if parts.chosen is not None else None
    x, rotation = functions.embed(parts.weights, batch, feedback)
    yield
    mark_dynamic(x, *rotation)
    is_one_op = x.is_cuda and shape.query_len is not None
    block = parts.eager.block if is_one_op else functions.block
    x = block(x, parts.weights.blocks[0], batch, rotation, parts.layer)
    yield
    x = x if shape.query_len == 1 else x[batch.logits_indices]
    mark_dynamic(x)
    functions.head(x, parts.weights)
    yield
