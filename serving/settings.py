"""The options of the server process, and the limits on requests that it enforces."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dispec.engine.option_fields import Option, check_fields, invalid_field, with_declared_fields
from dispec.serving.client.slo import DEFAULT_CLASS, Slo, parse_slo
from dispec.serving.cluster.autoscaling import ScalingLimits
from dispec.serving.http.cors import ANY, Cors, origin_as_sent
from dispec.serving.observability.structured_log import LogFormat

MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_BAD_WORDS = 1024
MAX_TOKEN_IDS = 2**18  # in a list of them: more than any vocabulary has
MAX_BAD_WORD_TOKENS = 65536  # of all of them: the engine checks them in 20 ms, and generates nothing meanwhile
MAX_TEMPLATE_ARGUMENTS = 32
MAX_TOOLS = 128  # as OpenAI
MAX_TOOL_SIZE = 65536  # bytes of JSON, of one tool's parameters
MAX_TOOL_DEPTH = 64  # levels of a tool's parameters

Role = Literal["both", "prefill", "decode"]
ToolCallParserName = Literal["auto", "none", "hermes", "json", "llama3_json", "mistral", "pythonic"]
ReasoningParserName = Literal[
    "auto", "none", "think", "deepseek_r1", "deepseek_v3", "ernie45", "glm45", "minimax_m2", "mistral", "qwen3",
    "seed_oss",
]  # fmt: skip

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's or method's name, RFC 9110
_WORKERS, _LIMITS = "Several engines", "Limits"


def _json_texts(name: str) -> Callable[[list[str]], tuple[str, ...]]:
    """Return a parser of texts that are given one by one or, as vLLM takes them, as one JSON list."""

    def parse(items: list[str]) -> tuple[str, ...]:
        joined = " ".join(items)  # an environment variable is split at its spaces
        if not joined.startswith("["):
            return tuple(items)
        try:
            found = json.loads(joined)
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise invalid_field(name, f"is {joined!r:.100}, must be a JSON list of texts, or one text")
        return tuple(found)

    return parse


def _parse_slos(texts: list[str]) -> tuple[Slo, ...]:
    return tuple(map(parse_slo, texts))


def _parse_autoscale(text: str) -> ScalingLimits:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise invalid_field("autoscale", f"is {text!r}, must be MIN:MAX, two numbers")
    return ScalingLimits(least=int(least), most=int(most))


def _seconds(help: str, default: str = "") -> Option:
    return Option(help, gt=0, le=10**7, unit="seconds", default=default, group=_LIMITS)


@with_declared_fields
@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server answers, and its limits. Raises InvalidField with the option, its value and the limit."""

    host: Annotated[str, Option("Address to listen on; 0.0.0.0 is every one.", group="Server")] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen on; 0 takes a free one.", ge=0, le=65535, group="Server")] = 8000
    api_key: Annotated[
        tuple[str, ...], Option("Key that requests must carry, on every route.", default="all are open", group="Access")
    ] = field(default=(), repr=False)
    allowed_origins: Annotated[
        tuple[str, ...],
        Option(
            "SCHEME://HOST[:PORT] of web pages that may use this server, * for all; also as a JSON list.",
            default="none",
            parse=_json_texts("allowed_origins"),
            group="Access",
        ),
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...],
        Option("Methods that those pages may use.", parse=_json_texts("allowed_methods"), group="Access"),
    ] = (ANY,)
    allowed_headers: Annotated[
        tuple[str, ...],
        Option("Headers that those pages may send.", parse=_json_texts("allowed_headers"), group="Access"),
    ] = (ANY,)
    allow_credentials: Annotated[
        bool,
        Option(
            "Let those pages send what the browser keeps, such as the key typed in for the dashboard.", group="Access"
        ),
    ] = False
    served_model_name: Annotated[
        tuple[str, ...],
        Option("Name of the model in requests; answers carry the first.", default="its own name", group="Server"),
    ] = ()
    generation_config: Annotated[
        Literal["auto", "none"],
        Option(
            "auto takes what a request leaves open from the model's generation_config.json; none does not.",
            group="Chat",
        ),
    ] = "auto"
    allow_special_tokens_in_content: Annotated[
        bool,
        Option(
            "Read special tokens that messages spell out as those tokens, unless a request says otherwise.",
            group="Chat",
        ),
    ] = False
    tool_call_parser: Annotated[
        ToolCallParserName,
        Option(
            "The form of the model's tool calls; auto reads it off the chat template, or has the model write JSON; none"
            " refuses tools.",
            group="Chat",
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParserName,
        Option(
            "How the model marks its reasoning; auto reads it off the chat template, none leaves it in the text.",
            group="Chat",
        ),
    ] = "auto"
    log_format: Annotated[
        LogFormat, Option("json, text, or auto: text on a terminal, otherwise JSON.", group="Server")
    ] = "auto"
    role: Annotated[
        Role,
        Option(
            "prefill or decode: the part of requests that a router sends here by kv_transfer_params; or both. Whole"
            " requests are always served.",
            group=_WORKERS,
        ),
    ] = "both"
    disaggregate: Annotated[
        bool, Option("Compute prompts and generate in processes of their own, on this machine.", group=_WORKERS)
    ] = False
    num_prefill_workers: Annotated[
        int, Option("Processes that compute prompts.", ge=1, le=64, aliases=("prefill",), group=_WORKERS)
    ] = 1
    num_decode_workers: Annotated[
        int, Option("Processes that generate.", ge=1, le=64, aliases=("decode",), group=_WORKERS)
    ] = 1
    autoscale: Annotated[
        ScalingLimits | None,
        Option(
            "MIN:MAX processes of each kind; the load decides how many.",
            default="as many as at the start",
            group=_WORKERS,
            parse=_parse_autoscale,
        ),
    ] = None
    slo: Annotated[
        tuple[Slo, ...],
        Option(
            "NAME:ttft=SECONDS,itl=SECONDS: latency targets of requests that name this class; those of the class named"
            " default hold for all others.",
            default="none",
            parse=_parse_slos,
            group="Service levels",
        ),
    ] = ()
    max_queued_requests: Annotated[
        int, Option("Most requests that wait for the engine; further ones get 503.", ge=1, le=2**20, group=_LIMITS)
    ] = 1024
    max_queued_tokens: Annotated[
        int, Option("Most prompt tokens that wait for the engine.", ge=1, le=2**31, group=_LIMITS)
    ] = 1_000_000
    request_timeout: Annotated[float | None, _seconds("Seconds for a whole request.", default="none")] = None
    stall_seconds: Annotated[
        float, _seconds("Seconds without a step, while there is work, after which the server is not ready.")
    ] = 60.0
    drain_timeout: Annotated[float, _seconds("Seconds that running requests have after SIGTERM.")] = 60.0
    max_engine_restarts: Annotated[
        int,
        Option(
            "Restarts in a row of an engine that dies, after which the server ends with exit code 1.",
            ge=0,
            le=1000,
            group=_LIMITS,
        ),
    ] = 5
    keep_alive_seconds: Annotated[float, _seconds("Seconds of silence after which a stream gets a comment line.")] = 5.0
    tokenize_timeout: Annotated[float, _seconds("Seconds for a body to arrive, and to be tokenised.")] = 30.0
    max_stored_responses: Annotated[
        int,
        Option(
            "Responses of /v1/responses that are kept in memory, the last ones; 0 keeps none.",
            ge=0,
            le=2**20,
            group=_LIMITS,
        ),
    ] = 1000
    max_stored_response_bytes: Annotated[
        int,
        Option(
            "Size of the responses that are kept, with the conversations that they answer.",
            ge=0,
            le=2**40,
            default="256 MiB",
            group=_LIMITS,
        ),
    ] = 256 * 2**20
    max_body_bytes: Annotated[
        int, Option("Size of a request's body.", ge=1024, le=2**30, default="32 MiB", group=_LIMITS)
    ] = 32 * 2**20
    max_header_bytes: Annotated[
        int, Option("Size of a request's headers.", ge=4096, le=2**20, default="64 KiB", group=_LIMITS)
    ] = 64 * 2**10

    def __post_init__(self) -> None:
        check_fields(self)
        if len({slo.name for slo in self.slo}) < len(self.slo):
            raise invalid_field("slo", "names a class twice")
        if self.autoscale is not None and not self.disaggregate:
            raise invalid_field("autoscale", "is for the engines that disaggregate starts: give both")
        if self.disaggregate and self.role != "both":
            raise invalid_field(
                "disaggregate", f"starts workers of both roles, and role is {self.role!r}: give one of them"
            )
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise invalid_field("api_key", "holds a key that is empty or has spaces or characters other than ASCII")
        self._check_cors()
        if not self.host:
            raise invalid_field("host", "is empty, must be a name or an address")
        if not all(self.served_model_name):
            raise invalid_field("served_model_name", "is empty, must be a name")

    @property
    def cors(self) -> Cors:
        """The rules for web pages of other origins."""
        return Cors(
            origins=tuple(map(origin_as_sent, self.allowed_origins)),
            methods=tuple(method.upper() for method in self.allowed_methods),
            headers=self.allowed_headers,
            credentials=self.allow_credentials,
        )

    def _check_cors(self) -> None:
        for origin in self.allowed_origins:
            origin_as_sent(origin)
        for name in ("allowed_methods", "allowed_headers"):
            items = getattr(self, name)
            if not items:
                raise invalid_field(name, "is empty, must be names, or * for all")
            for item in items:
                if item != ANY and not _TOKEN.fullmatch(item):
                    raise invalid_field(name, f"holds {item!r:.100}, must be a name, or * for all")
            if items != (ANY,) and not self.allowed_origins:
                raise invalid_field(name, "is for the pages of allowed_origins: give both")
        if self.allow_credentials and (not self.allowed_origins or ANY in self.allowed_origins):
            raise invalid_field("allow_credentials", "is for pages that allowed_origins names one by one, without *")

    def find_slo(self, name: str | None) -> Slo | None:
        """Return the class of that name, or of requests without one. Raises ValueError if there is no such class."""
        found = {slo.name: slo for slo in self.slo}
        if name is None:
            return found.get(DEFAULT_CLASS)
        if name not in found:
            known = ", ".join(map(repr, found)) or "none: this server was started without --slo"
            raise ValueError(f"slo is {name!r:.100}, must be one of {known}")
        return found[name]
