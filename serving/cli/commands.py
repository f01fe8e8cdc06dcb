"""The `dispec` command. Nothing here imports torch until a command needs a model, so that help is instant."""

import importlib
import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dispec.engine.sampling_params import SamplingParams
from dispec.serving.cli.console import BAD_INPUT, INTERRUPTED, reporting, say
from dispec.serving.cli.serve_options import server_options, with_serve_options
from dispec.serving.cli.shared_options import (
    Debug,
    IgnoreEos,
    MaxTokens,
    MinP,
    Quiet,
    RepetitionPenalty,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    with_engine_options,
)
from dispec.serving.settings import ServerSettings

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM
    from dispec.engine.api.outputs import Completion

log = logging.getLogger("dispec")

app = typer.Typer(
    name="dispec",
    help="An LLM inference engine that can be read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Given to each command and not once to the group, whose commands would put their own names after the prefix: an
# option shall have one variable, whichever command reads it.
_FROM_ENVIRONMENT = {"auto_envvar_prefix": "DISPEC"}


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("dispec")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"dispec {version}")
        raise typer.Exit


@app.callback()
def _dispec(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=_FROM_ENVIRONMENT)
@with_engine_options
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    system: System = None,
    ignore_eos: IgnoreEos = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Answer one prompt, as it is being generated."""
    with reporting(quiet=quiet, debug=debug):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
            ignore_eos=ignore_eos,
        )
        if raw and system is not None:
            raise ValueError("--system is part of a chat template, which --raw leaves out: give one of them")
        text = _read_prompt(prompt)
        llm = _start(engine, quiet)
        if raw or (system is None and not llm.tokenizer.has_chat_template):
            token_ids = llm.tokenizer.encode(text)
        else:
            messages = [] if system is None else [{"role": "system", "content": system}]
            token_ids = llm.chat_prompt([*messages, {"role": "user", "content": text}])
        completion = None
        written = ""
        try:
            for piece in llm.stream(token_ids, params):
                written = piece.text or written
                print(piece.text, end="", flush=True)
                completion = piece.completion
        finally:
            if not written.endswith("\n"):
                print(flush=True)
        if completion is not None and not quiet:
            say(summary(completion))


@app.command(context_settings=_FROM_ENVIRONMENT)
@with_engine_options
def chat(
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    system: System = None,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Talk with a model; it remembers what was said. /clear forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from dispec.serving.cli.chat import converse

    with reporting(quiet=quiet, debug=debug):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
        )
        llm = _start(engine, quiet)
        for completion in converse(llm, params, system):
            if not quiet:
                say(summary(completion))


@app.command(context_settings=_FROM_ENVIRONMENT)
@with_serve_options
def serve(quiet: Quiet = False, debug: Debug = False, *, server: dict[str, Any], engine: dict[str, Any]) -> None:
    """Answer an OpenAI-compatible API, with a dashboard, until told to leave: Ctrl-C lets running requests finish."""
    # Before anything loads it: a second thread of the tokenizer's would take time from the engine's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_progress = not quiet and sys.stderr.isatty()
    _choose_progress_bars(show_progress)
    with reporting(quiet=quiet, debug=debug):
        from dispec.serving.server import run

        settings = ServerSettings(**server_options(**server))
        if not quiet:
            say(f"loading {engine['model']}")
        code = run(settings, engine, quiet=quiet, show_progress=show_progress)
        if code:
            raise typer.Exit(code)


@app.command(context_settings=_FROM_ENVIRONMENT)
def distill(
    target: Annotated[str, typer.Argument(help="The model to make a draft for: as --model elsewhere.")],
    layers: Annotated[int, typer.Option(help="Of the target's layers, that the draft begins with.")],
    out: Annotated[Path, typer.Option(help="Directory of the draft; what an earlier call began there goes on.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt in each line.", show_default="some of our own")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Of answers that the target writes for the draft to learn from.")
    ] = 1_000_000,
    epochs: Annotated[int, typer.Option(help="How often to train on each.")] = 3,
    batch_tokens: Annotated[int, typer.Option(help="Of a training step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    own_embedding: Annotated[
        bool,
        typer.Option("--own-embedding", help="Train embedding and head as well, instead of borrowing the target's."),
    ] = False,
    head_tokens: Annotated[
        int, typer.Option(help="How many tokens, the most frequent ones, a borrowed head can guess; 0 is all.")
    ] = 8192,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
    max_num_seqs: Annotated[int, typer.Option(help="Answers that the target writes at once.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a draft model for --speculative-model: a few layers of the target, trained on what the target writes."""
    with reporting(quiet=False, debug=debug):
        from dispec.bench.distillation.distill import Recipe, distill
        from dispec.bench.distillation.text import SEED_PROMPTS, read_prompts
        from dispec.engine.options import EngineOptions

        recipe = Recipe(
            layers=layers,
            num_tokens=tokens,
            epochs=epochs,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            shares_embedding=not own_embedding,
            head_tokens=head_tokens,
            max_tokens=max_tokens,
        )
        options = EngineOptions(model=target, device=device, max_num_seqs=max_num_seqs)
        agreement = distill(options, recipe, read_prompts(prompts or SEED_PROMPTS), out)
        say(f"{out}: its likeliest token is the target's {agreement.greedy:.1%} of the time")


