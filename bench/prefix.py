"""Time to first token where requests share a prefix, with sharing and without.

    python -m bench.prefix --requests 32 --prefix-tokens 1024

Twice: when nobody has computed the prefix yet and all requests come at once, and when an earlier request left it in the
cache. The contestants alternate.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from bench.geometries import NAMES, model_config
from bench.machine import measure_machine
from bench.workload import random_tokens
from engine import LLM, SamplingParams
from engine.step_record import StepRecord


def shared_prompts(requests: int, prefix_tokens: int, own_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens that begin alike."""
    prefix = random_tokens(prefix_tokens, vocab_size, f"prefix {seed}")
    return [prefix + random_tokens(own_tokens, vocab_size, f"{seed} {index}") for index in range(requests)]


def first_token_seconds(llm: LLM, prompts: list[list[int]]) -> tuple[float, int]:
    """The mean time to first token of prompts that arrive together, and how many prompt tokens were computed."""
    llm.engine.records.clear()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    completions = llm.generate(prompts, params, use_tqdm=False)
    computed = sum(record.num_prompt_tokens for record in llm.engine.records if isinstance(record, StepRecord))
    return statistics.mean(completion.timing.first_token for completion in completions), computed


def main(
    model: Annotated[str, typer.Option(help=f"A model, or shapes: {', '.join(NAMES)}.")] = "smollm2",
    requests: int = 32,
    prefix_tokens: int = 1024,
    own_tokens: Annotated[int, typer.Option(help="Tokens that each prompt has for itself.")] = 32,
    rounds: int = 3,
    dtype: str = "bfloat16",
    device: str | None = None,
    enforce_eager: bool = False,
    output: Annotated[Path | None, typer.Option(help="Append results as JSON lines.")] = None,
) -> None:
    """Measure time to first token with and without prefix sharing, and print a table."""
    named = model in NAMES
    engines = {
        name: LLM(
            model_config(model) if named else model,
            load_format="dummy" if named else "auto",
            dtype=dtype,
            device=device,
            max_num_seqs=requests,
            max_model_len=prefix_tokens + own_tokens + 16,
            kv_cache_memory="2GiB",
            enable_prefix_caching=sharing,
            enforce_eager=enforce_eager,
            show_progress=True,
        )
        for name, sharing in (("sharing", True), ("no sharing", False))
    }
    engine = engines["sharing"].engine
    machine = measure_machine(engine.device)
    print(machine.describe())
    seconds: dict[tuple[str, str], list[float]] = {}
    tokens: dict[tuple[str, str], int] = {}
    for llm in engines.values():  # warm allocators
        first_token_seconds(llm, shared_prompts(2, prefix_tokens, own_tokens, engine.config.vocab_size, -1))
    for round_ in range(rounds):
        for name, llm in engines.items():
            prompts = shared_prompts(requests, prefix_tokens, own_tokens, engine.config.vocab_size, round_)
            for case in ("all at once", "prefix in the cache"):
                if case == "prefix in the cache":  # other prompts after the same prefix
                    again = shared_prompts(requests, 0, own_tokens, engine.config.vocab_size, round_ + 1000)
                    prompts = [prompts[0][:prefix_tokens] + own for own in again]
                taken, tokens[case, name] = first_token_seconds(llm, prompts)
                seconds.setdefault((case, name), []).append(taken)
    print(f"{requests} requests of {prefix_tokens} shared and {own_tokens} own tokens: mean time to first token")
    for case in ("all at once", "prefix in the cache"):
        median = {name: statistics.median(seconds[case, name]) for name in engines}
        print(
            f"  {case:<20} sharing {median['sharing']:7.3f} s ({tokens[case, 'sharing']} prompt tokens computed),"
            f" without {median['no sharing']:7.3f} s ({tokens[case, 'no sharing']}):"
            f" {median['no sharing'] / median['sharing']:.1f}x"
        )
        if output is not None:
            record = {"bench": "prefix", "model": model, "case": case, "median": median, "machine": machine.as_record()}
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    typer.run(main)
