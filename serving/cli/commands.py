"""The commands that run models. Torch is imported by a command that needs it, so that help is instant."""

import importlib.metadata
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

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

# A setting of each command, not of the group: the group's prefix would continue with the command's name, and an option
# has the same variable in all commands.
FROM_ENVIRONMENT = {"auto_envvar_prefix": "DISPEC"}


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


@app.command(context_settings=FROM_ENVIRONMENT)
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


@app.command(context_settings=FROM_ENVIRONMENT)
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


@app.command(context_settings=FROM_ENVIRONMENT)
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


@app.command("env-check", context_settings=FROM_ENVIRONMENT)
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


def run(args: list[str] | None) -> NoReturn:
    """Run the command line and exit: with 0, 2 where an argument is invalid, 130 after Ctrl-C, else 1."""
    try:
        code = app(args=args, prog_name="dispec", standalone_mode=False)
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    except Exception as error:
        # Typer may bring its own copy of click, so that the class of its usage errors has no one name.
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
