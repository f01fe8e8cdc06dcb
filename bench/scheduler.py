"""Milliseconds that the host spends on a decode step: `schedule`, `launch`, `wait` and `commit` without a model.

    dispec bench scheduler --sequences 16,64,256 --context 128,1024,8192

An engine runs whose model returns the same logits at once, with one step queued ahead as on CUDA. The cost should grow
with the number of running sequences and not with their length.
"""

import statistics
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

from dispec.bench.machine import describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.workload import sizes
from dispec.engine.engine import Engine
from dispec.engine.execution.compiled_steps import StepFunctions
from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.layers.config import ModelConfig
from dispec.layers.types import Batch

WARM_UP = 20
MAX_STEP_TOKENS = 2**20  # the engine's limit: more prompt tokens take several steps
PHASES = ("schedule", "launch", "wait", "commit")
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=512,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=1 << 20,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
)


def engine_without_model(num_sequences: int, context: int, max_len: int, block_size: int) -> Engine:
    """Return an engine whose steps take the host no time for the model."""
    token_bytes = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * torch.float32.itemsize
    engine = Engine(
        EngineOptions(
            model=CONFIG,
            load_format="dummy",
            dtype="float32",
            device="cpu",
            compile="off",
            async_scheduling=True,
            block_size=cast(Any, block_size),
            max_num_seqs=num_sequences,
            max_num_batched_tokens=min(num_sequences * context, MAX_STEP_TOKENS),
            max_model_len=max_len,
            kv_cache_memory=(num_sequences + 1) * (max_len + block_size) * token_bytes,
            show_progress=False,
        )
    )
    _remove_model(engine.runner, num_sequences)
    return engine


def _remove_model(runner: ModelRunner, num_sequences: int) -> None:
    logits = torch.zeros(num_sequences, CONFIG.vocab_size)
    argmax = torch.full((num_sequences,), 7)
    hidden = torch.zeros(1, CONFIG.hidden_size)

    def decode(weights: object, batch: Batch, kv_cache: object, previous: object) -> tuple[Tensor, Tensor]:
        num_sampled = len(batch.context_lens if batch.logits_indices is None else batch.logits_indices)
        return logits[:num_sampled], argmax[:num_sampled]

    def prefill(weights: object, batch: Batch, kv_cache: object, previous: object) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, *decode(weights, batch, kv_cache, previous)

    runner._functions = runner._eager = StepFunctions(decode, prefill)


def measure(num_sequences: int, context: int, steps: int, block_size: int, temperature: float) -> list[StepRecord]:
    """Return the records of decode steps of sequences that share no prefix."""
    max_len = context + steps + 2 * WARM_UP
    engine = engine_without_model(num_sequences, context, max_len, block_size)
    params = SamplingParams(temperature=temperature, max_tokens=max_len, ignore_eos=True)
    for index in range(num_sequences):
        engine.add([index + 1, *(position % 500 for position in range(1, context))], params)
    while engine.scheduler.waiting or not engine.records or engine.records[-1].kind != "decode":
        engine.step()
    engine.records.clear()
    while len(engine.records) < WARM_UP + steps:
        engine.step()
    engine.scheduler.check()
    assert len(engine.scheduler.running) == num_sequences
    records = list(engine.records)[WARM_UP:]
    engine.close()
    return records


def main(
    sequences: Annotated[str, typer.Option(help="Numbers of running sequences.")] = "16,64,256",
    context: Annotated[str, typer.Option(help="Tokens of each prompt.")] = "128,1024,8192",
    steps: Annotated[int, typer.Option(min=1, max=900, help="Decode steps to measure.")] = 500,
    block_size: Annotated[int, typer.Option(help="16, 32 or 64.")] = 16,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure the host's part of a decode step, without a model."""
    settings = dict(locals())
    milliseconds = dict.fromkeys(("median ms", "p99 ms", *PHASES), ".3f")
    columns = {"sequences": "d", "context": "d"} | milliseconds | {"us/seq": ".2f"}
    report = Report("scheduler", settings, describe_machine(), columns, output, plot)
    for tokens in sizes(context):
        for num_sequences in sizes(sequences):
            records = measure(num_sequences, tokens, steps, block_size, temperature)
            totals = sorted(record.seconds for record in records)
            median = statistics.median(totals)
            figures = {"median": median, "p99": totals[int(0.99 * (len(totals) - 1))]}
            figures |= {phase: statistics.median(getattr(record, phase) for record in records) for phase in PHASES}
            report.add(
                {"sequences": num_sequences, "context": tokens},
                {f"{name}_seconds": value for name, value in figures.items()},
                [num_sequences, tokens, *(1e3 * value for value in figures.values()), median / num_sequences * 1e6],
            )
            report.point(f"context {tokens}", num_sequences, median * 1e3)
    report.finish("running sequences", "ms a step")


if __name__ == "__main__":
    typer.run(main)
