"""What the front process can be told at start, and the limits that it holds its clients to."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from dispec.serving.client.slo import DEFAULT_CLASS, Slo
from dispec.serving.cluster.autoscaling import ScalingLimits
from dispec.serving.http.cors import ANY, Cors, origin_as_sent
from dispec.serving.observability.structured_log import LogFormat

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_STOPS = 4
MAX_BAD_WORDS = 1024
MAX_TOKEN_IDS = 2**18  # in a list of them: more than any vocabulary has
MAX_BAD_WORD_TOKENS = 65536  # of all of them: the engine checks them in 20 ms, and generates nothing meanwhile
MAX_TEMPLATE_ARGUMENTS = 32

GenerationConfig = Literal["auto", "none"]
Role = Literal["both", "prefill", "decode"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a header's or method's name, by RFC 9110


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Raises ValueError with the option, its value and the limit.

    host, port: where to listen; port 0 takes a free one.
    api_keys: any of them opens every route; with none, all routes are open.
    allowed_origins: origins whose web pages may use the server from a browser; "*" allows all, none keeps them out.
    allowed_methods, allowed_headers: which methods and headers those pages may use; "*" allows all.
    allow_credentials: let those pages send what the browser keeps, such as a key that was typed in for the dashboard.
    served_model_names: what clients may call the model, the first of which answers carry; empty takes its own name.
    max_queued_requests, max_queued_tokens: most choices, and most prompt tokens, that wait for the engine.
    request_timeout: seconds for a whole request; None has no limit.
    stall_seconds: not ready if work is pending and no step ended for so long.
    drain_timeout: seconds that running requests have after SIGTERM.
    max_engine_restarts: in a row, of an engine that dies; when they are used up the server ends with exit code 1.
    keep_alive_seconds: a stream that is silent for so long gets a comment line.
    tokenize_timeout: seconds for a prompt's template and tokens, and for a body to arrive.
    max_body_bytes, max_header_bytes: of a request.
    allow_special_tokens_in_content: whether special tokens that a message spells out are those tokens, and can end or
        begin turns, where a request does not say so itself.
    role: which part of a request a router may send here with kv_transfer_params; whole requests are always served.
    disaggregate: serve with `prefill` engines that compute prompts and `decode` engines that generate.
    autoscale: bounds of the number of engines of each kind, between which the load decides; None leaves it.
    slos: classes of requests and what they are promised; the one named "default" is that of requests that name none.
    generation_config: "auto" takes what a request leaves open from the checkpoint's generation_config.json.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = (ANY,)
    allowed_headers: tuple[str, ...] = (ANY,)
    allow_credentials: bool = False
    served_model_names: tuple[str, ...] = ()
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1_000_000
    request_timeout: float | None = None
    stall_seconds: float = 60.0
    drain_timeout: float = 60.0
    max_engine_restarts: int = 5
    keep_alive_seconds: float = 5.0
    tokenize_timeout: float = 30.0
    max_body_bytes: int = 32 * 2**20
    max_header_bytes: int = 64 * 2**10
    allow_special_tokens_in_content: bool = False
    generation_config: GenerationConfig = "auto"
    log_format: LogFormat = "auto"
    role: Role = "both"
    disaggregate: bool = False
    prefill: int = 1
    decode: int = 1
    autoscale: ScalingLimits | None = None
    slos: tuple[Slo, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("prefill", 1, 64),
            ("decode", 1, 64),
            ("max_queued_requests", 1, 2**20),
            ("max_queued_tokens", 1, 2**31),
            ("max_engine_restarts", 0, 1000),
            ("max_body_bytes", 1024, 2**30),
            ("max_header_bytes", 4096, 2**20),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, must be between {low} and {high}")
        for name in ("request_timeout", "stall_seconds", "drain_timeout", "keep_alive_seconds", "tokenize_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= 1e7):
                raise ValueError(f"{name} is {seconds}, must be above 0 and at most 1e7 seconds")
        if len({slo.name for slo in self.slos}) < len(self.slos):
            raise ValueError("slo names a class twice")
        if self.autoscale is not None and not self.disaggregate:
            raise ValueError("autoscale is for the engines that disaggregate starts: give both")
        if self.disaggregate and self.role != "both":
            raise ValueError(f"disaggregate starts workers of both roles, and role is {self.role!r}: give one of them")
        for name, choices in (
            ("generation_config", ("auto", "none")),
            ("log_format", ("auto", "json", "text")),
            ("role", ("both", "prefill", "decode")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("api_key holds a key that is empty or has spaces or characters other than ASCII")
        self._check_cors()
        if not self.host:
            raise ValueError("host is empty, must be a name or an address")
        if not all(self.served_model_names):
            raise ValueError("served_model_name is empty, must be a name")

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
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, must be names, or * for all")
            for item in getattr(self, name):
                if item != ANY and not _TOKEN.fullmatch(item):
                    raise ValueError(f"{name} holds {item!r:.100}, must be a name, or * for all")
            if getattr(self, name) != (ANY,) and not self.allowed_origins:
                raise ValueError(f"{name} is for the pages of allowed_origins: give both")
        if self.allow_credentials and (not self.allowed_origins or ANY in self.allowed_origins):
            raise ValueError("allow_credentials is for pages that allowed_origins names one by one, without *")

    def slo(self, name: str | None) -> Slo | None:
        """The class of that name, or of requests without one. Raises ValueError if there is no such class."""
        found = {slo.name: slo for slo in self.slos}
        if name is None:
            return found.get(DEFAULT_CLASS)
        if name not in found:
            known = ", ".join(map(repr, found)) or "none: this server was started without --slo"
            raise ValueError(f"slo is {name!r:.100}, must be one of {known}")
        return found[name]
