"""Output tokens per second at several concurrencies, beside transformers in the same run.

    python -m bench.throughput --concurrency 1,6,16,32

Contestants alternate, so that a drift of the machine hits both; each figure is the median of the rounds. The
limit is what the machine's measured bandwidth and matrix rate allow for the same work.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from bench.geometries import NAMES, model_config
from bench.machine import Machine, measure_machine
from bench.transformers_peer import transformers_model
from bench.workload import Workload
from engine import LLM, SamplingParams
from engine.memory import weight_bytes
from engine.options import DTYPES
from layers.config import ModelConfig

Run = Callable[[list[list[int]], int], None]


def seconds_at_best(machine: Machine, config: ModelConfig, weights: int, workload: Workload) -> float:
    """The least time in which the workload could be done: every weight read once a step, every product at full rate.

    The embedding is read by row, so `weights` leaves it out; the head is in.
    """
    element = 2
    matrices = weights / element
    tokens, batch = workload.output_tokens, workload.concurrency
    kv_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element
    context = workload.prompt_tokens + tokens / 2
    step_bytes = weights + batch * context * kv_per_token
    step_flops = 2 * matrices * batch
    decode = (tokens - 1) * max(step_bytes / machine.bytes_per_second, step_flops / machine.flop_per_second)
    prefill = 2 * matrices * batch * workload.prompt_tokens / machine.flop_per_second
    return decode + prefill


def transformers_generate(model: Any, device: torch.device) -> Run:
    """transformers' `generate`: one static batch, its own KV cache, greedy."""

    def run(prompts: list[list[int]], output_tokens: int) -> None:
        inputs = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            result = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert result.shape[1] == len(prompts[0]) + output_tokens

    return run


def our_engine(llm: LLM) -> Run:
    """`LLM.generate` on the same prompts."""

    def run(prompts: list[list[int]], output_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        completions = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(completion.token_ids) == output_tokens for completion in completions)

    return run


def main(
    model: Annotated[
        str, typer.Option(help=f"Directory, hub id, .gguf file, built-in name, or shapes: {', '.join(NAMES)}.")
    ] = "smollm2",
    concurrency: Annotated[str, typer.Option(help="Numbers of simultaneous requests.")] = "1,6,16,32",
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contestant; the median counts.")] = 3,
    dtype: str = "bfloat16",
    device: str | None = None,
    peer: Annotated[bool, typer.Option(help="Run transformers beside.")] = True,
    enforce_eager: bool = False,
    output: Annotated[Path | None, typer.Option(help="Append results as JSON lines.")] = None,
) -> None:
    """Measure throughput beside transformers and print a table."""
    sizes = [int(size) for size in concurrency.split(",")]
    context = prompt_tokens + output_tokens
    named = model in NAMES
    llm = LLM(
        model_config(model) if named else model,
        load_format="dummy" if named else "auto",
        dtype=dtype,
        device=device,
        max_num_seqs=max(sizes),
        max_model_len=context + 16,
        enforce_eager=enforce_eager,
        show_progress=True,
    )
    engine = llm.engine
    machine = measure_machine(engine.device)
    print(machine.describe())
    contestants: dict[str, Run] = {"dispec": our_engine(llm)}
    if peer:
        contestants["transformers"] = transformers_generate(
            transformers_model(model, engine.checkpoint, DTYPES[dtype], engine.device), engine.device
        )
    embedding = engine.runner.weights.embedding
    read = weight_bytes(engine.runner.weights) - embedding.numel() * embedding.element_size()
    if engine.config.tie_embeddings and engine.runner.weights.lm_head is embedding:
        read += embedding.numel() * embedding.element_size()
    header = f"{'c':>4} " + " ".join(f"{name + ' tok/s':>20}" for name in contestants)
    rows = [header + f" {'ratio':>7} {'weights GB/s':>13} {'limit tok/s':>12} {'share':>6}"]
    for size in sizes:
        workload = Workload(size, prompt_tokens, output_tokens)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        schedule = [(name, round_) for round_ in range(rounds + 1) for name in contestants]
        for name, round_ in tqdm(schedule, desc=f"c={size}", unit="run", leave=False):
            prompts = workload.prompts(engine.config.vocab_size, seed=round_)
            start = time.perf_counter()
            contestants[name](prompts, output_tokens)
            if round_ > 0:  # the first run of each warms caches and allocators
                rates[name].append(size * output_tokens / (time.perf_counter() - start))
        median = {name: statistics.median(values) for name, values in rates.items()}
        limit = size * output_tokens / seconds_at_best(machine, engine.config, read, workload)
        ours = median["dispec"]
        ratio = f"{ours / median['transformers']:.2f}x" if "transformers" in median else "-"
        rows.append(
            f"{size:>4} "
            + " ".join(f"{median[name]:>20.1f}" for name in contestants)
            + f" {ratio:>7} {ours / size * read / 1e9:>13.1f} {limit:>12.0f} {ours / limit:>6.0%}"
        )
        if output is not None:
            record = {"bench": "throughput", "model": model, "dtype": dtype, "context": context, "c": size}
            record |= {"median": median, "all": rates, "limit": limit, "machine": machine.as_record()}
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    typer.run(main)
