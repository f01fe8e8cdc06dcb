"""The commands that run models. Torch is imported by a command that needs it, so that help is instant."""

import difflib
import importlib.metadata
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dispec.engine.loading.default_model import DEFAULT_MODEL
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.structured_output.json_schema import SchemaError, enforceable_schema, read_schema
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.serving.cli.completion import complete_model
from dispec.serving.cli.console import BAD_INPUT, INTERRUPTED, printable, reporting, say, shows_progress
from dispec.serving.cli.help_layout import MEASURE, SERVE, TALK, HelpCommand, HelpGroup
from dispec.serving.cli.option_groups import (
    SAMPLING,
    SERVER,
    Debug,
    Quiet,
    engine_group,
    parsed,
    read_config,
    with_options,
)
from dispec.serving.settings import ServerSettings

if TYPE_CHECKING:
    from dispec.engine.api.llm import LLM
    from dispec.engine.api.outputs import RequestOutput

log = logging.getLogger("dispec")

app = typer.Typer(
    name="dispec",
    cls=HelpGroup,
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
    help="Run language models: talk with them, serve them, measure them. `dispec COMMAND --help` has the options.",
    pretty_exceptions_enable=False,
)

# The prefix is a setting of each command, not of the group: the group's would continue with the command's name, and an
# option has the same variable in all commands.
COMMAND: dict[str, Any] = {"cls": HelpCommand, "context_settings": {"auto_envvar_prefix": "DISPEC"}}
System = Annotated[
    str | None,
    typer.Option(help="System message, for models with a place for it in their chat template.", rich_help_panel="Chat"),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="The same as --model.", autocompletion=complete_model([DEFAULT_MODEL])),
]
# One sequence at a time, for which fewer CUDA graphs are recorded.
ONE_AT_A_TIME = engine_group(max_num_seqs=1)


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


@app.command(rich_help_panel=TALK, **COMMAND)
@with_options(sampling=SAMPLING, engine=ONE_AT_A_TIME)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to answer; without it or as -, what standard input has."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.", rich_help_panel="Chat")
    ] = False,
    system: System = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON Schema that the answer follows.", rich_help_panel="Sampling")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer one prompt, as it is being generated."""
    with reporting(quiet=quiet, debug=debug):
        if json_schema is not None:
            sampling["structured_outputs"] = StructuredOutputs(json=_read_schema(json_schema), origin="--json-schema")
        params = SamplingParams(**sampling)
        if raw and system is not None:
            raise ValueError("--system is part of a chat template, which --raw leaves out: give one of them")
        text = read_prompt(prompt)
        llm = load_model(engine, quiet)
        if raw or (system is None and not llm.tokenizer.has_chat_template):
            token_ids = llm.tokenizer.encode(text)
        else:
            messages = [] if system is None else [{"role": "system", "content": system}]
            token_ids = llm.chat_prompt([*messages, {"role": "user", "content": text}])
        output = None
        written = ""
        try:
            for output in llm.stream(token_ids, params):
                text = output.outputs[0].text
                written = text or written
                print(printable(text), end="", flush=True)
        finally:
            if not written.endswith("\n"):
                print(flush=True)
        if output is not None and not quiet:
            say(summary(output))


