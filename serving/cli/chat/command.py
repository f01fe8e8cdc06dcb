"""The command `dispec chat`, also `dispec run`."""

from typing import Annotated, Any

import typer

from dispec.engine.loading.generation_config import GENERATION_DEFAULTS
from dispec.engine.option_fields import option_fields
from dispec.engine.sampling_params import SamplingParams
from dispec.serving.cli.chat.settings import SAMPLING_FALLBACK, sampling_defaults
from dispec.serving.cli.chat.terminal import is_terminal
from dispec.serving.cli.commands import ONE_AT_A_TIME, ModelArgument, System, load_model, read_prompt
from dispec.serving.cli.console import reporting, say
from dispec.serving.cli.option_groups import SAMPLING, Debug, Quiet, with_options

# Room for an answer with reasoning; Ctrl-C stops one that goes on and on.
_SAMPLING = SAMPLING._replace(
    defaults={"max_tokens": 2048},
    found_defaults={
        name: f"the model's own, else {SAMPLING_FALLBACK.get(name, option_fields(SamplingParams)[name].default_text())}"
        for name in GENERATION_DEFAULTS
    },
)


@with_options(sampling=_SAMPLING, engine=ONE_AT_A_TIME)
def chat(
    model_argument: ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Answer this and leave; - reads it from standard input."),
    ] = None,
    system: System = None,
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history",
            help="Keep what is typed out of the history file, which DISPEC_HISTORY names; empty, it names none.",
            rich_help_panel="Chat",
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with a model. In the conversation, /help lists the commands."""
    from dispec.serving.cli.chat.converse import banner, converse, open_reader
    from dispec.serving.cli.chat.session import ChatSession

    is_interactive = prompt is None and is_terminal()
    with reporting(quiet=quiet or (is_interactive and not debug), debug=debug):
        SamplingParams(**sampling)  # before the model is loaded
        text = None if prompt is None else read_prompt(prompt)
        if model_argument is not None:
            engine["model"] = model_argument
        if is_interactive and not quiet:
            say(f"loading {engine['model']}")
        llm = load_model(engine, quiet)
        params = SamplingParams(**{**sampling_defaults(llm.engine.checkpoint), **sampling})
        session = ChatSession(llm, params, system, shows_statistics=not quiet)
        if text is not None:
            if not session.ask(text):
                raise KeyboardInterrupt
            return
        if is_interactive and not quiet:
            for line in banner(session):
                say(line)
        converse(session, open_reader(not no_history))
