"""What structured output costs and saves, beside free text and beside vLLM's grammar engines.

    dispec bench structured --concurrency 1,16
    dispec bench structured --peer vllm --peer-python VENV/bin/python --peer-hf DIRECTORY

Two cases have a grammar that allows any number of tokens and forces none: "any text" allows nearly all tokens, "words"
few. Their outputs have exactly `--output-tokens` tokens, so that the rate over that of free text is the price of masks.
The other cases are JSON documents. Free text beside them has as many tokens as the documents of the same engine had.

Engines take turns; figures are medians of the rounds, greedy, with the prompts' time:

    tokens        of an output
    free tok/s    without a grammar
    tok/s         with the grammar, forced tokens included
    / free        of the two before, the median over the rounds
    whole         outputs that are whole JSON documents
    useful tok/s  tokens of whole documents without their white space, as the model's tokenizer splits them
    DiSpec /      DiSpec's useful tok/s (tok/s where there is no document) over this engine's
    compile ms    compilation of the grammar with its first closing plan, tokenizer tables left out (DiSpec)

"dispec, sampled" asks for logprobs, with which all tokens are sampled, forced ones too; so does its free text.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from dispec.bench.contestants import Worker, dispec_engine
from dispec.bench.loading import Device, Dtype
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.peers import PeerChoice, PeerHf, PeerPreload, PeerPython, Peers, choose_peers, start_vllm
from dispec.bench.report import Output, Report
from dispec.bench.workload import sizes
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.structured_output.grammar_compiler import GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.engine.text.tokenizer import Tokenizer

_MAX_DOCUMENT_TOKENS = 200
_PROMPT_TOKENS = 64  # at most, with the chat template

_LEVEL = {"enum": ["not_applicable", "below_expectations", "meets_expectations", "exceeds_expectations"]}
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 24},
        "married": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "married"],
    "additionalProperties": False,
}
_REVIEW = {
    "type": "object",
    "properties": {
        "employee_identifier": {"type": "integer", "minimum": 1000, "maximum": 9999},
        "review_period_start_date": {"type": "string", "format": "date"},
        "communication_with_customers": _LEVEL,
        "quality_of_written_documents": _LEVEL,
        "recommended_for_promotion": {"type": "boolean"},
        "requires_additional_training": {"type": "boolean"},
    },
    "required": [
        "employee_identifier",
        "review_period_start_date",
        "communication_with_customers",
        "quality_of_written_documents",
        "recommended_for_promotion",
        "requires_additional_training",
    ],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """A grammar and the prompt that asks for it. is_document: its outputs are JSON and end by themselves."""

    structure: Mapping[str, Any]
    prompt: str
    is_document: bool = True


CASES = {
    "any text": Case({"regex": "(.|\n)*"}, "Tell a story about number {}.", is_document=False),
    "words": Case({"regex": "([a-z]{1,8}[ .,])*"}, "Tell a story about number {}.", is_document=False),
    "person": Case({"json": _PERSON}, "Describe person {} as JSON with name, age, city, married."),
    "review": Case({"json": _REVIEW}, "Review the work of employee {} as JSON."),
}


@dataclass
class Engine:
    """A contestant, or one way to ask it. params: fields of all its requests."""

    name: str
    worker: Worker
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Rates:
    """Rates of the rounds of one engine with one case, in tokens per second."""

    num_tokens: int = 0
    free: list[float] = field(default_factory=list)
    structured: list[float] = field(default_factory=list)
    useful: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def useful_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Return the number of tokens of a whole JSON document, without white space that its values do not hold; else 0."""
    try:
        document = json.loads(text)
    except ValueError:
        return 0
    return len(tokenizer.encode(json.dumps(document, ensure_ascii=False), add_special_tokens=False))


def run_case(
    engines: list[Engine], case: Case, num_prompts: int, output_tokens: int, rounds: int, tokenizer: Tokenizer
) -> dict[str, Rates]:
    """Return the rates of each engine, after a round that compiles grammars and warms caches."""
    found = {engine.name: Rates(num_tokens=output_tokens) for engine in engines}
    own = {"ignore_eos": False} if case.is_document else {"min_tokens": output_tokens}
    most = _MAX_DOCUMENT_TOKENS if case.is_document else output_tokens

    def prompts(first: int) -> list[list[int]]:
        texts = [case.prompt.format(number) for number in range(first, first + num_prompts)]
        return [tokenizer.encode_chat(tokenizer.render_chat([{"role": "user", "content": text}])) for text in texts]

    turns = [(round_, engine) for round_ in range(rounds + 1) for engine in engines]
    for round_, engine in tqdm(turns, desc=f"c={num_prompts}", unit="run", leave=False, disable=None):
        rates = found[engine.name]
        # No two runs have the same prompts, which would be in the cache.
        first = 2 * round_ * num_prompts
        params = {**engine.params, **own, "structured_outputs": case.structure}
        structured = engine.worker.generate(prompts(first), most, params=params)
        if round_ == 0:
            rates.num_tokens = round(statistics.mean(structured["output_tokens"]))
        free = engine.worker.generate(prompts(first + num_prompts), rates.num_tokens, params=engine.params)
        if round_ > 0:
            rates.free.append(sum(free["output_tokens"]) / free["seconds"])
            rates.structured.append(sum(structured["output_tokens"]) / structured["seconds"])
            useful = [useful_tokens(text, tokenizer) for text in structured["texts"]]
            rates.useful.append(sum(useful) / structured["seconds"])
            rates.whole.append(sum(count > 0 for count in useful) / len(useful))
    return found


