"""What weight and KV cache formats cost in quality: perplexity on a text, beside transformers on the same tokens.

    dispec bench perplexity --formats bfloat16,int8,int4,native,bfloat16+kv-int8
    dispec bench perplexity --model model-q4_k_m.gguf --formats bfloat16,native --text book.txt

The text is the language reference that ships with Python (`pydoc_data.topics`): English prose about Python, with
examples. It is cut into windows that do not overlap. Each window is a prompt of its own, and perplexity is e to the
mean negative log-probability of all tokens but the first of each window. Prompts run through the engine, so their
tokens attend to keys and values in the format of the KV cache. The first format is the one that the others are compared
with.

Weights are resident memory: what the process grows by when they are loaded.
"""

import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import psutil
import torch
import typer

from dispec.bench.loading import Device
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Report
from dispec.bench.transformers_peer import transformers_model
from dispec.bench.weight_formats import format_options
from dispec.engine.api.llm import LLM
from dispec.engine.dtypes import DTYPES
from dispec.engine.execution.kv_cache_memory import return_freed_memory
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.quantization import packing_for, with_kernels
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.weights import load_weights

# How far a format may raise perplexity: weights rounded while loading, and the KV cache.
_WEIGHT_AIMS = {"int8": 0.005, "int4": 0.06}
_KV_AIM = 0.005
_FORMATS = "bfloat16,int8,int4,native,bfloat16+kv-int8,bfloat16+kv-fp8"
_CUDA_FORMATS = ",fp8,fp8+kv-fp8"


def aim(name: str) -> float | None:
    """Return how far a format may raise perplexity, as a share; None for formats without an aim."""
    weights, _, cache = name.partition("+kv-")
    kind = weights.partition("-")[0]
    if kind != "bfloat16" and kind not in _WEIGHT_AIMS:
        return None
    found = _WEIGHT_AIMS.get(kind, 0.0) + (_KV_AIM if cache else 0.0)
    return found or None


def reference_text(size: int) -> str:
    """Return the first `size` bytes of the language reference, its topics in alphabetical order."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    return text.encode()[:size].decode(errors="ignore")


def windows(tokenizer: Tokenizer, text: str, size: int) -> list[list[int]]:
    """Return the tokens of a text in windows of `size` tokens, each begun as the tokenizer begins a text.

    The last window is shorter. Raises ValueError if the text has fewer than two tokens.
    """
    start = tokenizer.encode("")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens, must have at least 2")
    step = size - len(start)
    cut = [start + token_ids[first : first + step] for first in range(0, len(token_ids), step)]
    return [window for window in cut if len(window) > 1]


def engine_perplexity(llm: LLM, prompts: list[list[int]]) -> float:
    """Return the perplexity of token ids under an engine's model."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate(prompts, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found = [entry[token].logprob for token, entry in entries if entry is not None]
        total, count = total + sum(found), count + len(found)
    return math.exp(-total / count)


@torch.inference_mode()
def transformers_perplexity(model: Any, prompts: list[list[int]], device: torch.device) -> float:
    """Return the perplexity of token ids under a model of transformers."""
    total, count = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        total += logprobs.gather(1, ids[0, 1:, None]).double().sum().item()
        count += len(prompt) - 1
    return math.exp(-total / count)


def _resident_bytes(device: torch.device) -> int:
    gc.collect()
    return_freed_memory()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _weight_bytes(checkpoint: Checkpoint, options: EngineOptions) -> int:
    """Return by how much weights enlarge the process, loaded alone: an engine's KV cache may be resident in part."""
    device, dtype = options.torch_device(), DTYPES[options.dtype]
    before = _resident_bytes(device)
    tensors = with_kernels(checkpoint.tensors(dtype, options.quantization), dtype, device)
    weights = load_weights(checkpoint.config, tensors, dtype, device, packing=packing_for(options, device))
    found = _resident_bytes(device) - before
    del weights
    return found


def _measure(checkpoint: Checkpoint, options: dict[str, Any], prompts: list[list[int]]) -> tuple[float, int]:
    """Return the perplexity of a format and the bytes of its weights."""
    weights = _weight_bytes(checkpoint, EngineOptions(**options))
    with LLM(**options, enforce_eager=True, max_model_len=max(map(len, prompts)) + 1, max_num_seqs=4) as llm:
        return engine_perplexity(llm, prompts), weights


def main(
    model: Annotated[str, typer.Option(help="Directory, hub id, .gguf file or built-in name.")] = "smollm2",
    formats: Annotated[
        str | None, typer.Option(help="Comma-separated; see bench/weight_formats.py.", show_default=_FORMATS)
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file.", show_default="Python's language reference")] = None,
    text_bytes: Annotated[int, typer.Option(min=1, help="Bytes of the text to read.")] = 200_000,
    window: Annotated[int, typer.Option(min=16, help="Tokens of a prompt.")] = 512,
    transformers: Annotated[str, typer.Option(help="Its dtypes; empty for none.")] = "bfloat16,float32",
    device: Device = None,
    output: Output = None,
) -> None:
    """Measure the perplexity of weight and KV cache formats, beside transformers on the same tokens."""
    settings = dict(locals())
    chosen = choose_device(device)
    known = formats or _FORMATS + (_CUDA_FORMATS if chosen.type == "cuda" else "")
    names = [name.strip() for name in known.split(",")]
    for name in names:
        format_options(name)  # refuses unknown ones before anything is loaded
    peers = [name.strip() for name in transformers.split(",") if name.strip()]
    columns = {"": "", "perplexity": ".3f", f"/ {names[0]}": ".4f", "aim": "", "weights MB": ".1f", "seconds": ".0f"}
    report = Report("perplexity", settings, describe_machine(chosen), columns, output)
    checkpoint = find_checkpoint(model)
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    content = reference_text(text_bytes) if text is None else _read(text, text_bytes)
    prompts = windows(tokenizer, content, window)
    count = sum(map(len, prompts)) - len(prompts)
    print(f"{len(content.encode())} bytes of text, {count} tokens in {len(prompts)} windows", flush=True)

    def measured() -> Iterator[tuple[str, float, int | None, float]]:
        for name in names:
            start = time.monotonic()
            perplexity, weights = _measure(
                checkpoint, {"model": model, "device": device, **format_options(name)}, prompts
            )
            yield name, perplexity, weights, time.monotonic() - start
        for name in peers:
            start = time.monotonic()
            peer = transformers_model(model, checkpoint, DTYPES[name], chosen)
            yield f"transformers {name}", transformers_perplexity(peer, prompts, chosen), None, time.monotonic() - start
            del peer

    reference = 0.0
    for name, perplexity, weights, seconds in measured():
        reference = reference or perplexity
        ratio, limit = perplexity / reference, aim(name)
        verdict = "" if limit is None else f"{'met' if ratio <= 1 + limit else 'missed'}: {1 + limit:.3f}"
        figures = {"perplexity": perplexity, "ratio": ratio, "weight_bytes": weights, "tokens": count, "aim": limit}
        row = [name, perplexity, ratio, verdict, None if weights is None else weights / 1e6, seconds]
        report.add({"format": name}, figures, row)
        print(f"{name}: {perplexity:.3f}", flush=True)
    report.finish()


def _read(file: Path, size: int) -> str:
    try:
        return file.read_bytes()[:size].decode(errors="ignore")
    except OSError as error:
        raise ValueError(f"text is {file}, which cannot be read ({error.strerror})") from None


if __name__ == "__main__":
    typer.run(main)
