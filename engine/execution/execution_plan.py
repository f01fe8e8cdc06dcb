"""How steps run on a device: chosen once at start, shown in the start log and by `dispec env-check`."""

from dataclasses import dataclass

import torch

from dispec.engine.dtypes import DTYPES
from dispec.engine.execution.kv_cache_memory import kv_dtype
from dispec.engine.options import EngineOptions
from dispec.ops.cpu.attention import has_cpu_kernel
from dispec.ops.cpu.library import has_packed_linear

# Most tokens of a sequence in a uniform step on a CPU: the limit of its decode attention kernel.
_CPU_QUERY_LEN = 16


@dataclass(frozen=True)
class ExecutionPlan:
    """The decisions that follow from device, dtype, kernels and options.

    device: "cpu" or "cuda". compile: when the steps are compiled: background, startup or off.
    replays: compiled steps replay as CUDA graphs of recorded shapes; each step is padded to the next larger shape.
    fuses_layers: all layers of a uniform step are one C++ call (`ops.decoder_layers`).
    mixes: decodes and prompts share one pass of the model; else each kind has its own.
    max_query_len: most tokens of a sequence in a uniform step; 0 where every step is ragged.
    overlaps: a step is launched while the previous one runs, unless its draft tokens depend on that one's samples.
    reads_device_tokens: steps read token ids that the host does not know yet: sampled ones, or a draft model's.
    """

    device: str
    compile: str
    replays: bool
    fuses_layers: bool
    mixes: bool
    max_query_len: int
    overlaps: bool
    reads_device_tokens: bool

    def describe(self) -> str:
        """Return the plan as one line."""
        if self.compile == "off":
            steps = "eager, a decode step's layers in one C++ call" if self.fuses_layers else "eager"
        else:
            when = {"startup": "at startup", "background": "in the background"}[self.compile]
            steps = f"compiled {when}" + (", replayed as CUDA graphs" if self.replays else "")
        batches = "prompts and decodes in one batch" if self.mixes else "prompts and decodes in separate batches"
        queue = "one step queued ahead" if self.overlaps else "one step at a time"
        return f"{steps}; {batches}; {queue}"


def plan_for(options: EngineOptions, device: torch.device, head_dim: int) -> ExecutionPlan:
    """Choose how the steps of a model with such heads run."""
    dtype = DTYPES[options.dtype]
    is_cuda = device.type == "cuda"
    has_attention_kernel = is_cuda or has_cpu_kernel(kv_dtype(options), head_dim, options.block_size)
    compile = options.when_to_compile(device)
    has_draft_model = options.speculative_model not in (None, "ngram")
    overlaps = is_cuda if options.async_scheduling is None else options.async_scheduling
    max_query_len = 1 + options.max_num_draft_tokens
    if not is_cuda:
        max_query_len = _CPU_QUERY_LEN if has_attention_kernel else 1
    return ExecutionPlan(
        device=device.type,
        compile=compile,
        replays=is_cuda and compile != "off",
        fuses_layers=(
            not is_cuda
            and compile == "off"
            and options.tensor_parallel_size == 1
            and dtype is torch.bfloat16
            and has_packed_linear()
            and has_attention_kernel
        ),
        mixes=has_attention_kernel,
        max_query_len=max_query_len,
        overlaps=overlaps,
        reads_device_tokens=overlaps or (is_cuda and has_draft_model),
    )