@app.command("env-check", context_settings=_FROM_ENVIRONMENT)
def env_check(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    debug: Debug = False,
) -> None:
    """Try what this machine can do, and tell which parts of DiSpec will work on it."""
    import dispec.serving.cli.env_check as machine

    with reporting(quiet=True, debug=debug):
        findings = []
        for finding in machine.findings():
            findings.append(finding)
            if not as_json:
                print(machine.row(finding), flush=True)
        features = machine.features(findings)
        if as_json:
            print(json.dumps(machine.as_json(findings, features), indent=2))
        else:
            print("\nwhat of DiSpec will work here")
            for feature in features:
                print(machine.feature_row(feature))
        if not machine.can_run(features):
            raise typer.Exit(1)


# Its options belong to the benchmark that it names.
@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)
def bench(context: typer.Context) -> None:
    """Measure: throughput, latency, startup and more; without a name it lists what there is."""
    # By name: benchmarks may import everything, and nothing that serves needs them.
    if code := importlib.import_module("dispec.bench.cli").main(list(context.args)):
        raise typer.Exit(code)


def summary(completion: "Completion") -> str:
    """One line on how an answer came: how many tokens, how fast, and if a limit cut it off."""
    count = len(completion.token_ids)
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if rate := completion.timing.tokens_per_second(count):
        parts.append(f"{rate:.1f} tokens/s")
    parts.append(f"first token after {completion.timing.first_token:.2f} s")
    if completion.finish_reason == "length":
        parts.append("cut off by max_tokens or max_model_len")
    return ", ".join(parts)


def main(args: list[str] | None = None) -> None:
    """Entry point. Exits with 0, with 2 where the user gave something wrong, 130 after Ctrl-C, else with 1."""
    try:
        code = app(args=args, prog_name="dispec", standalone_mode=False)
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    except Exception as error:
        # Some versions of typer bring their own copy of click, so there is no one class to name for what it raises.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        say(f"error: {' '.join(message().split())} (see `dispec --help`)")
        code = BAD_INPUT
    sys.exit(code or 0)


def _read_prompt(given: str) -> str:
    try:
        if given == "-":
            # Almost every text that is piped ends in a newline that nobody meant as part of the question.
            given = sys.stdin.buffer.read().decode().removesuffix("\n")
        given.encode()
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from error
    if not given:
        raise ValueError("the prompt is empty: give a text, or - to read standard input")
    return given


def _start(engine: dict[str, Any], quiet: bool) -> "LLM":
    """Load the model, for one sequence at a time unless told otherwise, which records fewer CUDA graphs."""
    show_progress = not quiet and sys.stderr.isatty()
    _choose_progress_bars(show_progress)
    log.info("loading %s", engine["model"])
    from dispec.engine.api.llm import LLM

    return LLM(show_progress=show_progress, **({"max_num_seqs": 1} | engine))


def _choose_progress_bars(show_progress: bool) -> None:
    """The hub's client draws its own while it downloads; it reads the variable when it is first imported."""
    if not show_progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
