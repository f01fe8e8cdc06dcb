"""The options of `dispec serve`: by flag, by environment variable, or from a TOML file, in that order."""

import functools
import inspect
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dispec.serving.cli.shared_options import engine_options
from dispec.serving.client.slo import parse_slo
from dispec.serving.cluster.autoscaling import ScalingLimits
from dispec.serving.settings import ServerSettings

_SERVER = "Server"
_LIMITS = "Limits"
_WORKERS = "Workers"


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make what the file says the default of each option. Runs before any other option is looked at."""
    if path is None:
        return None
    try:
        stated = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not TOML: {error}") from error
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
    defaults: dict[str, Any] = {}
    for key, value in stated.items():
        name = key.replace("-", "_")
        if name not in known or known[name].param_type_name != "option" or name == "help":
            raise typer.BadParameter(f"{path} has {key!r}, which is no option of this command (see --help)")
        parameter = known[name]
        takes_list = bool(getattr(parameter, "multiple", False))
        values = value if takes_list and isinstance(value, list) else [value]
        is_flag = bool(getattr(parameter, "is_flag", False))
        for item in values:
            if isinstance(item, bool) != is_flag or not isinstance(item, bool | int | float | str):
                kind = "true or false" if is_flag else "a text or a number"
                raise typer.BadParameter(f"{path}: {key} is {item!r}, must be {kind}")
        defaults[name] = values if takes_list else value
    context.default_map = defaults
    return path


def server_options(
    host: Annotated[
        str, Option(help="Address to listen on; 0.0.0.0 is every one.", rich_help_panel=_SERVER)
    ] = ServerSettings.host,
    port: Annotated[int, Option(help="0 takes a free one.", rich_help_panel=_SERVER)] = ServerSettings.port,
    api_key: Annotated[
        list[str] | None,
        Option(help="Key without which nothing is answered; can be given several times.", rich_help_panel=_SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None, Option(help="File with a key on each line, out of sight of `ps`.", rich_help_panel=_SERVER)
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        Option(
            help="SCHEME://HOST[:PORT] whose web pages may use this server, * for all; can be given several times,"
            " or as a JSON list.",
            show_default="none",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allowed_methods: Annotated[
        list[str] | None, Option(help="Methods for those pages.", show_default="*", rich_help_panel=_SERVER)
    ] = None,
    allowed_headers: Annotated[
        list[str] | None, Option(help="Headers for those pages.", show_default="*", rich_help_panel=_SERVER)
    ] = None,
    allow_credentials: Annotated[
        bool,
        Option("--allow-credentials", help="Let those pages send what the browser keeps.", rich_help_panel=_SERVER),
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        Option(
            help="What clients call the model; can be given several times.",
            show_default="its own name",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    generation_config: Annotated[
        str,
        Option(
            help="auto takes what a request leaves open from the model's generation_config.json; none does not.",
            rich_help_panel=_SERVER,
        ),
    ] = ServerSettings.generation_config,
    allow_special_tokens_in_content: Annotated[
        bool,
        Option(
            "--allow-special-tokens-in-content",
            help="Read special tokens that messages spell out as those tokens; a request can say so itself.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    log_format: Annotated[
        str,
        Option(help="json, text, or auto: text on a terminal, otherwise JSON.", rich_help_panel=_SERVER),
    ] = ServerSettings.log_format,
    role: Annotated[
        str,
        Option(
            help="prefill or decode: the part of requests that a router sends here by kv_transfer_params; or both.",
            rich_help_panel=_WORKERS,
        ),
    ] = ServerSettings.role,
    disaggregate: Annotated[
        bool,
        Option(
            "--disaggregate",
            help="Compute prompts and generate in processes of their own, on this machine.",
            rich_help_panel=_WORKERS,
        ),
    ] = False,
    prefill: Annotated[
        int, Option(help="Processes that compute prompts.", rich_help_panel=_WORKERS)
    ] = ServerSettings.prefill,
    decode: Annotated[int, Option(help="Processes that generate.", rich_help_panel=_WORKERS)] = ServerSettings.decode,
    autoscale: Annotated[
        str | None,
        Option(
            help="MIN:MAX processes of each kind; the load decides how many.",
            show_default="as many as at the start",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        Option(
            help="NAME:ttft=SECONDS,itl=SECONDS, a class that requests can name; can be given several times.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_queued_requests: Annotated[
        int, Option(help="Most requests that wait; further ones get 503.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_queued_requests,
    max_queued_tokens: Annotated[
        int, Option(help="Most prompt tokens that wait.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_queued_tokens,
    request_timeout: Annotated[
        float | None, Option(help="Seconds for a whole request.", show_default="none", rich_help_panel=_LIMITS)
    ] = None,
    stall_seconds: Annotated[
        float, Option(help="Without a step while there is work: not ready after so long.", rich_help_panel=_LIMITS)
    ] = ServerSettings.stall_seconds,
    drain_timeout: Annotated[
        float, Option(help="Seconds that running requests have after SIGTERM.", rich_help_panel=_LIMITS)
    ] = ServerSettings.drain_timeout,
    max_engine_restarts: Annotated[
        int,
        Option(
            help="In a row, of an engine that dies; then the server ends with exit code 1.", rich_help_panel=_LIMITS
        ),
    ] = ServerSettings.max_engine_restarts,
    keep_alive_seconds: Annotated[
        float, Option(help="Of silence, after which a stream gets a comment line.", rich_help_panel=_LIMITS)
    ] = ServerSettings.keep_alive_seconds,
    tokenize_timeout: Annotated[
        float, Option(help="Seconds for a body to arrive, and to be tokenised.", rich_help_panel=_LIMITS)
    ] = ServerSettings.tokenize_timeout,
    max_body_bytes: Annotated[
        int, Option(help="Of a request's body.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_body_bytes,
    max_header_bytes: Annotated[
        int, Option(help="Of a request's headers.", rich_help_panel=_LIMITS)
    ] = ServerSettings.max_header_bytes,
) -> dict[str, Any]:
    """What was given, as keyword arguments of `ServerSettings`. Raises ValueError for a key file without keys."""
    given = dict(locals())
    keys = list(given.pop("api_key") or ())
    key_file = given.pop("api_key_file")
    if key_file is not None:
        try:
            lines = [line.strip() for line in Path(key_file).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file {key_file} cannot be read ({error})") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"api_key_file {key_file} holds no key")
        keys += found
    given["api_keys"] = tuple(keys)
    given["slos"] = tuple(map(parse_slo, given.pop("slo") or ()))
    if (bounds := given["autoscale"]) is not None:
        given["autoscale"] = _scaling_limits(bounds)
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        if (items := given.pop(name)) is not None:
            given[name] = _texts(name, items)
    given["served_model_names"] = tuple(given.pop("served_model_name") or ())
    return given


def _texts(name: str, items: list[str]) -> tuple[str, ...]:
    """Texts that were given one by one, or as vLLM takes them: one JSON list."""
    joined = " ".join(items)  # a variable is taken apart at its spaces
    if not joined.startswith("["):
        return tuple(items)
    try:
        found = json.loads(joined)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(f"{name} is {joined!r:.100}, must be a JSON list of texts, or one text")
    return tuple(found)


def _scaling_limits(bounds: str) -> ScalingLimits:
    least, _, most = bounds.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise ValueError(f"autoscale is {bounds!r}, must be MIN:MAX, two numbers")
    return ScalingLimits(least=int(least), most=int(most))


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        Option(
            help="TOML file with any of these options; flags and environment variables come before it.",
            is_eager=True,
            callback=_read_config,
            rich_help_panel=_SERVER,
        ),
    ],
)
_MODEL = inspect.Parameter(
    "model_argument",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None, Argument(metavar="[MODEL]", help="The same as --model, and before it.", show_default=False)
    ],
)
_MAX_NUM_SEQS = Annotated[
    int | None, Option(help="Most sequences at once.", show_default="64", rich_help_panel="Engine")
]


def with_serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all of the above and the engine's options; it receives two dictionaries, `server`, `engine`."""
    of_engine = dict(inspect.signature(engine_options).parameters)
    of_engine["max_num_seqs"] = of_engine["max_num_seqs"].replace(annotation=_MAX_NUM_SEQS)
    of_server = dict(inspect.signature(server_options).parameters)
    names = {"server", "engine"}
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name not in names]
    parameters = [_MODEL, *own, _CONFIG, *of_server.values(), *of_engine.values()]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        given.pop("config")
        argument = given.pop("model_argument")
        engine = engine_options(**{name: given.pop(name) for name in of_engine})
        if argument is not None:
            engine["model"] = argument
        server = {name: given.pop(name) for name in of_server}
        command(**given, server=server, engine=engine)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
