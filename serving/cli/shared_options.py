"""Options that several commands share, declared once."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from typer import Option

MaxTokens = Annotated[int, Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, Option(help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int, Option(help="Draw from this many likeliest tokens only.", show_default="all")]
TopP = Annotated[float, Option(help="Draw from the likeliest tokens of this probability together.")]
MinP = Annotated[float, Option(help="Draw from tokens at least this many times as probable as the likeliest.")]
RepetitionPenalty = Annotated[float, Option(help="Above 1: tokens that were there already are less likely.")]
Stop = Annotated[list[str] | None, Option(help="Text that ends the answer; can be given several times.")]
Seed = Annotated[int | None, Option(help="Makes a temperature above 0 repeatable.", show_default="random")]
System = Annotated[str | None, Option(help="System message, for models whose chat template knows one.")]
IgnoreEos = Annotated[bool, Option("--ignore-eos", help="Go on to --max-tokens whatever the model says.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="On standard error, only warnings and errors.")]
Debug = Annotated[bool, Option("--debug", help="Show where an error came from.")]

_ENGINE = "Engine"


def engine_options(
    model: Annotated[
        str,
        Option(
            "--model", "-m", help="Directory, .gguf file, hub id, or the built-in smollm2.", rich_help_panel=_ENGINE
        ),
    ] = "smollm2",
    dtype: Annotated[
        str | None,
        Option(help="bfloat16, float16 (CUDA only) or float32.", show_default="bfloat16", rich_help_panel=_ENGINE),
    ] = None,
    device: Annotated[
        str | None,
        Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one", rich_help_panel=_ENGINE),
    ] = None,
    kv_cache_memory: Annotated[
        str | None, Option(help="Size such as 2GiB.", show_default="from what is free", rich_help_panel=_ENGINE)
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        Option(help="Share of a CUDA device's memory to use.", show_default="0.9", rich_help_panel=_ENGINE),
    ] = None,
    max_model_len: Annotated[
        int | None,
        Option(help="Most tokens of prompt and answer.", show_default="the model's limit", rich_help_panel=_ENGINE),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        Option(help="Most sequences at once.", show_default="1 for one conversation", rich_help_panel=_ENGINE),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        Option(help="Most tokens of a step.", show_default="8192 on CUDA, 512 on CPU", rich_help_panel=_ENGINE),
    ] = None,
    max_prefill_chunk: Annotated[
        int | None,
        Option(
            help="Most prompt tokens of one sequence in a step.",
            show_default="2048 on CUDA, the whole step on CPU",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        Option(
            "--prefix-caching/--no-prefix-caching",
            help="Compute a prefix once and share it.",
            show_default="on",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    priority_aging: Annotated[
        float | None,
        Option(
            help="Seconds of waiting that make up for one step of priority.",
            show_default="60",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    async_scheduling: Annotated[
        bool | None,
        Option(
            "--async-scheduling/--no-async-scheduling",
            help="Prepare a step while the device runs the one before.",
            show_default="on with CUDA",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        Option(help="Tokens per KV block.", show_default="32", rich_help_panel=_ENGINE),
    ] = None,
    load_format: Annotated[
        str | None, Option(help="auto, or dummy for random weights.", show_default="auto", rich_help_panel=_ENGINE)
    ] = None,
    compile: Annotated[
        str | None,
        Option(
            help="When steps are compiled. startup: before the first request; background (CUDA): while no request runs,"
            " answering eagerly until then; off: never.",
            show_default="startup on CUDA, off on CPU",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    speculative_model: Annotated[
        str | None,
        Option(
            help="Propose draft tokens: ngram, or a smaller model of the same tokenizer. Answers stay the same.",
            show_default="none",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        Option(help="Most draft tokens of a sequence in a step.", show_default="5", rich_help_panel=_ENGINE),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        Option(help="Processes that share every layer among them.", show_default="1", rich_help_panel=_ENGINE),
    ] = None,
    threads: Annotated[
        int | None,
        Option(
            help="CPU threads of a step; with --disaggregate, of all engines together.",
            show_default="the usable cores",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_transfer: Annotated[
        str | None,
        Option(
            help="How KV blocks move between engines: auto, shm, cuda_ipc, nixl or tcp.",
            show_default="not at all",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_transfer_host: Annotated[
        str | None,
        Option(help="Address where other engines reach this one.", show_default="127.0.0.1", rich_help_panel=_ENGINE),
    ] = None,
    kv_transfer_port: Annotated[
        int | None, Option(help="Port for other engines.", show_default="a free one", rich_help_panel=_ENGINE)
    ] = None,
    kv_transfer_secret: Annotated[
        str | None,
        Option(
            help="What engines must know to reach each other; better set in the environment.",
            show_default="none, on a loopback address alone",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_transfer_lease: Annotated[
        float | None,
        Option(
            help="Seconds for which blocks are kept for an engine that does not ask.",
            show_default="30",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    enforce_eager: Annotated[bool, Option(help="The same as --compile off.", rich_help_panel=_ENGINE)] = False,
) -> dict[str, Any]:
    """What was given, as keyword arguments of `LLM`. What was not is left out: the engine knows its own defaults."""
    return {name: value for name, value in locals().items() if value is not None}


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options above after its own; it receives them as one dictionary, `engine`.

    Each can also be set by an environment variable: `DISPEC_` and the option's name in capitals.
    """
    shared = inspect.signature(engine_options).parameters
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "engine"]
    parameters = [*own, *shared.values()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        engine = engine_options(**{name: given.pop(name) for name in shared})
        command(**given, engine=engine)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
