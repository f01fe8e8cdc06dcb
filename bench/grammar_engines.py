"""llguidance, as DiSpec uses it, beside xgrammar: compile times, masks, memory, and which schemas each gets right.

    pip install xgrammar jsonschema-rs
    dispec bench grammar-engines
    dispec bench grammar-engines --tokenizer smollm2 --tokenizer DIRECTORY   # each with a tokenizer.json

Each schema has a document. A mask is computed before each of its tokens. Figures are medians over the repeats:

    compile ms      a schema that is not in a cache; tokenizer tables left out, DiSpec's first closing plan included
    mask us, p99    over the tokens of the document, each matcher new
    memory MB       of the grammar and a matcher after the document (resident memory of the process, if it grew)

The last table counts the schemas of `bench.json_schemas`: refused; without a whole output among 30 random ones; wrong
if `jsonschema_rs` rejects an output.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import psutil
import typer

from dispec.bench import json_schemas
from dispec.bench.grammar_documents import documents
from dispec.bench.machine import describe_machine
from dispec.bench.random_outputs import Follower, RandomOutputs
from dispec.bench.report import Output, Report
from dispec.engine.errors import InvalidField
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.structured_output.grammar_compiler import GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs

_NUM_OUTPUTS = 30


class Refused(Exception):
    """An engine does not support a schema."""


class GrammarEngine(Protocol):
    """compile: return a function that starts a new output. Raises Refused."""

    def compile(self, schema: str) -> Callable[[], Follower]: ...


class Llguidance:
    """As DiSpec uses it."""

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._compiler = GrammarCompiler(tokenizer_path, vocab_size, eos_token_ids)

    def compile(self, schema: str) -> Callable[[], "Follower"]:
        try:
            grammar = self._compiler.compile(StructuredOutputs(json=schema))
        except InvalidField as error:
            raise Refused(str(error)) from error
        return lambda: grammar.start(2**31)


class Xgrammar:
    """With properties that a schema does not name, as the specification has it."""

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        import tokenizers
        import xgrammar

        known = tokenizers.Tokenizer.from_file(tokenizer_path).get_vocab()
        vocabulary = [""] * vocab_size
        for token, id in known.items():
            vocabulary[id] = token
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=list(eos_token_ids)
        )
        self._xgrammar = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)

    def compile(self, schema: str) -> Callable[[], Follower]:
        try:
            grammar = self._compiler.compile_json_schema(schema, strict_mode=False)
        except Exception as error:  # of many kinds
            raise Refused(str(error)) from error
        return lambda: _XgrammarFollower(self._xgrammar.GrammarMatcher(grammar))


class _XgrammarFollower:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_terminated())

    def write_mask(self, words: np.ndarray) -> None:
        if not self._matcher.fill_next_token_bitmask(words.reshape(1, -1)):
            words.fill(-1)

    def accept(self, token_id: int) -> bool:
        return bool(self._matcher.accept_token(token_id))

    def forced_token(self) -> None:
        return None

    def close(self) -> None:
        raise NotImplementedError  # only outputs with a bound are closed, and xgrammar's here have none


ENGINES: dict[str, Callable[[str, int, tuple[int, ...]], GrammarEngine]] = {
    "llguidance": Llguidance,
    "xgrammar": Xgrammar,
}


def measure(
    engine: GrammarEngine, schema: dict[str, Any], token_ids: list[int], num_words: int, repeats: int
) -> dict[str, float]:
    """Return compile_seconds, mask_seconds, mask_seconds_p99 and memory_bytes. Raises Refused."""
    before = psutil.Process().memory_info().rss
    compile_seconds, mask_seconds, kept = [], [], []
    words = np.zeros(num_words, np.int32)
    for repeat in range(repeats):
        text = json.dumps(schema | {"$comment": str(repeat)})
        start = time.perf_counter()
        begin = engine.compile(text)
        compile_seconds.append(time.perf_counter() - start)
        follower = begin()
        for position, token in enumerate(token_ids):
            start = time.perf_counter()
            follower.write_mask(words)
            mask_seconds.append(time.perf_counter() - start)
            if not words[token >> 5] >> (token & 31) & 1 or not follower.accept(token):
                raise Refused(f"token {position} of the document")
        kept.append((begin, follower))
    mask_seconds.sort()
    return {
        "compile_seconds": statistics.median(compile_seconds),
        "mask_seconds": statistics.median(mask_seconds),
        "mask_seconds_p99": mask_seconds[int(0.99 * len(mask_seconds))],
        "memory_bytes": max(0, psutil.Process().memory_info().rss - before) / repeats,
    }


def conformance(engine: GrammarEngine, outputs: RandomOutputs) -> dict[str, list[str]]:
    """Return the names of the schemas that are right, refused, wrong, or without a whole output."""
    import jsonschema_rs

    found: dict[str, list[str]] = {"right": [], "refused": [], "wrong": [], "no output": []}
    for name, schema in json_schemas.CASES.items():
        rng = random.Random(name)
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        try:
            begin = engine.compile(json.dumps(schema))
            texts = [outputs.draw(begin(), rng) for _ in range(_NUM_OUTPUTS)]
        except Refused:
            found["refused"].append(name)
            continue
        except AssertionError:
            found["wrong"].append(name)
            continue
        whole = [text for text in texts if text is not None]
        kind = "right" if all(_fits(validator, text) for text in whole) else "wrong"
        found[kind if whole else "no output"].append(name)
    return found


def _fits(validator: Any, text: str) -> bool:
    try:
        # JSON allows exponents that no float has.
        document = json.loads(text, parse_float=lambda number: max(-1e300, min(float(number), 1e300)))
        return bool(validator.is_valid(document))
    except ValueError:
        return False


def main(
    tokenizer: Annotated[
        list[str] | None, typer.Option(help="Model or directory of a tokenizer.json.", show_default="smollm2")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Compilations of each schema.")] = 5,
    output: Output = None,
) -> None:
    """Compare llguidance with xgrammar, which must be installed apart: pip install xgrammar jsonschema-rs."""
    settings = dict(locals())
    machine = describe_machine()
    columns = {
        "tokenizer": "",
        "schema": "",
        "engine": "",
        "compile ms": ".2f",
        "mask us": ".1f",
        "p99 us": ".0f",
        "MB": ".2f",
    }
    report = Report("grammar-engines", settings, machine, columns, output)
    columns = (
        {"tokenizer": "", "engine": ""} | dict.fromkeys(("right", "refused", "wrong", "no output"), "d") | {"which": ""}
    )
    correct = Report("grammar-engines-conformance", settings, machine, columns, output)
    for name in tokenizer or ["smollm2"]:
        directory, vocab_size, eos_token_ids = _tokenizer(name)
        path = str(directory / "tokenizer.json")
        outputs = RandomOutputs(directory, vocab_size, eos_token_ids)
        engines = {engine: start(path, vocab_size, eos_token_ids) for engine, start in ENGINES.items()}
        for engine in engines.values():
            engine.compile('{"type": "null"}')  # builds the tokenizer's tables
        for row, (schema, document) in documents().items():
            encoded = outputs.tokenizer.encode(json.dumps(document, ensure_ascii=False), add_special_tokens=False)
            for engine_name, engine in engines.items():
                case = {"tokenizer": name, "schema": row, "engine": engine_name}
                try:
                    figures = measure(engine, schema, encoded.ids, -(-vocab_size // 32), repeats)
                except Refused as error:
                    print(f"{engine_name} refuses {row}: {error}")
                    continue
                scaled = [figures["compile_seconds"] * 1e3, figures["mask_seconds"] * 1e6]
                scaled += [figures["mask_seconds_p99"] * 1e6, figures["memory_bytes"] / 1e6]
                report.add(case, figures, [name, row, engine_name, *scaled])
        for engine_name, engine in engines.items():
            kinds = conformance(engine, outputs)
            which = "; ".join(
                f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names and kind != "right"
            )
            cells = [name, engine_name, *(len(names) for names in kinds.values()), which]
            correct.add({"tokenizer": name, "engine": engine_name}, dict(kinds), cells)
    report.finish()
    correct.finish()


def _tokenizer(name: str) -> tuple[Path, int, tuple[int, ...]]:
    """Return the directory of the tokenizer, the size of the vocabulary, and the tokens that end an output."""
    if (Path(name) / "tokenizer.json").is_file() and not (Path(name) / "config.json").is_file():
        import tokenizers

        found = tokenizers.Tokenizer.from_file(str(Path(name) / "tokenizer.json"))
        known = found.get_vocab()
        special = {token.content: id for id, token in found.get_added_tokens_decoder().items() if token.special}
        ends = [special[token] for token in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>") if token in special]
        return Path(name), max(known.values()) + 1, tuple(ends)
    checkpoint = find_checkpoint(name)
    return Path(checkpoint.directory), checkpoint.config.vocab_size, checkpoint.eos_token_ids


if __name__ == "__main__":
    typer.run(main)