@app.command(rich_help_panel=SERVE, **COMMAND)
@with_options(server=SERVER, engine=engine_group())
def serve(
    model_argument: ModelArgument = None,
    quiet: Quiet = False,
    debug: Debug = False,
    config: Annotated[  # `read_config` takes its values before any other option is looked at
        Path | None,
        typer.Option(
            help="TOML file with any of these options; flags and environment variables come before it.",
            is_eager=True,
            callback=read_config,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key on each line, out of sight of `ps`.", rich_help_panel="Access")
    ] = None,
    *,
    server: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer OpenAI's and Anthropic's APIs over HTTP, with a dashboard. Ctrl-C lets running requests finish."""
    # Before the tokenizer is loaded: a second thread of it would take time from the engine's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    show_progress = shows_progress(quiet)
    with reporting(quiet=quiet, debug=debug):
        from dispec.serving.server import run

        options = parsed(SERVER, server)
        if api_key_file is not None:
            options["api_key"] = options.get("api_key", ()) + read_keys(api_key_file)
        settings = ServerSettings(**options)
        if model_argument is not None:
            engine["model"] = model_argument
        if not quiet:
            say(f"loading {engine['model']}")
        if code := run(settings, engine, quiet=quiet, show_progress=show_progress):
            raise typer.Exit(code)


@app.command("env-check", rich_help_panel=MEASURE, **COMMAND)
def env_check(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Try what DiSpec needs on this machine, and tell what will work."""
    import dispec.serving.cli.env_check as report

    with reporting(quiet=True, debug=debug):
        findings = []
        for finding in report.findings():
            findings.append(finding)
            if not as_json:
                print(finding, flush=True)
        features = report.features(findings)
        if as_json:
            print(json.dumps(report.as_json(findings, features), indent=2))
        else:
            print("\nwhat of DiSpec will work here", *features, sep="\n")
        if not report.can_run(features):
            raise typer.Exit(1)


def summary(output: "RequestOutput") -> str:
    """Return a line on the last output of an answer: how many tokens, how fast, and whether a limit cut it off."""
    metrics = output.metrics
    count = metrics.num_generation_tokens
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if metrics.tokens_per_second:
        parts.append(f"{metrics.tokens_per_second:.1f} tokens/s")
    parts.append(f"first token after {metrics.first_token_latency:.2f} s")
    if output.outputs[0].finish_reason == "length":
        parts.append("cut off by max_tokens or max_model_len")
    return ", ".join(parts)


def run(args: list[str] | None) -> NoReturn:
    """Run the command line and exit: with 0, 2 where an argument is invalid, 130 after Ctrl-C, else 1.

    `dispec help COMMAND` is `dispec COMMAND --help`.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    try:
        code = app(args=args, prog_name="dispec", standalone_mode=False)
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    except Exception as error:
        # Typer may bring its own copy of click, so that the class of its usage errors has no one name.
        if not hasattr(error, "format_message"):
            raise
        say(f"error: {_usage_error(error)}")
        code = BAD_INPUT
    sys.exit(code or 0)


def _usage_error(error: Any) -> str:
    """Return click's error as a sentence, with the nearest option and the command to ask for help."""
    message = re.sub(r" \(env var: .*?\)(?=:)", "", " ".join(error.format_message().split())).removesuffix(".")
    message = message.partition(", unable to parse")[0]  # of pydantic, which repeats what it expected
    if known := getattr(error, "possibilities", None):
        nearest = difflib.get_close_matches(error.option_name, known, 1, cutoff=0)[0]
        message = f"No such option: {error.option_name}. Did you mean {nearest}?"
    command = error.ctx.command_path if getattr(error, "ctx", None) else "dispec"
    return f"{message} (see `{command} --help`)"


def read_prompt(given: str | None) -> str:
    """Return a prompt of the command line; None and - are standard input. Raises ValueError if there is no text."""
    if given is None and sys.stdin.isatty():
        raise ValueError(
            'there is no prompt: give one, as in `dispec generate "Why is the sky blue?"`, or talk in `dispec chat`'
        )
    try:
        if given is None or given == "-":
            # Almost every piped text ends in a newline that is not part of the question.
            given = sys.stdin.buffer.read().decode().removesuffix("\n")
        given.encode()
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from error
    if not given:
        raise ValueError('the prompt is empty: give a text, as in `dispec generate "Why is the sky blue?"`')
    return given


def _read_schema(path: Path) -> str:
    """Return the contents of a file with a JSON Schema, once it is known to be one that can be enforced."""
    try:
        text = path.read_text(encoding="utf-8")
        enforceable_schema(read_schema(text))
    except OSError as error:
        raise ValueError(f"--json-schema {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--json-schema {path} is not JSON: {error}") from error
    except SchemaError as error:
        raise ValueError(f"--json-schema {path}{error.pointer and f': {error.pointer}'} {error}") from error
    return text


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys in a file, one a line; empty lines and lines that begin with # are skipped."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_key_file {path} cannot be read ({error})") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"api_key_file {path} holds no key")
    return keys


def load_model(engine: dict[str, Any], quiet: bool) -> "LLM":
    """Return a model with the options of a command."""
    show_progress = shows_progress(quiet)
    log.info("loading %s", engine["model"])
    from dispec.engine.api.llm import LLM

    return LLM(**engine, show_progress=show_progress)