def compile_seconds(compiler: GrammarCompiler, structure: Mapping[str, Any], repeats: int = 5) -> float:
    """Return the median seconds of compiling a structure that is not in the cache."""
    taken = []
    for index in range(repeats + 1):
        fresh = dict(structure)
        if "json" in fresh:
            fresh["json"] = fresh["json"] | {"$comment": f"{index}"}
        else:
            fresh["regex"] += f"x{{0,{index + 1}}}"
        start = time.perf_counter()
        compiler.compile(StructuredOutputs(**fresh))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one builds the tokenizer's tables


def _start(
    stack: ExitStack, peers: PeerChoice, backends: list[str], model: str, dtype: str, device: str | None, c: int, n: int
) -> list[Engine]:
    """Start DiSpec and a vLLM for each backend, for `c` sequences of `n` tokens."""

    def started(worker: Worker) -> Worker:
        stack.callback(worker.close)
        return worker

    options = {"dtype": dtype, "device": device, "max_num_seqs": c, "max_model_len": n}
    ours = started(dispec_engine(model, options))
    engines = [Engine("dispec", ours), Engine("dispec, sampled", ours, {"logprobs": 0})]
    if "vllm" in peers.names:
        is_cuda = choose_device(device).type == "cuda"
        for backend in backends:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispec-bench-structured-")))
            more = {"skip_tokenizer_init": False, "structured_outputs_config": {"backend": backend}}
            name = f"vllm, {backend}"
            worker = start_vllm(peers, model, dtype, is_cuda, c, n, folder, name=name, **more)
            engines.append(Engine(name, started(worker)))
    return engines


def _compiler(checkpoint: Checkpoint) -> GrammarCompiler:
    path = str(Path(checkpoint.directory) / "tokenizer.json")
    return GrammarCompiler(path, checkpoint.config.vocab_size, checkpoint.eos_token_ids)


def main(
    model: Annotated[str, typer.Option(help="Directory, hub id, .gguf file or built-in name.")] = "smollm2",
    cases: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(CASES)}.")] = ",".join(CASES),
    concurrency: Annotated[str, typer.Option(help="Numbers of simultaneous requests.")] = "1,16",
    output_tokens: Annotated[int, typer.Option(min=2, help="Of outputs that are no documents.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each engine; the median counts.")] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    peer: Peers = None,
    peer_backends: Annotated[
        str, typer.Option(help="vLLM: its grammar engines, comma-separated.")
    ] = "xgrammar,guidance",
    peer_python: PeerPython = None,
    peer_hf: PeerHf = None,
    peer_preload: PeerPreload = None,
    output: Output = None,
) -> None:
    """Measure the cost of masks, and what forced tokens save, beside free text and vLLM."""
    settings = dict(locals())
    peers = choose_peers(peer or ["none"], peer_python, peer_hf, peer_preload, None, None)
    chosen = {name.strip(): CASES[name.strip()] for name in cases.split(",")}
    columns = {"case": "", "c": "d", "engine": "", "tokens": "d", "free tok/s": ".1f", "tok/s": ".1f", "/ free": ".2fx"}
    columns |= {"whole": ".0%", "useful tok/s": ".1f", "DiSpec /": ".2fx", "compile ms": ".1f"}
    report = Report("structured", settings, describe_machine(choose_device(device)), columns, output)
    checkpoint = find_checkpoint(model)
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    compiler = _compiler(checkpoint)
    room = _PROMPT_TOKENS + max(_MAX_DOCUMENT_TOKENS, output_tokens)
    with ExitStack() as stack:
        backends = [name.strip() for name in peer_backends.split(",")]
        engines = _start(stack, peers, backends, model, dtype, device, max(sizes(concurrency)), room)
        for engine in engines:
            report.versions |= engine.worker.versions
        for name, case in chosen.items():
            seconds = compile_seconds(compiler, case.structure)
            for size in sizes(concurrency):
                found = run_case(engines, case, size, output_tokens, rounds, tokenizer)
                _add(report, name, case, size, found, seconds)
    report.finish()


def _add(report: Report, name: str, case: Case, size: int, found: Mapping[str, Rates], compile_time: float) -> None:
    """Add a row for each engine."""
    best = None
    for engine, rates in found.items():
        free, structured = statistics.median(rates.free), statistics.median(rates.structured)
        useful = statistics.median(rates.useful) if case.is_document else None
        whole = statistics.mean(rates.whole) if case.is_document else None
        counted = structured if useful is None else useful
        best = counted if best is None else best
        ratio = statistics.median(masked / plain for masked, plain in zip(rates.structured, rates.free, strict=True))
        ours = compile_time if engine == "dispec" else None
        report.add(
            {"case": name, "concurrency": size, "engine": engine},
            {
                "tokens": rates.num_tokens,
                "free_tokens_per_second": free,
                "tokens_per_second": structured,
                "ratio": ratio,
                "useful_tokens_per_second": useful,
                "whole": whole,
                "compile_seconds": ours,
            },
            [
                name,
                size,
                engine,
                rates.num_tokens,
                free,
                structured,
                ratio,
                whole,
                useful,
                best / counted if counted else None,
                None if ours is None else ours * 1e3,
            ],
        )


if __name__ == "__main__":
    typer.run(main)
